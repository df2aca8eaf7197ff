"""The adapters for lmms-eval and VLMEvalKit, called as these call a model. Both work without them up to here."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import Golden


GOLDEN_A = Golden("chat_a")
EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Instance:
    """lmms-eval's request: context, decoding, document -> pictures, document, task, split."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def lmms():
    model = load("lmms_eval_viscpm").VisCPM(str(GOLDEN_A.weights), batch_size="2", device="cpu")
    model.task_dict = {"task": {"test": [{"image": GOLDEN_A.image(index)} for index in range(3)] + [{"image": None}]}}
    return model


def visual(doc):
    return [] if doc["image"] is None else [Image.open(doc["image"]).convert("RGB")]


def test_lmms_eval_answers_in_order(lmms):
    greedy = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    wishes = [greedy, {"max_new_tokens": 3}, greedy, greedy]
    texts = ["图片是什么颜色？", "<image>\nwhat shape is this?", "描述", "颜色"]
    requests = [
        Instance((text, dict(wish), visual, index, "task", "test"))
        for index, (text, wish) in enumerate(zip(texts, wishes, strict=True))
    ]
    answers = lmms.generate_until(requests)
    for index, (text, wish) in enumerate(zip(texts, wishes, strict=True)):
        image = None if index == 3 else GOLDEN_A.image(index)
        question = text.replace("<image>", "").strip()
        expected = lmms.chat.ask(image, question, mode="generate", max_new_tokens=wish["max_new_tokens"])
        assert answers[index] == expected.answer.split("\n\n")[0]


def test_lmms_eval_takes_one_picture(lmms):
    request = Instance(("?", {}, lambda doc: [1, 2], 0, "task", "test"))
    with pytest.raises(ValueError, match="task, document 0: VisCPM-Chat takes one picture, got 2"):
        lmms.generate_until([request])


@pytest.mark.parametrize(
    ("wishes", "options"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "top_p": 0.9, "num_beams": 3}, {"do_sample": False, "num_beams": 3}),
        ({"temperature": 0.7, "top_p": None, "until": "x"}, {"do_sample": True, "temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}),
    ],
)
def test_lmms_eval_decoding(wishes, options):
    assert load("lmms_eval_viscpm").decoding_options(wishes) == options


def test_lmms_eval_ends_answers():
    cut = load("lmms_eval_viscpm").cut
    assert cut("one. two\n\nthree", ["\n\n", "."]) == "one"
    assert cut("one", ["\n\n", ""]) == "one"


def test_vlmevalkit():
    model = load("vlmevalkit_viscpm").VisCPMChatVLM(str(GOLDEN_A.weights), max_new_tokens=4, device="cpu")
    image = str(GOLDEN_A.image(0))
    message = [{"type": "image", "value": image}, {"type": "text", "value": "颜色"}, {"type": "text", "value": "形状"}]
    expected = model.chat.ask(image, "颜色\n形状", mode="generate", max_new_tokens=4)
    assert model.generate_inner(message, dataset="MMBench") == expected.answer
    assert model.generate_inner(message[1:]) == model.chat.ask(None, "颜色\n形状", **model.generation).answer
