"""A key/value cache that grows without copying itself at every token."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


# Room for this many tokens more is made whenever the room runs out.
GROWTH = 256


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` with spare room: `keys` and `values` are views of larger buffers, written in place.

    Concatenation copies the whole cache for every token, which for long answers costs more than the attention itself.
    """

    def __init__(self, **kwargs):
        super().__init__()
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        key_buffer, value_buffer = self._buffers or (None, None)
        key_buffer, self.keys = append(key_buffer, self.keys, past, key_states)
        value_buffer, self.values = append(value_buffer, self.values, past, value_states)
        self._buffers = (key_buffer, value_buffer)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._buffers = None


def append(
    buffer: torch.Tensor | None, states: torch.Tensor, past: int, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes `new` behind the `past` places of `states`; returns the buffer and the longer view of it."""
    count = new.shape[-2]
    length = past + count
    # Re-ordering, repeating or moving the cache replaces `states` by a tensor of its own; cropping doesn't.
    if (
        buffer is None
        or length > buffer.shape[-2]
        or states.data_ptr() != buffer.data_ptr()
        or states.shape[:2] != buffer.shape[:2]
    ):
        buffer = new.new_empty(*new.shape[:-2], length + GROWTH, new.shape[-1])
        if past:
            buffer.narrow(-2, 0, past).copy_(states)
    buffer.narrow(-2, past, count).copy_(new)
    return buffer, buffer.narrow(-2, 0, length)


class CpmBeeCache(DynamicCache):
    """A `DynamicCache` of growing layers."""

    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
