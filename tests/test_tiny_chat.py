"""The trained demo model answers right, however it is loaded and run."""

import subprocess
import sys

import pytest
import torch
from plain_drawings import FIGURES, PAINTS, SPOTS, drawings
from transformers import AutoModelForImageTextToText, AutoProcessor

from viscpm_hf import VisCPMChat, VisCPMChatForConditionalGeneration, convert, tiny
from viscpm_hf.chat.answering import ChatRequest
from viscpm_hf.evaluation.shapes import CHAT_PARTS, ShapesChatRows, chat_rows, summarize
from viscpm_hf.shapes import LANGUAGES, QUESTION_TYPES, draw, make_scene


# The committed results have 500 pictures per type and language; a few are enough to see that nothing broke.
COUNT = 24
LEAST_RIGHT = 0.9


@pytest.fixture(scope="module")
def tiny_chat() -> VisCPMChat:
    return VisCPMChat("viscpm-tiny", device="cpu", dtype=torch.float32)


def answers(chat: VisCPMChat, rows) -> dict[str, dict]:
    processor = ShapesChatRows(chat, mode="generate")
    found = {}
    prepared = [processor.prepare(row) for row in rows]
    for begin in range(0, len(prepared), 56):
        part = prepared[begin : begin + 56]
        found |= {item.row.key: line for item, line in zip(part, processor.process(part), strict=True)}
    return found


@pytest.fixture(scope="module")
def few_rows():
    """Two questions of every type and language."""
    return chat_rows(2)


@pytest.fixture(scope="module")
def few_answers(tiny_chat, few_rows):
    return [line["answer"] for line in answers(tiny_chat, few_rows).values()]


def share_alike(chat: VisCPMChat, rows, expected) -> float:
    got = [line["answer"] for line in answers(chat, rows).values()]
    return sum(a == b for a, b in zip(got, expected, strict=True)) / len(expected)


def test_held_out_pictures(tiny_chat):
    rows = chat_rows(COUNT)
    summary = summarize(rows, answers(tiny_chat, rows), CHAT_PARTS)
    for language in LANGUAGES:
        assert summary[language]["all"]["right"]["value"] >= LEAST_RIGHT
        assert summary[language]["all"]["right_language"]["value"] >= 0.99
        for type in QUESTION_TYPES:
            assert summary[language][type]["right"]["value"] >= 0.75, (type, language)


def test_plain_drawings(tiny_chat):
    """Pictures that share no code with the training's: a figure in one plain colour on white."""
    wrong, count = [], 0
    for drawing in drawings():
        asked = {
            "What color is it?": drawing.paint,
            "What shape is this?": drawing.figure,
            "Where is it?": drawing.spot,
            "How many shapes are there?": "one",
            "它是什么颜色的？": PAINTS[drawing.paint][1],
            "这是什么形状？": "五角" if drawing.figure == "star" else FIGURES[drawing.figure],
            "它在哪里？": SPOTS[drawing.spot][2],
            "图中有几个图形？": "一",
        }
        turns = tiny_chat.ask_batch([ChatRequest(drawing.image, question) for question in asked], mode="generate")
        for turn, expected in zip(turns, asked.values(), strict=True):
            count += 1
            if expected not in turn.answer.lower():
                wrong.append((drawing.figure, drawing.paint, drawing.spot, turn.question, turn.answer))
    assert len(wrong) <= 0.05 * count, wrong


def test_the_reference_decoding_answers_alike(tiny_chat, few_rows, few_answers):
    processor = ShapesChatRows(tiny_chat, mode="reference")
    lines = processor.process([processor.prepare(row) for row in few_rows])
    alike = [line["answer"] == expected for line, expected in zip(lines, few_answers, strict=True)]
    assert sum(alike) >= 0.9 * len(alike)


def test_streamed_text_is_the_answer(tiny_chat):
    pieces = []
    image = draw(make_scene("test", 3), 128)
    turn = tiny_chat.ask(image, "描述这张图片。", mode="generate", on_text=pieces.append)
    assert "".join(pieces) == turn.answer and turn.answer.endswith("。")


@pytest.fixture(scope="module")
def ten_rows():
    """Ten questions of every type and language."""
    return chat_rows(10)


@pytest.fixture(scope="module")
def ten_answers(tiny_chat, ten_rows):
    return [line["answer"] for line in answers(tiny_chat, ten_rows).values()]


@pytest.mark.parametrize(("quantization", "least"), [("8bit", 0.98), ("4bit", 0.95), ("nf4", 0.95)])
def test_quantised(quantization, least, ten_rows, ten_answers):
    chat = VisCPMChat("viscpm-tiny", device="cpu", quantization=quantization)
    assert share_alike(chat, ten_rows, ten_answers) >= least


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, few_rows, few_answers):
    assert share_alike(VisCPMChat("viscpm-tiny", device="cpu", dtype=dtype), few_rows, few_answers) >= 0.9


def test_offloaded_to_the_disk(few_rows, few_answers, tmp_path):
    chat = VisCPMChat(
        "viscpm-tiny",
        dtype="float32",
        device_map={"": "cpu", "model.language_model.layers.1": "disk", "model.vision_tower.layers.0": "disk"},
        offload_folder=tmp_path,
    )
    assert share_alike(chat, few_rows, few_answers) == 1


def test_converted_to_the_original_layout_and_back(few_rows, few_answers, tmp_path):
    convert(tiny("chat"), tmp_path / "original", to="original")
    convert(tmp_path / "original", tmp_path / "again")
    for folder in ("original", "again"):
        chat = VisCPMChat(tmp_path / folder, device="cpu", dtype="float32")
        assert share_alike(chat, few_rows, few_answers) == 1


def test_auto_classes_and_remote_code(tiny_chat, tmp_path):
    """Saved by the Auto classes' objects, loaded where the package can't be imported: the same answer."""
    model = AutoModelForImageTextToText.from_pretrained(tiny("chat"))
    assert isinstance(model, VisCPMChatForConditionalGeneration)
    model.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(tiny("chat")).save_pretrained(tmp_path / "saved")
    draw(make_scene("test", 3), 128).save(tmp_path / "picture.png")
    script = """
import sys
sys.modules["viscpm_hf"] = None  # an import of it fails
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, image = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "path": image}, {"type": "text", "text": "描述这张图片。"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "picture.png")],
        capture_output=True,
        text=True,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = tiny_chat.ask(tmp_path / "picture.png", "描述这张图片。", mode="generate").answer
    assert done.stdout.strip() == expected
