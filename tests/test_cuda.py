"""On a GPU the answers and pictures of a CPU, and what only a GPU has: captured graphs, streams, its quantisers.

Skipped without one. `VISCPM_TEST_DEVICE=cpu` runs on the CPU what there is to run there, to try the tests themselves.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import paint_support
import PIL.Image
import pytest
import quantization_support
import torch
from paint_support import CASES, PAINT
from support import CHAT_CASES, Golden, reference_options, unescape

from viscpm_hf import VisCPMChat, VisCPMPaint
from viscpm_hf.loading.layer_streaming import LayerStreamer, stream_layers
from viscpm_hf.modeling import fast_decoding_cpm_bee
from viscpm_hf.names import QUANTIZATIONS
from viscpm_hf.serving.engine import ChatEngine
from viscpm_hf.serving.sampling import SamplingSettings


DEVICE = torch.device(os.environ.get("VISCPM_TEST_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
only_on_a_gpu = pytest.mark.skipif(not IS_CUDA, reason="a CPU has nothing of the kind")

GENERATE = {"mode": "generate", "max_new_tokens": 12}
QUESTIONS = ("图片是什么颜色？", "describe the picture 🙂 and ~ and 🙂", "^")
LAYERS = "model.language_model.layers"
ALONE = {"image_safety_checker": False, "prompt_safety_checker": False, "add_ranker": False}


@pytest.fixture(autouse=True)
def whole_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=CHAT_CASES)
def golden(request):
    return Golden(request.param)


@pytest.fixture
def chat(golden):
    return VisCPMChat(golden.weights, device=DEVICE, dtype="float32")


@pytest.fixture
def uncompiled(monkeypatch):
    """Graphs are captured all the same."""
    monkeypatch.setattr(fast_decoding_cpm_bee, "compilation_problem", lambda model, device: "not in this test")


def answers(chat, golden, **options):
    return [
        chat.ask(golden.image(index), question, **{**GENERATE, **options}).answer
        for index, question in enumerate(QUESTIONS[:2])
    ]


# --------------------------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize("fast", [False, True])
def test_golden_answers(golden, chat, uncompiled, fast):
    """The reference implementation's conversations, from ordinary steps and from captured ones."""
    assert chat.model.device.type == DEVICE.type
    for case in golden.expected["answers"]:
        image = None if case["image"] is None else golden.image(case["image"])
        context, features = "", None
        for turn in case["turns"]:
            options = reference_options(case["generate"])
            result = chat.ask(image, turn["question"], context, features, fast=fast, **options)
            assert result.answer == unescape(turn["answer"])
            image, context, features = None, result.context, result.vision_hidden_states
    graphs = chat.model.fast_decoder.graphs.values()
    assert bool(graphs) == fast
    assert all((graph._replay is not None) == IS_CUDA for graph in graphs)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "seed": 3, "temperature": 1.5}, {"repetition_penalty": 1.3}, {"max_new_tokens": 40}],
    ids=["greedy", "sampling", "penalty", "several classes"],
)
def test_captured_steps_generate_the_same(golden, chat, uncompiled, monkeypatch, options):
    monkeypatch.setattr(fast_decoding_cpm_bee, "LEAST_PLACES", 16)
    assert answers(chat, golden, fast=True, **options) == answers(chat, golden, fast=False, **options)


def test_compiled_steps_generate_the_same():
    golden = Golden(CHAT_CASES[0])
    chat = VisCPMChat(golden.weights, device=DEVICE, dtype="float32", fast=True)
    expected = answers(VisCPMChat(golden.weights, device=DEVICE, dtype="float32"), golden)
    assert answers(chat, golden) == expected


@only_on_a_gpu
def test_a_graph_is_captured_while_another_thread_works(golden, chat, uncompiled):
    expected, is_over = answers(chat, golden, fast=False), threading.Event()

    def work():
        while not is_over.is_set():
            torch.ones(64, 64, device=DEVICE).sum().item()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert answers(chat, golden, fast=True) == expected
    finally:
        is_over.set()
        thread.join()


def test_rows_that_join_and_leave(golden, chat):
    expected = [chat.ask(golden.image(0), question, **GENERATE).answer for question in QUESTIONS]
    engine = ChatEngine(chat)
    found: dict[int, str] = {}

    def ask(index):
        prompt = engine.prepare.turn(PIL.Image.open(golden.image(0)), QUESTIONS[index])
        (answer,) = engine.answer(prompt, SamplingSettings(max_new_tokens=GENERATE["max_new_tokens"]), timeout=60)
        found[index] = answer.text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert [found[index] for index in range(len(QUESTIONS))] == expected


def test_gradients_in_half_precision(golden):
    chat = VisCPMChat(golden.weights, device=DEVICE, dtype="float32")
    inputs = torch.arange(6, 20, device=DEVICE)[None]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = chat.model(input_ids=inputs, labels=inputs).loss
    loss.backward()
    gradients = [it.grad for it in chat.model.language_model().layers.parameters()]
    assert all(it is not None and it.isfinite().all() for it in gradients)


# --------------------------------------------------------------------------------------- quantised, streamed, spread


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A file whose layers are wide enough for 4 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantization_support.SIZES, "num_layers", 5)
        return quantization_support.write_chat(tmp_path_factory.mktemp("wide"))


def logits_of(chat, fast=False):
    """Of the first two tokens `(2, words)`."""
    image = Golden("chat_a").image(0)
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2, "min_new_tokens": 2}
    inputs = chat.processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": "是"}]}]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(chat.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(chat.model.dtype)
    logits = torch.cat(chat.model.generate(**inputs, fast=fast, **options).logits)
    return logits[:, : chat.processor.tokenizer.num_words].float().cpu()


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_quantised(wide, tmp_path, name):
    """Loaded, decoded by graphs, saved, and loaded again."""
    plain = VisCPMChat(wide, device=DEVICE, dtype="float32")
    chat = VisCPMChat(wide, device=DEVICE, quantization=name)
    logits = logits_of(chat)
    assert torch.cosine_similarity(logits, logits_of(plain))[0] > (0.97 if "8" in name else 0.85)
    chat.model.fast_decoder.compile = False
    if IS_CUDA or name not in ("nf4", "fp4"):  # those are packed on a CPU, by hooks
        assert torch.cosine_similarity(logits_of(chat, fast=True), logits).min() > 0.999
    graphs = chat.model.fast_decoder.graphs.values()
    assert all((graph._replay is not None) == (IS_CUDA and name not in ("8bit", "int8")) for graph in graphs)
    chat.model.save_pretrained(tmp_path)
    chat.processor.save_pretrained(tmp_path)
    assert torch.equal(logits_of(VisCPMChat(tmp_path, device=DEVICE)), logits)


@pytest.mark.parametrize("quantization", [None, pytest.param("nf4", marks=only_on_a_gpu), "int8"])
def test_streamed_layers(wide, tmp_path, quantization):
    golden, source, options = Golden("chat_a"), wide, {"dtype": "float32"}
    if quantization is not None:  # once, on the CPU
        chat, source, options = VisCPMChat(wide, device="cpu", quantization=quantization, **options), tmp_path, {}
        chat.model.save_pretrained(tmp_path)
        chat.processor.save_pretrained(tmp_path)
    expected = answers(VisCPMChat(source, device=DEVICE, **options), golden)
    chat = VisCPMChat(source, device="cpu", **options)
    layers = chat.model.language_model().layers
    size = LayerStreamer(layers[:1], torch.device("cpu"), 2**30).plan.resident_bytes
    stream_layers(chat.model, DEVICE, round(3.1 * size))
    chat.device = DEVICE
    for _ in range(2):
        assert answers(chat, golden) == expected
    places = [{it.device.type for it in layer.parameters()} for layer in layers]
    assert places == [{DEVICE.type}, *[{"cpu"}] * (len(layers) - 1)]


MAPS = {
    "RAM": {"": DEVICE, f"{LAYERS}.1": "cpu"},
    "disk": {"": DEVICE, f"{LAYERS}.1": "disk", "model.vision_tower": "disk"},
    "two GPUs": {"": 0, f"{LAYERS}.1": 1, "model.language_model.norm": 1},
}


@pytest.mark.parametrize("name", MAPS)
def test_spread(golden, chat, name):
    if name == "two GPUs" and torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    spread = VisCPMChat(golden.weights, device_map=MAPS[name], dtype="float32")
    assert answers(spread, golden) == answers(chat, golden)
    options = {"max_new_tokens": 6}
    plain = chat.ask(golden.image(0), QUESTIONS[0], **options).answer
    assert spread.ask(golden.image(0), QUESTIONS[0], **options).answer == plain


# -------------------------------------------------------------------------------------------------------------- paint


def draw(painter, case):
    return np.stack([np.asarray(image, int) for image in paint_support.drawn(painter, case)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"offload": "model"}, marks=only_on_a_gpu),
        pytest.param({"offload": "sequential"}, marks=only_on_a_gpu),
    ],
    ids=["plain", "model offload", "sequential offload"],
)
def test_golden_pictures(options):
    painter = VisCPMPaint(PAINT / "pytorch_model.bin", device=DEVICE, dtype="float32", **options, **ALONE)
    for case in range(len(CASES)):
        expected = paint_support.expected()[f"{case}.image"] * 255
        assert np.abs(draw(painter, case) - expected.numpy()).max() <= 2


def test_pictures_in_half_precision():
    dtype = "float16" if IS_CUDA else "bfloat16"
    painter = VisCPMPaint(PAINT / "pytorch_model.bin", device=DEVICE, dtype=dtype, **ALONE)
    expected = paint_support.expected()["0.image"] * 255
    assert np.abs(draw(painter, 0) - expected.numpy()).mean() <= 8
