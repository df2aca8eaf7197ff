"""Answers of a fixed form: `prefix_allowed_tokens_fn`, by hand and by lm-format-enforcer."""

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


def test_json_of_a_schema(chat, inputs):
    pytest.importorskip("lmformatenforcer", reason="lm-format-enforcer is not installed")
    from lmformatenforcer import JsonSchemaParser, RegexParser
    from lmformatenforcer.integrations.transformers import build_transformers_prefix_allowed_tokens_fn

    tokenizer = chat[1].tokenizer
    schema = {"type": "object", "properties": {"count": {"type": "integer", "maximum": 9}}, "required": ["count"]}
    by_schema = build_transformers_prefix_allowed_tokens_fn(tokenizer, JsonSchemaParser(schema))
    assert isinstance(json.loads(answer(chat, inputs, prefix_allowed_tokens_fn=by_schema))["count"], int)
    by_expression = build_transformers_prefix_allowed_tokens_fn(tokenizer, RegexParser("(红色|蓝色)。"))
    assert answer(chat, inputs, prefix_allowed_tokens_fn=by_expression) in ("红色。", "蓝色。")
