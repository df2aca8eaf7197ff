"""The server's engine with the siblings: answers of many callers together, each as it would be alone."""

import base64
import importlib.util
import json
import threading

import numpy as np
import PIL.Image
import pytest
from sibling_folders import NAMES
from starlette.testclient import TestClient
from test_image_processing_minicpmv import picture

from viscpm_hf import SiblingChat
from viscpm_hf.serving.app import create_app
from viscpm_hf.serving.sampling import SamplingSettings
from viscpm_hf.serving.sibling_engine import SiblingEngine, SiblingPreparer, open_engine
from viscpm_hf.serving.tickets import EngineLimits, TextPiece


IMAGE, TALL = picture(90, 60), picture(40, 130, 1)
SHORT = {"mode": "generate", "max_new_tokens": 10}
TURNS = [(IMAGE, "What is it?"), (TALL, "图片里有什么？"), (None, "Hi"), (IMAGE, "the </s> question")]


@pytest.fixture(params=NAMES)
def chat(request, sibling_chats):
    return sibling_chats[request.param]


@pytest.fixture
def engine(chat):
    engine = open_engine(chat, EngineLimits(max_rows=3))
    assert type(engine) is SiblingEngine
    yield engine
    engine.close(drain=False)


class Caller:
    """Waits for one answer."""

    def __init__(self):
        self.pieces, self.over = [], threading.Event()

    def __call__(self, event):
        if isinstance(event, TextPiece):
            self.pieces.append(event.text)
        else:
            self.end = event
            self.over.set()


def test_answers_together_are_answers_alone(chat, engine):
    callers = []
    for length, (image, question) in enumerate([*TURNS, *TURNS], start=4):
        caller = Caller()
        engine.submit(engine.prepare.turn(image, question), SamplingSettings(max_new_tokens=length), caller)
        callers.append(caller)
    for length, (caller, (image, question)) in enumerate(zip(callers, [*TURNS, *TURNS], strict=True), start=4):
        assert caller.over.wait(60)
        expected = chat.ask(image, question, mode="generate", max_new_tokens=length)
        assert "".join(caller.pieces) == expected.answer and all(caller.pieces)
        assert caller.end.num_tokens == expected.num_tokens
    assert engine.image_cache.hits >= 1 and not engine.num_running


def test_penalties_and_stops_are_each_answers_own(chat, engine):
    prompt = engine.prepare.turn(IMAGE, "What?")
    expected = chat.ask(IMAGE, "What?", repetition_penalty=1.3, **SHORT).answer
    settings = SamplingSettings(max_new_tokens=10, repetition_penalty=1.3)
    (answer,) = engine.answer(prompt, settings, timeout=60)
    assert answer.text == expected
    stop = expected[len(expected) // 2 :][:2]
    (answer,) = engine.answer(
        prompt, SamplingSettings(max_new_tokens=10, repetition_penalty=1.3, stop=(stop,)), timeout=60
    )
    assert answer.text == expected[: expected.index(stop)] and answer.reason == "stop"


def test_scores_and_forms(chat, engine):
    prompt = engine.prepare.turn(IMAGE, "What?")
    (answer,) = engine.answer(prompt, SamplingSettings(max_new_tokens=10, top_logprobs=2), timeout=60)
    assert answer.text == chat.ask(IMAGE, "What?", **SHORT).answer
    assert len(answer.scores) == answer.num_tokens
    for score in answer.scores:
        assert score.token == score.best[0][0] and score.logprob == score.best[0][1] <= 0
    if importlib.util.find_spec("llguidance") is None:
        with pytest.raises(ValueError, match="needs llguidance, which is not installed"):
            engine.constraints.of_schema({})
        return
    form = engine.constraints.of_schema({"enum": ["no", "yes"]})
    for seed in range(3):
        settings = SamplingSettings(max_new_tokens=20, temperature=2.0, seed=seed, constraint=form)
        (answer,) = engine.answer(prompt, settings, timeout=60)
        assert json.loads(answer.text) in ("no", "yes") and answer.reason == "stop"


def test_the_reference_decoding_is_the_preset(chat, engine):
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "repetition_penalty": 1.2}
    prompt = engine.prepare.turn(IMAGE, "What?")
    beside = Caller()
    engine.submit(engine.prepare.turn(None, "Hi"), SamplingSettings(max_new_tokens=10), beside)
    (answer,) = engine.answer(prompt, engine.reference(**options), timeout=60)
    assert answer.text == chat.ask(IMAGE, "What?", **options).answer
    assert beside.over.wait(60)
    assert "".join(beside.pieces) == chat.ask(None, "Hi", **SHORT).answer
    assert engine.reference().options["max_new_tokens"] >= 512


def test_bad_prompts_are_told_before_they_are_queued(engine):
    with pytest.raises(ValueError, match="take turns"):
        engine.prepare.messages([{"role": "assistant", "content": "a"}])
    with pytest.raises(ValueError, match="have 0 pictures, but 1 were given"):
        engine.prepare.messages([{"role": "user", "content": "a"}], [IMAGE])
    with pytest.raises(ValueError, match="more than the limit"):
        engine.prepare.turn(IMAGE, "is " * 3000)
    with pytest.raises(ValueError, match="at least 2 pixels"):
        engine.prepare.turn(picture(1, 40), "What?")


def test_the_http_interface(chat, tmp_path):
    IMAGE.save(tmp_path / "image.png")
    data = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [part, {"type": "text", "text": "What?"}]
    body = {"model": "sibling", "messages": [{"role": "user", "content": content}], "max_tokens": 10}
    expected = chat.ask(IMAGE, "What?", **SHORT).answer
    with TestClient(create_app(open_engine(chat), chat_name="sibling")) as client:
        found = client.post("/v1/chat/completions", json=body).json()
        assert found["choices"][0]["message"]["content"] == expected
        streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == expected
        wrong = {**body, "messages": [{"role": "tool", "content": "a"}]}
        assert client.post("/v1/chat/completions", json=wrong).status_code == 400


def test_the_checker_sees_what_the_model_does(whole_folders):
    """A 16-bit picture is no white one for it."""
    seen = []
    chat = SiblingChat(
        whole_folders["omnilmm"], lambda image: seen.append(image.convert("L").getextrema()), device="cpu"
    )
    wide = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
    SiblingPreparer(chat).turn(PIL.Image.fromarray(wide), "What is it?")
    assert seen == [(0, int(wide.max()) >> 8)]
