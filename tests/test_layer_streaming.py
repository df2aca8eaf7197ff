"""Layers that pass through the device: same results, within the budget, fetched ahead. On a CPU, where copies are real
but nothing runs beside them."""

from __future__ import annotations

import weakref

import pytest
import torch
from paint_support import PAINT
from support import Golden
from torch import nn

from viscpm_hf import VisCPMChat, VisCPMPaint
from viscpm_hf.loading.layer_streaming import (
    BUDGET_VARIABLE,
    NUM_SLOTS,
    LayerStreamer,
    layer_budget,
    plan_streaming,
    stream_layers,
)


CPU = torch.device("cpu")


def stack(num_layers: int = 6, width: int = 16) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(num_layers))


def run(layers: nn.ModuleList, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for layer in layers:
            inputs = layer(inputs)
    return inputs


def layer_bytes() -> int:
    """Of one layer of `stack()`, as it lies in a slot."""
    return LayerStreamer(stack(1), CPU, 2**20).plan.resident_bytes


# ----------------------------------------------------------------------------------------------------------- the plan


def test_what_fits_stays():
    plan = plan_streaming([100] * 10, 1000)
    assert (plan.num_resident, plan.slot_bytes, plan.device_bytes) == (10, 0, 1000)


@pytest.mark.parametrize("budget, resident", [(200, 0), (299, 0), (300, 1), (999, 7)])
def test_all_that_the_slots_leave_is_for_resident_layers(budget, resident):
    plan = plan_streaming([100] * 10, budget)
    assert plan.num_resident == resident
    assert plan.device_bytes == 100 * (resident + NUM_SLOTS) <= budget


@pytest.mark.parametrize("empty", [(0,), (3,), (5,), (0, 2, 5)])
def test_layers_without_weights_take_no_turn(empty):
    """As pruning leaves them."""
    layers = stack()
    for index in empty:
        layers[index] = nn.Identity()
    inputs = torch.randn(3, 16)
    expected = run(layers, inputs)
    streamer = LayerStreamer(layers, CPU, NUM_SLOTS * layer_bytes())
    assert len(streamer._layers) == len(layers) - len(empty)
    for _ in range(2):
        assert torch.equal(run(layers, inputs), expected)


def test_a_budget_below_two_layers_says_how_much_it_takes():
    with pytest.raises(ValueError, match=r"CUDA_MEMORY_CPMBEE_MAX allows the layers 199 bytes.*200 bytes"):
        plan_streaming([100] * 10, 199)


# ------------------------------------------------------------------------------------------------------------ running


@pytest.mark.parametrize("num_layers", [2, 3, 5, 6])
@pytest.mark.parametrize("room", [2, 3, 4])
def test_results_are_exact_over_several_passes(num_layers, room):
    layers, inputs = stack(num_layers), torch.randn(3, 16)
    expected = run(layers, inputs)
    streamer = LayerStreamer(layers, CPU, room * layer_bytes())
    assert streamer.plan.device_bytes <= room * layer_bytes()
    for _ in range(3):
        assert torch.equal(run(layers, inputs), expected)


def test_the_next_layers_are_fetched_ahead_beyond_the_end_of_a_pass():
    layers, inputs = stack(6), torch.randn(2, 16)
    streamer = LayerStreamer(layers, CPU, 3 * layer_bytes())  # one stays, five pass through
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen.append(streamer.upcoming))
    assert streamer.upcoming == [1, 2]
    run(layers, inputs)
    run(layers, inputs)
    one_pass = [[1, 2], [2, 3], [3, 4], [4, 5], [5, 1], [1, 2]]
    assert seen == one_pass * 2


def test_between_calls_all_streamed_weights_lie_on_the_host():
    layers, inputs = stack(5), torch.randn(2, 16)
    streamer = LayerStreamer(layers, CPU, 2 * layer_bytes())
    slots = {slot.buffer.untyped_storage().data_ptr() for slot in streamer._slots}
    during = []
    for layer in layers:  # within the call, unlike a hook on the layer itself
        layer[0].register_forward_hook(lambda module, *_: during.append(module.weight.untyped_storage().data_ptr()))
    run(layers, inputs)
    assert set(during) == slots
    assert not slots & {parameter.untyped_storage().data_ptr() for parameter in layers.parameters()}


def test_calls_out_of_order_cost_a_copy_and_nothing_else():
    layers, inputs = stack(6), torch.randn(2, 16)
    expected = [run([layer], inputs) for layer in layers]
    LayerStreamer(layers, CPU, 2 * layer_bytes())
    for index in (3, 3, 0, 5, 1, 2, 4):
        assert torch.equal(run([layers[index]], inputs), expected[index])


def test_a_pass_that_breaks_off_leaves_nothing_behind():
    layers, inputs = stack(5), torch.randn(2, 16)
    expected = run(layers, inputs)
    LayerStreamer(layers, CPU, 2 * layer_bytes())
    with pytest.raises(RuntimeError):
        run(layers[:3], torch.randn(2, 7))
    assert torch.equal(run(layers, inputs), expected)


def test_training_is_refused():
    layers = stack(4)
    LayerStreamer(layers, CPU, 2 * layer_bytes())
    with pytest.raises(RuntimeError, match="can't be trained"):
        layers[0](torch.randn(2, 16, requires_grad=True))


def test_it_lives_as_long_as_its_layers():
    layers = stack(4)
    streamer = weakref.ref(LayerStreamer(layers, CPU, 2 * layer_bytes()))
    assert streamer() is not None
    del layers
    import gc

    gc.collect()
    assert streamer() is None


def test_weights_of_several_dtypes_and_a_shared_one():
    layers = stack(5).to(torch.bfloat16)
    for layer in layers:
        layer[1].float()
        layer.register_buffer("offset", torch.arange(16))
        layer[0].register_parameter("again", layer[0].weight)
    expected = [{name: tensor.clone() for name, tensor in layer.state_dict().items()} for layer in layers]
    LayerStreamer(layers, CPU, 2 * layer_bytes())
    for layer, before in zip(layers, expected, strict=True):
        assert layer[0].again is layer[0].weight
        for name, tensor in layer.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])


# ---------------------------------------------------------------------------------------------------- quantised layers


@pytest.mark.parametrize("num_resident", [0, 2])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantised_layers_move_with_all_that_belongs_to_them(kind, num_resident):
    bnb = pytest.importorskip("bitsandbytes")
    layers, again = nn.ModuleList(), nn.ModuleList()
    for index in range(10):
        torch.manual_seed(index % 5)
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(
                64, 64, bias=False, quant_type=kind, compress_statistics=True, compute_dtype=torch.float32
            )
            layer.support_avx512bf16_for_cpu = False  # a layout of CPUs alone, which the first call would change to
        (layers if index < 5 else again).append(nn.Sequential(layer).to("cpu").eval())
    inputs = torch.randn(2, 64)
    expected = run(again, inputs)
    size = LayerStreamer(nn.ModuleList([again[0]]), CPU, 2**20).plan.resident_bytes
    assert size < 64 * 64 * 2  # quantised it is
    streamer = LayerStreamer(layers, CPU, (2 + num_resident) * size)  # as loaded, without any call before
    assert streamer.plan.num_resident == num_resident
    for _ in range(2):
        assert torch.equal(run(layers, inputs), expected)


def test_weights_that_are_more_than_their_data_are_refused():
    class Quantised(nn.Parameter):
        pass

    layers = stack(4)
    layers[2][0].weight = Quantised(layers[2][0].weight.data)
    with pytest.raises(ValueError, match="can't stream weights of Quantised"):
        LayerStreamer(layers, CPU, 2**20)


# -------------------------------------------------------------------------------------------------------- whole models


def test_a_streamed_chat_answers_the_same(golden: Golden, chat: VisCPMChat):
    options = {"max_new_tokens": 6}
    expected = chat.ask(golden.image(0), "这是什么？", **options)
    streamed = golden.load_chat()
    layers = streamed.model.language_model().layers
    size = sum(parameter.nbytes for parameter in layers[0].parameters())
    stream_layers(streamed.model, CPU, round(2.2 * size))
    turn = streamed.ask(golden.image(0), "这是什么？", **options)
    assert turn.answer == expected.answer
    assert torch.equal(turn.vision_hidden_states, expected.vision_hidden_states)
    generate = {"mode": "generate", "max_new_tokens": 6}
    assert (
        streamed.ask(golden.image(0), "What?", **generate).answer
        == chat.ask(golden.image(0), "What?", **generate).answer
    )


def test_a_streamed_text_encoder_encodes_the_same():
    painter = VisCPMPaint(
        PAINT / "pytorch_model.bin", False, False, False, config_path=PAINT / "cpm-bee.json", device="cpu"
    )
    expected = painter.pipeline.encode_prompt("一只猫")
    layers = painter.pipeline.text_encoder.model.layers
    size = sum(parameter.nbytes for parameter in layers[0].parameters())
    stream_layers(painter.pipeline.text_encoder, CPU, round(2.2 * size))
    for embeds, known in zip(painter.pipeline.encode_prompt("一只猫"), expected, strict=True):
        assert torch.equal(embeds, known)


# -------------------------------------------------------------------------------------------------------- the variable


@pytest.mark.parametrize(
    "text, size", [("1g", 2**30), ("500m", 500 * 2**20), ("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("1000000", 10**6)]
)
def test_sizes_of_the_variable(monkeypatch, text, size):
    monkeypatch.setenv(BUDGET_VARIABLE, text)
    assert layer_budget(torch.device("cuda")) == size


@pytest.mark.parametrize("text", ["a lot", "-1g", "1 t", "g"])
def test_a_variable_that_is_no_size(monkeypatch, text, golden):
    monkeypatch.setenv(BUDGET_VARIABLE, text)
    with pytest.raises(ValueError, match="CUDA_MEMORY_CPMBEE_MAX is a number of bytes, or as 1g"):
        golden.load_chat()


def test_without_a_gpu_the_variable_is_ignored_and_says_so(monkeypatch, golden, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    monkeypatch.setenv(BUDGET_VARIABLE, "1g")
    chat = golden.load_chat()
    logging.disable_propagation()
    assert "CUDA_MEMORY_CPMBEE_MAX is ignored" in caplog.text
    assert chat.options.layer_budget is None
