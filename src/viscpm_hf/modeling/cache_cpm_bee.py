"""A key/value cache that grows without copying itself at every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


# Room for this many tokens more is made whenever the room runs out.
GROWTH = 256


class _States:
    """Keys or values of a [`GrowingLayer`]: a view of its buffer that is made when somebody looks."""

    def __init__(self, index: int):
        self.index = index

    def __get__(self, layer: GrowingLayer | None, owner: type | None = None) -> Any:
        if layer is None:
            return self
        states, length = layer._states[self.index], layer._length
        if length is not None and states.shape[-2] != length:
            states = layer._states[self.index] = layer._buffers[self.index].narrow(-2, 0, length)
        return states

    def __set__(self, layer: GrowingLayer, states: torch.Tensor | None) -> None:
        layer._states = [layer.keys, layer.values]
        layer._states[self.index] = states
        layer._length = None


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` with spare room: `keys` and `values` are views of larger buffers, written in place.

    Concatenation copies the whole cache for every token, which for long answers costs more than the attention itself.
    """

    keys, values = _States(0), _States(1)

    def __init__(self, **kwargs):
        self._states: list[torch.Tensor | None] = [None, None]
        self._buffers: list[torch.Tensor | None] = [None, None]
        # Places of the buffers that are taken; None if keys and values may be other tensors than views of them.
        self._length: int | None = None
        self._numbers: list[int] = []
        super().__init__()

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self._length is None else self._length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        past = self.make_room(count, key_states, value_states)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.narrow(-2, past, count).copy_(new)
        return self.keys, self.values

    def make_room(self, count: int, keys_like: torch.Tensor, values_like: torch.Tensor) -> int:
        """Takes places for so many new keys and values, which are still to be written; returns how many there were."""
        past = self.get_seq_length()
        if self._length is None or past + count > self._buffers[0].shape[-2]:
            rows = zip(self._buffers, (self.keys, self.values), (keys_like, values_like), strict=True)
            self._buffers = [with_room(*it, past, past + count) for it in rows]
            self._states = [buffer.narrow(-2, 0, past) for buffer in self._buffers]
            self._numbers = places_of(*self._buffers)
        self._length = past + count
        return past

    def reset(self) -> None:
        super().reset()
        self._buffers = [None, None]

    def __getstate__(self) -> dict[str, Any]:
        # A copy's first update makes buffers of its own: these places are the original's.
        own = {"_states": [self.keys, self.values], "_buffers": [None, None], "_length": None, "_numbers": []}
        return self.__dict__ | own


def with_room(
    buffer: torch.Tensor | None, states: torch.Tensor, like: torch.Tensor, past: int, length: int
) -> torch.Tensor:
    """A buffer with the `past` places of `states` and room for `length` in all: the given one if it will do."""
    # Re-ordering, repeating or moving the cache replaces `states` by a tensor of its own; cropping doesn't.
    if (
        buffer is None
        or length > buffer.shape[-2]
        or states.data_ptr() != buffer.data_ptr()
        or states.shape[:2] != buffer.shape[:2]
    ):
        buffer = like.new_empty(*like.shape[:-2], length + GROWTH, like.shape[-1])
        if past:
            buffer.narrow(-2, 0, past).copy_(states)
    return buffer


def places_of(keys: torch.Tensor, values: torch.Tensor) -> list[int]:
    """Where keys and values `(batch, heads, places, head_dim)` of one layer lie, as `layer_steps_cpm_bee` wants it."""
    return [keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], *values.stride()[:3]]


class CpmBeeCache(DynamicCache):
    """A `DynamicCache` of growing layers."""

    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer

    def open_places(
        self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, most: int
    ) -> tuple[int, list[int]] | None:
        """Makes room for keys and values of new tokens in all layers, which the caller writes.

        Args:
            layers: how many have attention.
            shape: `(batch, heads, tokens, head_dim)` of the new keys, and of the new values.
            dtype: of all keys and values.
            most: places that there may be then.

        Returns:
            How many places there were, and [`places_of`] all layers; None, and nothing changes, where there are no
            keys and values yet, or others than these go with, or too many.
        """
        batch, heads, count, size = shape
        if len(self.layers) != layers or not all(
            type(layer) is GrowingLayer
            and layer.is_initialized
            and all(
                (*states.shape[:2], states.shape[3], states.dtype) == (batch, heads, size, dtype)
                for states in layer._states
            )
            for layer in self.layers
        ):
            return None
        past = self.layers[0].get_seq_length()
        if past + count > most or any(layer.get_seq_length() != past for layer in self.layers):
            return None
        places = []
        for layer in self.layers:
            layer.make_room(count, *layer._states)
            places += layer._numbers
        return past, places
