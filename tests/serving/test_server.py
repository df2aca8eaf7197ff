"""The API as its clients see it: a real process on the loopback, the real `openai` client."""

import base64
import io
import json

import httpx
import openai
import PIL.Image
import pytest
from paint_support import components
from serving_support import Server, data_uri, question
from support import Golden

from viscpm_hf import VisCPMPaintPipeline
from viscpm_hf.paint import read_record


GOLDEN = Golden("chat_a")
MODEL, PAINT = "chat", "paint"
ORIGIN = "https://example.org"


@pytest.fixture(scope="module")
def chat():
    return GOLDEN.load_chat()


@pytest.fixture(scope="module")
def folders(chat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    chat.model.save_pretrained(folder / MODEL)
    chat.processor.save_pretrained(folder / MODEL)
    VisCPMPaintPipeline(**components()).save_pretrained(folder / PAINT)
    return folder


@pytest.fixture(scope="module")
def server(folders):
    server = Server(
        folders / MODEL, "--paint", folders / PAINT, "--no-paint-checks", "--device", "cpu",
        "--served-model-name", MODEL, "VisCPM-Chat", "--cors-origin", ORIGIN,
    )  # fmt: skip
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def image():
    return data_uri(GOLDEN.image(0))


def test_an_answer_is_that_of_the_model(chat, client, image):
    expected = chat.ask(GOLDEN.image(0), "图片里有什么？", mode="generate", max_new_tokens=12)
    answer = client.chat.completions.create(model=MODEL, messages=question("图片里有什么？", image), max_tokens=12)
    assert answer.choices[0].message.content == expected.answer
    assert answer.usage.completion_tokens == expected.num_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_the_reference_decoding_is_the_originals(chat, client, server, image):
    expected, context, _ = chat.chat(GOLDEN.image(0), "what is this?", max_new_tokens=20)
    answer = client.chat.completions.create(
        model=MODEL, messages=question("what is this?", image), max_tokens=20, extra_body={"mode": "reference"}
    )
    assert answer.choices[0].message.content == expected


def test_the_originals_endpoint(chat, server, image):
    body = {"image": image.partition(",")[2], "question": "what is <this>?"}
    first = httpx.post(f"{server.url}/viscpm", json=body, timeout=60).json()
    answer, context, encoded = chat.chat(GOLDEN.image(0), "what is <this>?")
    assert first == {"answer": answer, "context": context}
    body |= {"question": "还有呢？", "context": context}
    second = httpx.post(f"{server.url}/viscpm", json=body, timeout=60).json()
    assert second["answer"] == chat.chat(None, "还有呢？", context, encoded)[0]


def test_a_stream_is_the_answer_in_pieces(client, image):
    asked = {"model": MODEL, "messages": question("说说", image), "temperature": 1.8, "seed": 5, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_to_a_conversation(chat, client, image):
    messages = [
        {"role": "system", "content": "Be brief."},
        *question("什么颜色？", image),
        {"role": "assistant", "content": "a < b"},
        {"role": "user", "content": "why?"},
    ]
    several = client.chat.completions.create(model=MODEL, messages=messages, n=3, temperature=2, seed=1, max_tokens=9)
    again = client.chat.completions.create(model=MODEL, messages=messages, n=3, temperature=2, seed=1, max_tokens=9)
    assert [choice.message.content for choice in several.choices] == [
        choice.message.content for choice in again.choices
    ]
    assert len({choice.message.content for choice in several.choices}) > 1


def test_without_a_picture_and_with_two(client, image):
    for messages in (
        question("hello?"),
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image}},
                    {"type": "image_url", "image_url": {"url": data_uri(GOLDEN.image(1)), "detail": "high"}},
                    {"type": "text", "text": "which?"},
                ],
            }
        ],
    ):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3)
        assert answer.choices[0].finish_reason


def test_a_painted_picture(client, server, tmp_path):
    asked = {"model": PAINT, "prompt": "一只猫", "extra_body": {"seed": 3, "steps": 2, "negative_prompt": "dog"}}
    first = client.images.generate(**asked, n=2, response_format="b64_json")
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(entry.b64_json))) for entry in first.data]
    assert pictures[0].text["prompt"] == "一只猫"
    pictures[1].fp.seek(0)
    (tmp_path / "second.png").write_bytes(pictures[1].fp.read())
    record = read_record(tmp_path / "second.png")
    assert (record.model, record.negative_prompt, record.seed, record.steps) == (PAINT, "dog", 4, 2)
    fast = client.images.generate(
        model=PAINT, prompt="cat", response_format="b64_json", extra_body={"preset": "fast", "steps": 3}
    )
    (tmp_path / "fast.png").write_bytes(base64.b64decode(fast.data[0].b64_json))
    record = read_record(tmp_path / "fast.png")
    assert (record.scheduler, record.steps) == ("DPMSolverMultistepScheduler", 3)
    assert [entry.seed for entry in first.data] == [3, 4]
    second = client.images.generate(**asked, response_format="url")
    served = PIL.Image.open(io.BytesIO(httpx.get(second.data[0].url).content))
    assert served.tobytes() == pictures[0].tobytes()
    small = client.images.generate(model=PAINT, prompt="cat", size="16x24", quality="low", response_format="b64_json")
    assert PIL.Image.open(io.BytesIO(base64.b64decode(small.data[0].b64_json))).size == (16, 24)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"size": "17x16"}, "multiple of 8"),
        ({"size": "4096x4096"}, "more than the"),
        ({"size": "x"}, "size"),
        ({"n": 99}, "n: "),
        ({"prompt": "  "}, "prompt is empty"),
        ({"extra_body": {"steps": 999}}, "steps is 999"),
        ({"quality": "low", "extra_body": {"preset": "fast"}}, "either quality .low. or preset .fast."),
        ({"model": "dall-e-3"}, "no model"),
    ],
)
def test_pictures_that_cannot_be_drawn(client, body, message):
    with pytest.raises(openai.APIStatusError, match=message):
        client.images.generate(**{"model": PAINT, "prompt": "cat", **body})


def test_models_health_metrics_and_documentation(server, client):
    assert [model.id for model in client.models.list()] == [MODEL, "VisCPM-Chat", PAINT]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    before = server.metric("viscpm_chat_requests_total")
    client.chat.completions.create(model=MODEL, messages=question("hello?"), max_tokens=3)
    assert server.metric("viscpm_chat_requests_total") >= before + 1
    page = httpx.get(f"{server.url}/docs").text
    assert "http://" not in page
    assert "https://" not in page  # it asks nobody else for its scripts
    assert httpx.get(f"{server.url}/docs/static/swagger-ui-bundle.js").status_code == 200
    assert "/v1/chat/completions" in httpx.get(f"{server.url}/openapi.json").json()["paths"]


def test_a_model_answers_to_all_its_names(client):
    assert [client.models.retrieve(name).id for name in (MODEL, "VisCPM-Chat", PAINT)] == [MODEL, "VisCPM-Chat", PAINT]
    asked = {"messages": question("hello?"), "max_tokens": 3}
    answers = [client.chat.completions.create(model=name, **asked) for name in (MODEL, "VisCPM-Chat")]
    assert [answer.model for answer in answers] == [MODEL, "VisCPM-Chat"]
    assert answers[0].choices == answers[1].choices
    for ask in (client.models.retrieve, lambda name: client.chat.completions.create(model=name, **asked)):
        with pytest.raises(openai.NotFoundError, match="no model 'a/b' here; this server has 'chat'") as caught:
            ask("a/b")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_what_monitors_browsers_and_visitors_ask(server):
    head = httpx.head(f"{server.url}/health")
    assert (head.status_code, head.content) == (200, b"")
    root = httpx.get(server.url)
    assert root.is_redirect and root.headers["location"] == "/docs"
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-y"}
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://example.com", None)):
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=preflight | {"Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed
        answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_the_chunks_of_a_stream_have_the_official_fields(server):
    body = {"model": MODEL, "messages": question("hello?"), "max_tokens": 3, "stream": True}
    for options in ({}, {"stream_options": {"include_usage": True}}):
        text = httpx.post(f"{server.url}/v1/chat/completions", json=body | options).text
        *lines, done = text.strip().split("\n\n")
        assert done == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert [choice["finish_reason"] for choice in choices] == [*[None] * (len(choices) - 1), "length"]
        assert all(choice["delta"].keys() <= {"role", "content"} for choice in choices)
        if options:
            assert [chunk["usage"] is None for chunk in chunks] == [*[True] * (len(chunks) - 1), False]
        else:
            assert not any("usage" in chunk for chunk in chunks)


def test_a_line_a_request_and_no_content_in_it(server, client, image):
    secret = "一个只有我知道的问题"
    client.chat.completions.create(model=MODEL, messages=question(secret, image), max_tokens=2)
    httpx.get(f"{server.url}/health")  # its line comes after
    assert {"request", "listening"} <= {event["event"] for event in server.events}
    assert not any(secret in line or image[40:80] in line for line in server.lines)


def test_a_key_is_asked_of_everyone(folders, image):
    key_file = folders / "key"
    key_file.write_text("geheim\n")
    server = Server(folders / MODEL, "--api-key-file", key_file, "--log-content", "--device", "cpu", "--name", "m")
    try:
        asked = {"model": "m", "messages": question("谁？", image), "max_tokens": 2}
        assert server.client(api_key="geheim").chat.completions.create(**asked).choices
        for wrong in ("falsch", "geheim2", "g"):
            with pytest.raises(openai.AuthenticationError):
                server.client(api_key=wrong).chat.completions.create(**asked)
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        with httpx.Client() as client:  # on one connection: what is refused is read to its end
            for _ in range(2):
                assert client.post(f"{server.url}/viscpm", content=bytes(3_000_000)).status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert any("谁？" in line for line in server.lines)
        assert not any(image[40:80] in line or "geheim" in line for line in server.lines)
    finally:
        assert server.stop() == 0
