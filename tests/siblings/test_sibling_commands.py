"""The commands that serve, show and evaluate, on the siblings; `chat` and `batch` are in `test_sibling_chat.py`."""

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from viscpm_hf.cli import main
from viscpm_hf.serving.engine import ChatEngine


SHORT = {"mode": "generate", "max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((150, 60)).convert("RGB").save(path)
    return path


@pytest.mark.skipif(find_spec("gradio") is None, reason="the extra demo isn't installed")
def test_the_demo_page_answers(sibling_chats, picture):
    import gradio as gr

    from viscpm_hf.serving.demo_chat import ChatPage
    from viscpm_hf.serving.demo_labels import Labels

    chat = sibling_chats["minicpmv-2.0"]
    engine = ChatEngine(chat)
    page = ChatPage(engine, "minicpmv-2.0")
    with gr.Blocks(analytics_enabled=False):
        page.build(Labels("en"))

    async def answer():
        given = ([], str(picture), "What?", "sampling", 6, 0.0, 1.0, gr.EventData(None, None))
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
