"""Products with packed weights: every way of making them gives the same."""

import functools

import pytest
import torch

from viscpm_hf.modeling import cpp_kernels, packed_linear, row_products
from viscpm_hf.modeling.packed_linear import FEW_ROWS, PACKED_CLASSES, Int8Embedding, PackedConfig, quantize_weight
from viscpm_hf.modeling.row_products import MAX_PACKED_ROWS, row_product, unpack_int4


SHAPES = [(8, 128, 192), (8, 48, 72), (4, 128, 192), (4, 64, 64)]


def layer_of(bits: int, inputs: int, outputs: int, bias: bool = False) -> tuple[torch.nn.Module, torch.Tensor]:
    """A packed layer, and the weight that it stands for."""
    torch.manual_seed(inputs)
    layer = PACKED_CLASSES[bits](inputs, outputs, bias)
    layer.weight.data, layer.scale.data = quantize_weight(torch.randn(outputs, inputs), bits)
    if bias:
        layer.bias.data = torch.randn(outputs)
    return layer, torch.cat(list(layer.unpacked(torch.float32)))


@pytest.fixture
def no_compiler(monkeypatch):
    row_products.kernel.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    yield
    row_products.kernel.cache_clear()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("bits", "inputs", "outputs"), SHAPES)
def test_weights_are_close(bits, inputs, outputs):
    _, unpacked = layer_of(bits, inputs, outputs)
    torch.manual_seed(inputs)
    PACKED_CLASSES[bits](inputs, outputs)
    weight = torch.randn(outputs, inputs)
    assert relative_error(unpacked, weight) <= {8: 0.01, 4: 0.1}[bits]
    packed, scale = quantize_weight(weight.half() / 4, bits, factor=4.0)
    layer = PACKED_CLASSES[bits](inputs, outputs)
    layer.weight.data, layer.scale.data = packed, scale
    assert relative_error(torch.cat(list(layer.unpacked(torch.float32))), weight) <= {8: 0.01, 4: 0.1}[bits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "inputs", "outputs"), SHAPES)
def test_every_number_of_rows(bits, inputs, outputs, dtype):
    layer, weight = layer_of(bits, inputs, outputs, bias=True)
    for rows in (1, 3, FEW_ROWS[bits], FEW_ROWS[bits] + 1, 113):
        hidden = torch.randn(2, rows, inputs)[:1].to(dtype)
        output = layer(hidden)
        assert output.shape == (1, rows, outputs) and output.dtype == dtype
        assert relative_error(output, hidden.float() @ weight.T + layer.bias) <= 0.01
    assert layer(torch.zeros(0, inputs)).shape == (0, outputs)
    assert (layer(torch.zeros(40, inputs)) == layer.bias).all()


@pytest.mark.parametrize(("bits", "inputs", "outputs"), SHAPES[2:])
def test_every_number_of_rows_without_a_compiler(no_compiler, bits, inputs, outputs):
    test_every_number_of_rows(bits, inputs, outputs, torch.bfloat16)
    assert row_products.kernel() is None


@pytest.mark.skipif(not row_products.has_packed_products(row_products.kernel()), reason="needs VNNI, VBMI, a compiler")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (192, 320), (1088, 704)])
@pytest.mark.parametrize(
    ("bits", "rows"), [(bits, rows) for bits in (8, 4) for rows in (1, 2, 3, 7, MAX_PACKED_ROWS[bits])]
)
def test_our_kernel(bits, inputs, outputs, rows):
    """Nearer to the exact product than torch's, also of fp32 rows, and with an outlier."""
    layer, weight = layer_of(bits, inputs, outputs)
    rows = rows or MAX_PACKED_ROWS[bits]
    kind = f"_int{bits}"
    hidden = torch.randn(rows, inputs)
    found = row_product(hidden, layer.weight, layer.scale, kind)
    assert relative_error(found, hidden @ weight.T) <= 2e-4
    # However many rows there are.
    assert torch.equal(found[:1], row_product(hidden[:1], layer.weight, layer.scale, kind))
    hidden[:, 7] *= 500
    assert relative_error(layer(hidden), hidden @ weight.T) <= 1e-3
    half = hidden.bfloat16()
    exact, theirs = half.float() @ weight.T, layer.product_of_few(half)
    ours = row_product(half, layer.weight, layer.scale, kind)
    assert relative_error(ours, exact) <= max(0.003, relative_error(theirs, exact))
    assert relative_error(ours, theirs.float()) <= 0.005


@pytest.mark.skipif(not row_products.has_packed_products(row_products.kernel()), reason="needs VNNI, VBMI, a compiler")
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_none(bits):
    layer, _ = layer_of(bits, 192, 320)
    for rows in (1, 3, 8, MAX_PACKED_ROWS[bits]):
        for value in (torch.nan, torch.inf, -torch.inf):
            hidden = torch.randn(rows, 192)
            usual = row_product(hidden, layer.weight, layer.scale, f"_int{bits}")
            hidden[-1, 5] = value
            found = row_product(hidden, layer.weight, layer.scale, f"_int{bits}")
            assert not found[-1].isfinite().any() and torch.equal(found[:-1], usual[:-1])


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs AMX")
@pytest.mark.skipif(not row_products.has_packed_products(row_products.kernel()), reason="needs VNNI, VBMI, a compiler")
@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_the_same_without_amx(bits, monkeypatch):
    layer, _ = layer_of(bits, 192, 320)
    kind, hidden = f"_int{bits}", torch.randn(MAX_PACKED_ROWS[bits], 192)
    counts = range(1, len(hidden) + 1)
    by_amx = [row_product(hidden[:rows], layer.weight, layer.scale, kind) for rows in counts]
    monkeypatch.setattr(cpp_kernels, "FLAGS", (*cpp_kernels.FLAGS, "-mno-amx-int8"))
    monkeypatch.setattr(row_products, "kernel", functools.cache(row_products.kernel.__wrapped__))
    for rows, found in zip(counts, by_amx, strict=True):
        assert torch.equal(found, row_product(hidden[:rows], layer.weight, layer.scale, kind))


@pytest.mark.skipif(row_products.kernel() is None, reason="needs a compiler")
def test_unpacked_by_the_kernel():
    layer, weight = layer_of(4, 192, 320)
    for first, count in ((0, 320), (64, 64), (128, 192)):
        found = torch.empty(192, count, dtype=torch.bfloat16)
        unpack_int4(layer.weight, layer.scale, first, found)
        torch.testing.assert_close(found.float(), weight[first : first + count].T, rtol=2**-8, atol=1e-6)


def test_an_outlier_among_many_rows_costs_nothing():
    layer, weight = layer_of(8, 128, 192)
    hidden = torch.randn(40, 128)
    hidden[:, 7] *= 500
    assert relative_error(layer(hidden), hidden @ weight.T) <= 0.002


@pytest.mark.parametrize("bits", [8, 4])
def test_without_the_cpus_instructions(bits, monkeypatch):
    layer, weight = layer_of(bits, 128, 192)
    monkeypatch.setattr(packed_linear, "HAS_INT8_PRODUCTS", False)
    monkeypatch.setattr(packed_linear, "has_packed_products", lambda library: False)
    monkeypatch.setitem(FEW_ROWS, bits, 0)
    hidden = torch.randn(5, 128)
    assert relative_error(layer(hidden), hidden @ weight.T) <= 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_of_inputs(bits):
    layer, weight = layer_of(bits, 128, 192)
    hidden = torch.randn(2, 128, requires_grad=True)
    layer(hidden).sum().backward()
    assert relative_error(hidden.grad, weight.sum(0).expand(2, -1)) <= 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_values_of_no_width(bits):
    """Groups and rows of one value."""
    layer = PACKED_CLASSES[bits](64, 64)
    weight = torch.zeros(64, 64)
    weight[1] = 3.0
    layer.weight.data, layer.scale.data = quantize_weight(weight, bits)
    unpacked = torch.cat(list(layer.unpacked(torch.float32)))
    assert (unpacked[0] == 0).all() and torch.allclose(unpacked, weight, rtol=0.01)


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_stay_what_kernels_read_when_a_model_is_cast(bits):
    layer, _ = layer_of(bits, 128, 192)
    hidden = torch.randn(1, 128)
    expected, scale = layer(hidden), layer.scale.clone()
    for dtype in (torch.float16, torch.float64, torch.float32):
        layer.to(dtype)
        assert layer.scale.dtype == torch.bfloat16 and torch.equal(layer.scale, scale)
    assert torch.equal(layer(hidden), expected)
    embedding = Int8Embedding(8, 64, torch.float32).to(torch.bfloat16)
    assert embedding.scale.dtype == embedding(torch.tensor([3])).dtype == torch.bfloat16


def test_other_bits():
    with pytest.raises(ValueError, match="bits is 8 or 4, got 3"):
        PackedConfig(3)
