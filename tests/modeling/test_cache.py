"""The growing cache against transformers' own dynamic one."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from viscpm_hf.modeling import cache_cpm_bee
from viscpm_hf.modeling.cache_cpm_bee import CpmBeeCache, GrowingLayer


@pytest.fixture(autouse=True)
def _grows_often(monkeypatch):
    monkeypatch.setattr(cache_cpm_bee, "GROWTH", 3)


def states(count: int, batch: int = 2, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4, count, 8, **kwargs), torch.randn(batch, 4, count, 8, **kwargs)


def update(layers, count: int, batch: int = 2) -> None:
    new = states(count, batch)
    for keys, values in [layer.update(*new) for layer in layers]:
        assert keys.shape == values.shape


def assert_same(layers) -> None:
    growing, dynamic = layers
    assert growing.get_seq_length() == dynamic.get_seq_length()
    torch.testing.assert_close(growing.keys, dynamic.keys, rtol=0, atol=0)
    torch.testing.assert_close(growing.values, dynamic.values, rtol=0, atol=0)


CHANGES = {
    "nothing": lambda layer: None,
    "crop": lambda layer: layer.crop(-3),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(3),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_is_a_dynamic_layer(first, second):
    layers = (GrowingLayer(), DynamicLayer())
    update(layers, 7)
    for change in (CHANGES[first], CHANGES[second]):
        for layer in layers:
            change(layer)
        batch = layers[1].keys.shape[0] if layers[1].get_seq_length() else 2
        for count in (1, 1, 4, 1, 1):
            update(layers, count, batch)
            assert_same(layers)


def test_earlier_views_keep_what_they_show():
    layer = GrowingLayer()
    views, copies = [], []
    for count in (5, 1, 1, 1, 1, 6, 1):
        keys, values = layer.update(*states(count))
        views += [keys, values]
        copies += [keys.clone(), values.clone()]
    for view, before in zip(views, copies, strict=True):
        torch.testing.assert_close(view, before, rtol=0, atol=0)


def test_most_steps_copy_nothing(monkeypatch):
    monkeypatch.setattr(cache_cpm_bee, "GROWTH", 100)
    layer = GrowingLayer()
    begin = layer.update(*states(5))[0].data_ptr()
    assert {layer.update(*states(1))[0].data_ptr() for _ in range(100)} == {begin}
    assert layer.update(*states(1))[0].data_ptr() != begin


def test_a_deep_copy_is_a_cache_of_its_own():
    cache = CpmBeeCache()
    cache.update(*states(5), 0)
    twin = copy.deepcopy(cache)
    before = cache.layers[0].keys.clone()
    twin.update(*states(2), 0)
    cache.update(*states(1), 0)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (6, 7)
    torch.testing.assert_close(cache.layers[0].keys[:, :, :5], before, rtol=0, atol=0)
    torch.testing.assert_close(twin.layers[0].keys[:, :, :5], before, rtol=0, atol=0)


def test_gradients_flow_through():
    layer = GrowingLayer()
    first, second = states(3, requires_grad=True), states(2, requires_grad=True)
    layer.update(*first)
    keys, values = layer.update(*second)
    (keys.sum() + values.sum()).backward()
    assert all(tensor.grad is not None and tensor.grad.eq(1).all() for tensor in (*first, *second))
