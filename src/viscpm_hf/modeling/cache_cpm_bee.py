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

    def _owns(self, states: torch.Tensor, buffer: torch.Tensor) -> bool:
        """Whether `states` are still the view of `buffer` (and not re-ordered, cropped-and-cloned or moved)."""
        return states.data_ptr() == buffer.data_ptr() and states.shape[:2] == buffer.shape[:2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        updated = []
        for index, (states, new) in enumerate(((self.keys, key_states), (self.values, value_states))):
            buffer = None if self._buffers is None else self._buffers[index]
            if buffer is None or not self._owns(states, buffer) or length > buffer.shape[-2]:
                buffer = new.new_empty(*new.shape[:2], length + GROWTH, new.shape[-1])
                if past:
                    buffer[:, :, :past] = states
            buffer[:, :, past:length] = new
            updated.append(buffer)
        self._buffers = (updated[0], updated[1])
        self.keys, self.values = (buffer[:, :, :length] for buffer in updated)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._buffers = None


class CpmBeeCache(DynamicCache):
    """A `DynamicCache` of growing layers."""

    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer
