"""The commands that serve, show and evaluate, on the siblings; `chat` and `batch` are in `test_sibling_chat.py`."""

import asyncio
import base64
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from sibling_folders import NAMES

from viscpm_hf.cli import main
from viscpm_hf.serving.app import create_app
from viscpm_hf.serving.engine import ChatEngine
from viscpm_hf.serving.settings import ServerSettings


SHORT = {"mode": "generate", "max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((150, 60)).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_served_answers_are_the_models(sibling_chats, picture, name):
    chat = sibling_chats[name]
    engine = ChatEngine(chat)
    uri = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What?"}]
    body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
    try:
        with TestClient(create_app(engine, None, chat_name=name, settings=ServerSettings())) as client:
            whole = client.post("/v1/chat/completions", json=body).json()
            streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    finally:
        engine.close(drain=False)
    expected = chat.ask(picture, "What?", **SHORT)
    assert whole["choices"][0]["message"]["content"] == expected.answer
    assert whole["usage"]["completion_tokens"] == expected.num_tokens
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == expected.answer


@pytest.mark.skipif(find_spec("gradio") is None, reason="the extra demo isn't installed")
def test_the_demo_page_answers(sibling_chats, picture):
    import gradio as gr

    from viscpm_hf.serving.demo_chat import ChatPage
    from viscpm_hf.serving.demo_labels import Labels

    chat = sibling_chats["minicpmv-2.0"]
    engine = ChatEngine(chat)
    page = ChatPage(engine)
    with gr.Blocks(analytics_enabled=False):
        page.build(Labels("en"), gr.Radio(choices=["zh", "en"]))

    async def answer():
        given = ([], str(picture), "What?", "sampling", 6, 0.0, 1.0, "en", gr.EventData(None, None))
        return [update async for update in page.answer(*given)]

    try:
        turns, *_ = asyncio.run(answer())[-1]
    finally:
        engine.close(drain=False)
    assert turns == [("What?", chat.ask(picture, "What?", **SHORT).answer)]


@pytest.mark.parametrize("name", ["omnilmm", "minicpmv-2.0"])
def test_evaluated_answers_are_the_models(whole_folders, sibling_chats, picture, tmp_path, name):
    rows = [{"question_id": index, "image": picture.name, "text": "What?", "category": "conv"} for index in range(2)]
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    arguments = ["eval", "llava-bench", str(whole_folders[name]), "--questions", str(questions), "--images"]
    arguments += [str(tmp_path), "--answers", str(answers), "--mode", "generate", "--max-new-tokens", "6"]
    assert main([*arguments, "--device", "cpu", "--batch-size", "2"]) == 0
    found = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    expected = sibling_chats[name].ask(picture, "What?", **SHORT).answer
    assert [row["text"] for row in found] == [expected] * 2
