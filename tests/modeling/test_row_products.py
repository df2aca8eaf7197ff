"""Products of few rows: right in both dtypes, and taken only where they are made for."""

import os

import pytest
import torch
from torch import nn

from viscpm_hf.modeling import row_products
from viscpm_hf.modeling.cpp_kernels import load_library
from viscpm_hf.modeling.huge_pages import put_into_huge_pages
from viscpm_hf.modeling.row_products import RowLinear, use_row_products


def layer(width: int = 96, num_out: int = 37, dtype: torch.dtype = torch.float32, bias: bool = False) -> RowLinear:
    torch.manual_seed(0)
    return RowLinear(width, num_out, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (4,), (), (1, 5)])
@torch.no_grad()
def test_products_are_those_of_linear(dtype, shape):
    linear, given = layer(dtype=dtype), torch.randn(*shape, 96).to(dtype)
    expected = nn.functional.linear(given.double(), linear.weight.double())
    error = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(linear(given).double(), expected, atol=error, rtol=error)
    every_other = torch.randn(*shape, 192).to(dtype)[..., ::2]
    expected = nn.functional.linear(every_other, linear.weight)
    torch.testing.assert_close(linear(every_other), expected, atol=error, rtol=error)


@torch.no_grad()
def test_the_kernel_is_for_what_it_knows_alone(monkeypatch):
    calls = []
    stock = row_products.row_product
    monkeypatch.setattr(row_products, "row_product", lambda *given: calls.append(len(given[0])) or stock(*given))
    row, several, double = torch.randn(1, 96), torch.randn(5, 96), layer().double()
    layer()(row)
    assert calls == [1]
    layer()(several), layer(bias=True)(row), double(row.double()), layer(width=90)(torch.randn(1, 90))
    with torch.enable_grad():
        layer()(row.clone().requires_grad_()).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer()(row).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer()(torch.randn(1, 192))
    assert layer()(row.to("meta")).shape == (1, 37)
    traced = torch.jit.trace(layer(), row, check_trace=False)
    assert calls == [1]
    other = torch.randn(1, 96)
    torch.testing.assert_close(traced(other), layer()(other))


def test_without_a_compiler_the_library_multiplies(monkeypatch, caplog):
    row_products.kernel.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setenv("CXX", "no-such-compiler")
            with torch.no_grad():
                linear, given = layer(), torch.randn(1, 96)
                assert torch.equal(linear(given), nn.functional.linear(given, linear.weight))
    finally:
        row_products.kernel.cache_clear()


def test_a_second_process_finds_the_kernel_on_the_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    row_products.kernel.cache_clear()
    try:
        assert row_products.kernel() is not None
        (file,) = tmp_path.rglob("*.so")
        made = file.stat().st_mtime_ns
        row_products.kernel.cache_clear()
        assert row_products.kernel() is not None and file.stat().st_mtime_ns == made
    finally:
        row_products.kernel.cache_clear()


@pytest.mark.parametrize("home", ["no such", "not writable"])
def test_without_a_folder_to_keep_it_the_kernel_is_made_anew(monkeypatch, tmp_path, home):
    """As in a container of which neither the user nor its home is known."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if home == "no such":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/no_folder")
    monkeypatch.chdir(tmp_path)
    source = 'extern "C" int answer() { return 42; }'
    assert load_library("answer", source).answer() == 42
    assert not list(tmp_path.rglob("*"))


def test_weights_in_huge_pages_are_the_same_and_tied_as_before():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512, bias=False), nn.Linear(1024, 512, bias=False))
    model[2].weight = model[1].weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_row_products(model)
    put_into_huge_pages(dict.fromkeys(model.parameters()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[2].weight is model[1].weight and type(model[0]) is RowLinear
    model[0].weight.data.add_(1)
    assert torch.equal(model[0].weight, before["0.weight"] + 1)
