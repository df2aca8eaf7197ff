"""Our quantisation on the CPU against bitsandbytes' own."""

import copy

import bitsandbytes.functional as bnb
import pytest
import torch

from viscpm_hf.loading import bitsandbytes_cpu
from viscpm_hf.loading.bitsandbytes_cpu import pack, quantize, quantize_blocks, quantize_rows


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32])
def weight(request):
    """With a last piece that is shorter than the others, a row of zeros and one big value."""
    weight = torch.randn(150, 128) * 0.02
    weight[3] = 0
    weight[5, 7] = 3
    return weight.to(request.param)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(bitsandbytes_cpu, "PIECE_VALUES", 4096)


def test_rows(weight):
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = quantize_rows(weight, values)
    expected, expected_scales, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(scales, expected_scales) or weight.dtype == torch.float32
    nonzero = expected_scales > 0  # bitsandbytes divides by zero
    assert (values[nonzero] != expected[nonzero]).float().mean() <= (0.02 if weight.dtype == torch.float32 else 0)
    assert (values[~nonzero] == 0).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_blocks(weight, quant_type):
    packed = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8)
    absmax = quantize_blocks(weight, packed, quant_type)
    expected, state = bnb.quantize_4bit(weight, quant_type=quant_type, blocksize=64)
    assert torch.equal(absmax, state.absmax)
    scales = absmax.repeat_interleave(64)
    scaled = weight.flatten()[scales > 0].float() / scales[scales > 0]
    ours, theirs = ((_values_of_codes(it, quant_type)[scales > 0] - scaled).abs() for it in (packed, expected))
    assert (ours - theirs).abs().max() < 1.01 / bitsandbytes_cpu.CELLS
    state.absmax = absmax
    ours, theirs = bnb.dequantize_4bit(packed, state).float(), bnb.dequantize_4bit(expected, state).float()
    before = weight.float()
    assert ((ours - before) ** 2).mean() <= ((theirs - before) ** 2).mean() * 1.001


def _values_of_codes(packed, quant_type):
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()
    return bnb.get_4bit_type(quant_type, device="cpu")[codes.int()]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_packing_is_bitsandbytes_own(quant_type, double_quant):
    weight = torch.randn(96, 192)
    codes, state = bnb.quantize_4bit(weight, quant_type=quant_type, blocksize=64, compress_statistics=double_quant)
    packed, packed_state = pack(codes, state)
    assert state.nested == double_quant and not hasattr(state, "packing_format_for_cpu")  # untouched
    before = codes.clone()
    expected, expected_state = bnb._convert_weight_packed_for_cpu(codes, copy.copy(state))
    assert torch.equal(packed, expected) and torch.equal(codes, before)
    assert torch.equal(packed_state.absmax, expected_state.absmax)
    fields = ("dtype", "nested", "shape", "blocksize", "quant_type", "packing_format_for_cpu", "original_dtype")
    for name in (*fields, "original_nested", "original_qshape"):
        assert getattr(packed_state, name) == getattr(expected_state, name), name
    back, _ = bnb._convert_weight_packed_for_cpu_inverse(packed, packed_state)
    assert torch.equal(back, codes)


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_is_saved_of_4_bits(double_quant):
    weight = torch.randn(64, 128)
    state_dict = quantize({"layer.weight": (weight, 0.5)}, bits=4, dtype=torch.float32, double_quant=double_quant)
    reference, state = bnb.quantize_4bit(weight * 0.5, quant_type="nf4", compress_statistics=double_quant)
    names = {f"layer.weight.{name}" for name in state.as_dict(packed=True)}
    assert state_dict.keys() == {"layer.weight", *names}
    parts = {name.removeprefix("layer.weight."): value for name, value in state_dict.items() if name in names}
    own = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    values, expected = bnb.dequantize_4bit(state_dict["layer.weight"], own), bnb.dequantize_4bit(reference, state)
    assert (values - expected).abs().mean() < 1e-3 * expected.abs().mean()


def test_what_is_saved_of_8_bits():
    weight = torch.randn(64, 48)
    state_dict = quantize({"layer.weight": (weight, 0.5)}, bits=8, dtype=torch.float32)
    assert state_dict.keys() == {"layer.weight", "layer.SCB", "layer.weight_format"}
    values = state_dict["layer.weight"] * state_dict["layer.SCB"].unsqueeze(1) / 127
    assert (values - weight * 0.5).abs().max() <= state_dict["layer.SCB"].max() / 254 * 1.001
