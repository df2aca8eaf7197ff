"""The API's clients as their users use them, each with each feature that it has; docs/serving.md has the table.

Clients that aren't installed are left out: `pip install langchain-openai litellm llama-index-llms-openai-like
"pydantic-ai-slim[openai]"`.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Literal

import httpx
import PIL.Image
import pytest
from pydantic import BaseModel
from serving_support import Server

from viscpm_hf.shapes import draw, make_scene


MODEL = "viscpm-tiny"
QUESTION = "What color is it?"
HISTORY = "Describe the picture in one sentence."
HAS_FORMS = importlib.util.find_spec("llguidance") is not None
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


class Answer(BaseModel, extra="forbid"):
    colour: Literal["red", "blue"]
    is_round: bool


class Place:
    """Where the server is, and what it is to be asked."""

    def __init__(self, server: Server):
        file = io.BytesIO()
        draw(make_scene("test", 2, num_shapes=1), 224).save(file, "PNG")
        self.url, self.image = f"{server.url}/v1", file.getvalue()
        self.uri = "data:image/png;base64," + base64.b64encode(self.image).decode()
        body = {"model": MODEL, "messages": self.messages, "max_tokens": 32}
        answer = httpx.post(f"{self.url}/chat/completions", json=body, timeout=60).json()
        self.expected = answer["choices"][0]["message"]["content"]
        self.usage = answer["usage"]["total_tokens"]

    @property
    def messages(self) -> list[dict]:
        image = {"type": "image_url", "image_url": {"url": self.uri}}
        return [{"role": "user", "content": [{"type": "text", "text": QUESTION}, image]}]


@pytest.fixture(scope="module")
def place():
    server = Server(MODEL, "--paint", MODEL, "--no-paint-checks", "--device", "cpu", "--served-paint-name", "paint")
    place = Place(server)
    yield place
    assert server.stop() == 0


def is_image(text: str) -> bool:
    return PIL.Image.open(io.BytesIO(base64.b64decode(text))).width >= 32


def check_refusal(error: Exception) -> None:
    assert "can't call tools" in str(error)


class OpenAI:
    """openai"""

    package = "openai"

    def __init__(self, place: Place):
        import openai

        self.place = place
        self.client = openai.OpenAI(base_url=place.url, api_key="none", max_retries=0)
        self.asked = {"model": MODEL, "messages": place.messages, "max_completion_tokens": 32}

    def create(self, **options):
        return self.client.chat.completions.create(**{**self.asked, **options})

    def models(self):
        assert self.client.models.retrieve(self.client.models.list().data[0].id).id == MODEL

    def chat(self):
        assert self.create().choices[0].message.content == self.place.expected

    def conversation(self):
        answer = self.create().choices[0].message
        messages = [*self.place.messages, answer.model_dump(), {"role": "user", "content": HISTORY}]
        assert self.create(messages=messages).choices[0].message.content

    def stream(self):
        chunks = list(self.create(stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == self.place.expected
        assert chunks[-1].usage.total_tokens == self.place.usage

    def sampling(self):
        options = {"temperature": 1.5, "seed": 7, "n": 2, "stop": ["\n", "###"], "top_p": 0.9}
        first, second = ([choice.message.content for choice in self.create(**options).choices] for _ in range(2))
        assert first == second and len(first) == 2

    def logprobs(self):
        content = self.create(logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert "".join(entry.token for entry in content) == self.place.expected
        assert len(content[0].top_logprobs) == 2

    def form(self):
        parsed = self.client.chat.completions.parse(**self.asked, response_format=Answer)
        assert isinstance(parsed.choices[0].message.parsed, Answer)

    def tools(self):
        with pytest.raises(Exception) as caught:
            self.create(tools=[TOOL])
        check_refusal(caught.value)

    def images(self):
        drawn = self.client.images.generate(
            model="paint", prompt="a red circle", quality="low", response_format="b64_json", extra_body={"seed": 1}
        )
        assert is_image(drawn.data[0].b64_json)


class LangChain:
    """langchain-openai"""

    package = "langchain_openai"

    def __init__(self, place: Place):
        from langchain_openai import ChatOpenAI

        self.place = place
        options = {"model": MODEL, "base_url": place.url, "api_key": "none", "max_retries": 0, "max_tokens": 32}
        self.make = lambda **more: ChatOpenAI(**options, **more)
        self.model = self.make()

    def chat(self):
        assert self.model.invoke(self.place.messages).content == self.place.expected

    def conversation(self):
        answer = self.model.invoke(self.place.messages)
        from langchain_core.messages import HumanMessage

        messages = [HumanMessage(self.place.messages[0]["content"]), answer, HumanMessage(HISTORY)]
        assert self.model.invoke(messages).content

    def stream(self):
        chunks = list(self.make(stream_usage=True).stream(self.place.messages))
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert whole.content == self.place.expected and whole.usage_metadata["total_tokens"] == self.place.usage

    def sampling(self):
        model = self.make(temperature=1.5, seed=7, top_p=0.9, stop=["\n", "###"])
        assert model.invoke(self.place.messages).content == model.invoke(self.place.messages).content

    def logprobs(self):
        content = self.make(logprobs=True, top_logprobs=2).invoke(self.place.messages).response_metadata["logprobs"]
        assert "".join(entry["token"] for entry in content["content"]) == self.place.expected

    def form(self):
        assert isinstance(self.model.with_structured_output(Answer).invoke(self.place.messages), Answer)

    def tools(self):
        with pytest.raises(Exception) as caught:
            self.model.bind_tools([TOOL]).invoke(self.place.messages)
        check_refusal(caught.value)


class LiteLLM:
    """litellm"""

    package = "litellm"

    def __init__(self, place: Place):
        import litellm

        self.place, self.litellm = place, litellm
        self.to = {"api_base": place.url, "api_key": "none", "max_retries": 0}

    def create(self, **options):
        asked = {"model": f"openai/{MODEL}", "messages": self.place.messages, "max_tokens": 32}
        return self.litellm.completion(**self.to, **{**asked, **options})

    def chat(self):
        assert self.create().choices[0].message.content == self.place.expected

    def conversation(self):
        answer = self.create().choices[0].message
        messages = [*self.place.messages, answer.model_dump(), {"role": "user", "content": HISTORY}]
        assert self.create(messages=messages).choices[0].message.content

    def stream(self):
        chunks = list(self.create(stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == self.place.expected
        assert any(getattr(c, "usage", None) and c.usage.total_tokens == self.place.usage for c in chunks)

    def sampling(self):
        options = {"temperature": 1.5, "seed": 7, "n": 2, "stop": ["\n", "###"], "top_p": 0.9}
        first, second = ([choice.message.content for choice in self.create(**options).choices] for _ in range(2))
        assert first == second and len(first) == 2

    def logprobs(self):
        content = self.create(logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert "".join(entry.token for entry in content) == self.place.expected

    def form(self):
        Answer.model_validate_json(self.create(response_format=Answer).choices[0].message.content)

    def tools(self):
        with pytest.raises(Exception) as caught:
            self.create(tools=[TOOL])
        check_refusal(caught.value)

    def images(self):
        drawn = self.litellm.image_generation(model="openai/paint", prompt="a red circle", quality="low", **self.to)
        assert is_image(drawn.data[0].b64_json)


class LlamaIndex:
    """llama-index-llms-openai-like"""

    package = "llama_index.llms.openai_like"

    def __init__(self, place: Place):
        from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
        from llama_index.llms.openai_like import OpenAILike

        self.place = place
        options = {"model": MODEL, "api_base": place.url, "api_key": "none", "is_chat_model": True, "max_retries": 0}
        self.make = lambda **more: OpenAILike(**options, max_tokens=32, **more)
        blocks = [TextBlock(text=QUESTION), ImageBlock(image=place.image, image_mimetype="image/png")]
        self.messages = [ChatMessage(role="user", blocks=blocks)]
        self.again = ChatMessage(role="user", content=HISTORY)

    def chat(self):
        assert self.make(temperature=0).chat(self.messages).message.content == self.place.expected

    def conversation(self):
        model = self.make()
        answer = model.chat(self.messages).message
        assert model.chat([*self.messages, answer, self.again]).message.content

    def stream(self):
        *_, last = self.make(temperature=0).stream_chat(self.messages)
        assert last.message.content == self.place.expected

    def sampling(self):
        model = self.make(temperature=1.5, additional_kwargs={"seed": 7, "stop": ["\n", "###"]})
        first, second = (model.chat(self.messages).message.content for _ in range(2))
        assert first == second

    def logprobs(self):
        answer = self.make(temperature=0, logprobs=True, top_logprobs=2).chat(self.messages)
        assert "".join(entry[0].token for entry in answer.logprobs or [])

    def form(self):
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": Answer.model_json_schema()}}
        answer = self.make(additional_kwargs={"response_format": form}).chat(self.messages)
        Answer.model_validate_json(answer.message.content)


class PydanticAI:
    """pydantic-ai"""

    package = "pydantic_ai.models.openai"

    def __init__(self, place: Place):
        from pydantic_ai import Agent, BinaryContent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        self.place = place
        model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=place.url, api_key="none"))
        self.make = lambda **more: Agent(model, retries=0, **more)
        self.prompt = [QUESTION, BinaryContent(place.image, media_type="image/png")]

    def chat(self):
        assert self.make().run_sync(self.prompt).output == self.place.expected

    def conversation(self):
        first = self.make().run_sync(self.prompt)
        assert self.make().run_sync(HISTORY, message_history=first.all_messages()).output

    def stream(self):
        result = self.make().run_stream_sync(self.prompt)
        assert list(result.stream_text())[-1] == self.place.expected
        assert result.usage.total_tokens == self.place.usage

    def sampling(self):
        settings = {"temperature": 1.5, "seed": 7, "top_p": 0.9, "stop_sequences": ["\n", "###"], "max_tokens": 32}
        first, second = (self.make(model_settings=settings).run_sync(self.prompt).output for _ in range(2))
        assert first == second

    def logprobs(self):
        settings = {"openai_logprobs": True, "openai_top_logprobs": 2}
        details = self.make(model_settings=settings).run_sync(self.prompt).response.provider_details
        assert "".join(entry["token"] for entry in details["logprobs"]) == self.place.expected

    def form(self):
        from pydantic_ai import NativeOutput

        assert isinstance(self.make(output_type=NativeOutput(Answer)).run_sync(self.prompt).output, Answer)

    def tools(self):
        agent = self.make()
        agent.tool_plain(lambda: "nothing", name="look")
        with pytest.raises(Exception) as caught:
            agent.run_sync(self.prompt)
        check_refusal(caught.value)


class OpenWebUI:
    """Open WebUI: its requests, by hand"""

    package = "httpx"

    def __init__(self, place: Place):
        self.place = place

    def post(self, path: str, **body) -> httpx.Response:
        response = httpx.post(self.place.url + path, json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response

    def models(self):
        assert httpx.get(f"{self.place.url}/models").json()["data"][0]["id"] == MODEL

    def chat(self):
        body = {"model": MODEL, "messages": self.place.messages, "stream": False, "max_completion_tokens": 1000}
        answer = self.post("/chat/completions", **body, metadata={"task": "title_generation"}).json()
        assert answer["choices"][0]["message"]["content"] == self.place.expected

    def stream(self):
        body = {"stream": True, "model": MODEL, "messages": self.place.messages}
        text = self.post("/chat/completions", **body, stream_options={"include_usage": True}).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        told = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
        assert "".join(told) == self.place.expected and chunks[-1]["usage"]["total_tokens"] == self.place.usage

    def conversation(self):
        system = {"role": "system", "content": "User Context:\n\nBe brief."}
        messages = [system, *self.place.messages, {"role": "assistant", "content": "Red."}]
        self.post("/chat/completions", model=MODEL, messages=[*messages, {"role": "user", "content": HISTORY}])

    def images(self):
        body = {"model": "paint", "prompt": "a red circle", "n": 1, "size": "64x64", "response_format": "b64_json"}
        assert is_image(self.post("/images/generations", **body).json()["data"][0]["b64_json"])


CLIENTS = (OpenAI, LangChain, LiteLLM, LlamaIndex, PydanticAI, OpenWebUI)
FEATURES = {
    "models": "models",
    "chat": "answer about an image",
    "conversation": "its answers in the history",
    "stream": "stream",
    "sampling": "`seed`, `stop`, `top_p`, `n`",
    "logprobs": "`logprobs`",
    "form": "JSON schema",
    "tools": "tools refused by name",
    "images": "drawing",
}
PAIRS = [(client, feature) for client in CLIENTS for feature in FEATURES if hasattr(client, feature)]


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(("client", "feature"), PAIRS, ids=lambda value: getattr(value, "__name__", value))
def test_a_client_and_a_feature(place, client, feature):
    if not is_installed(client.package):
        pytest.skip(f"{client.__doc__} is not installed")
    if feature == "form" and not HAS_FORMS:
        pytest.skip("llguidance is not installed")
    getattr(client(place), feature)()


def test_the_table_in_the_documentation():
    lines = [f"| | {' | '.join(FEATURES.values())} |", f"|---|{'---|' * len(FEATURES)}"]
    for client in CLIENTS:
        cells = ["yes" if hasattr(client, feature) else "" for feature in FEATURES]
        lines.append(f"| {client.__doc__} | {' | '.join(cells)} |")
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    assert "\n".join(lines) in text, "\n" + "\n".join(lines)
