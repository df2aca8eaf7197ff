"""Answers of a fixed form: `prefix_allowed_tokens_fn`, by hand and by outlines."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


@pytest.fixture(scope="module")
def chat(chat_folder):
    model = AutoModelForImageTextToText.from_pretrained(chat_folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(chat_folder)


@pytest.fixture(scope="module")
def inputs(chat, pictures):
    question = [{"type": "image", "path": str(pictures[0])}, {"type": "text", "text": "What colour is the shape?"}]
    return chat[1].apply_chat_template(
        [{"role": "user", "content": question}], tokenize=True, return_dict=True, return_tensors="pt"
    )


def answer(chat, inputs, **options) -> str:
    model, processor = chat
    output = model.generate(**inputs, max_new_tokens=40, **options)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_one_of_several_answers(chat, inputs, num_beams):
    """Without its free choice the model says something that it wouldn't have said."""
    tokenizer, length = chat[1].tokenizer, inputs["input_ids"].shape[1]
    choices = ["Two.", "三个。"]
    ids = [tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] for text in choices]

    def allowed(row: int, sequence: torch.Tensor) -> list[int]:
        begun = sequence[length:].tolist()
        return [row[len(begun)] for row in ids if row[: len(begun)] == begun] or [tokenizer.eos_token_id]

    assert answer(chat, inputs) not in choices
    assert answer(chat, inputs, prefix_allowed_tokens_fn=allowed, num_beams=num_beams) in choices


def test_outlines(chat, pictures):
    outlines = pytest.importorskip("outlines", reason="outlines is not installed")
    from outlines.inputs import Chat, Image
    from PIL import Image as PilImage

    model = outlines.from_transformers(*chat)
    picture = {"type": "image", "image": Image(PilImage.open(pictures[0]))}
    question = Chat([{"role": "user", "content": [picture, {"type": "text", "text": "What colour is the shape?"}]}])
    assert model(question, outlines.regex("(三|四)个。"), max_new_tokens=20) in ("三个。", "四个。")
    schema = {"type": "object", "properties": {"count": {"enum": ["one", "two"]}}, "required": ["count"]}
    text = model(question, outlines.json_schema(schema), max_new_tokens=60)
    assert json.loads(text)["count"] in ("one", "two")
