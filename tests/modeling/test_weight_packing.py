"""The kernel that packs weights makes what torch's operations make, to the bit."""

import pytest
import torch

from viscpm_hf.modeling import cpp_kernels, weight_packing
from viscpm_hf.modeling.weight_packing import quantize_into, quantize_weight


SIZES = {8: [(1, 1), (50, 77), (65, 16), (128, 192)], 4: [(64, 64), (128, 192)]}


def by_torch(monkeypatch, *arguments) -> tuple[torch.Tensor, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(weight_packing, "kernel", lambda: None)
        return quantize_weight(*arguments)


def odd_weights(outputs: int, inputs: int, spread: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random numbers with a row of zeros, groups of zeros and of one sign, and the same with infinities and NaN."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs)) * spread
    weight[0] = 0
    if outputs > 3:
        weight[1, : inputs // 2] = -0.0
        weight[2].abs_()
        weight[3, ::3] = 0.0
    found = [weight.to(dtype)]
    for value in (float("inf"), float("nan")):
        found.append(found[0].clone())
        found[-1][outputs // 2, inputs // 2], found[-1][-1, 0] = value, -value
    return found


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=["of this machine", "of any machine"])
def compiled(request, monkeypatch):
    """The kernel as compiled with this CPU's instructions, and without."""
    if request.param == "of any machine":
        flags = tuple(flag for flag in cpp_kernels.FLAGS if flag != "-march=native")
        monkeypatch.setattr(cpp_kernels, "FLAGS", flags)
    weight_packing.kernel.cache_clear()
    if weight_packing.kernel() is None:
        pytest.skip("needs a compiler")
    yield
    weight_packing.kernel.cache_clear()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_are_torchs(compiled, monkeypatch, bits):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for outputs, inputs in SIZES[bits]:
            for spread in (0.02, 100, 1e-6, 1e-30):  # down to the smallest numbers of fp16 and beyond
                for weight in odd_weights(outputs, inputs, spread, dtype):
                    for factor in (1.0, 64**-0.5, 0.3):
                        arguments = weight, bits, factor
                        assert_same(quantize_weight(*arguments), by_torch(monkeypatch, *arguments))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_lie_otherwise_are_packed_too(monkeypatch, bits):
    whole = torch.randn(128, 256)
    for weight in (whole[:64, 64:192], whole[::2, :64], whole.T, whole.double(), whole[:64].to(torch.int32)):
        assert_same(quantize_weight(weight, bits), by_torch(monkeypatch, weight.float().contiguous(), bits))


def test_codes_of_another_size_are_refused():
    packed, scale = quantize_weight(torch.zeros(64, 128), 8)
    for rows, columns in ((65, 128), (64, 192)):
        with pytest.raises(ValueError, match=f"{rows} x {columns} doesn't fit into 8-bit codes of 64 x 128"):
            quantize_into(torch.zeros(rows, columns), packed, scale)


def test_sizes_that_four_bits_cannot_have_are_refused():
    with pytest.raises(ValueError, match="multiples of 64 inputs and 64 outputs, not 96 and 64"):
        quantize_weight(torch.zeros(64, 96), 4)


def test_a_kernel_that_does_not_compile_is_told_of_and_done_without(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(weight_packing, "SOURCE", "no C++")
    weight_packing.kernel.cache_clear()
    try:
        codes, scale = quantize_weight(torch.ones(64, 64), 8)
        assert (codes == 126).logical_or(codes == 127).all() and scale.shape == (64,)
        quantize_weight(torch.ones(64, 64), 8)
        assert caplog.text.count("The CPU goes without our own kernel `weight_packing`") == 1
    finally:
        weight_packing.kernel.cache_clear()
