"""Rows that are decoded together although they came at different times, as servers have them.

All of them share one cache that is padded on the left. What a row carries beside its keys and values, the model
says: CPM-Bee's segments, their relations and the extension table; nothing for ordinary language models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from .cache_cpm_bee import CpmBeeCache


@dataclass
class RowState:
    """What the rows' next step needs; every tensor has the rows first."""

    cache: CpmBeeCache
    places: dict[str, torch.Tensor]
    """`(rows, places)` each, one value for each place of the cache; `attention_mask` is among them."""
    tables: dict[str, torch.Tensor]
    """`(rows, ...)` each, whatever the number of places; filled up with zeros at the end of every axis."""
    kept: Any = None
    """What the model has worked out of the tables, for as long as the rows are the same."""

    @property
    def visible(self) -> torch.Tensor:
        """`(rows, places)`: False for padding."""
        return self.places["attention_mask"]

    def grow(self) -> None:
        """Makes room for one token more in every row, which is of the kind of the last."""
        self.places = {name: torch.cat([values, values[:, -1:]], dim=1) for name, values in self.places.items()}

    def select(self, rows: Sequence[int]) -> RowState:
        """These rows, without the places on the left that all of them leave empty."""
        index = torch.tensor(rows, device=self.visible.device)
        begin = int(self.visible[index].any(0).int().argmax())
        return RowState(
            self._changed_cache(lambda states: states[index.to(states.device), :, begin:]),
            {name: values[index, begin:] for name, values in self.places.items()},
            {name: values[index] for name, values in self.tables.items()},
        )

    def joined_by(self, other: RowState) -> RowState:
        """The rows of both."""
        length = max(self.visible.shape[1], other.visible.shape[1])
        theirs = iter([states for layer in other.cache.layers for states in (layer.keys, layer.values)])

        def joined(states: torch.Tensor) -> torch.Tensor:
            return torch.cat([pad(part, (0, 0, length - part.shape[-2], 0)) for part in (states, next(theirs))])

        return RowState(
            self._changed_cache(joined),
            {
                name: torch.cat([pad(part, (length - part.shape[1], 0)) for part in (values, other.places[name])])
                for name, values in self.places.items()
            },
            {name: _together(values, other.tables[name]) for name, values in self.tables.items()},
        )

    def _changed_cache(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CpmBeeCache:
        """With other keys and values, asked for in the order of the layers, keys first."""
        changed = CpmBeeCache()
        for index, layer in enumerate(self.cache.layers):
            changed.update(change(layer.keys), change(layer.values), index)
        return changed


def _together(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The rows of both, each axis as long as the longer one's."""
    shape = [max(sizes) for sizes in zip(first.shape[1:], second.shape[1:], strict=True)]
    filled = []
    for part in (first, second):
        missing = [size - own for size, own in zip(shape, part.shape[1:], strict=True)]
        filled.append(pad(part, [width for size in reversed(missing) for width in (0, size)]))
    return torch.cat(filled)


class ContinuousRowsMixin:
    """Reading prompts and decoding rows step by step, for models whose `forward` takes a cache."""

    row_places: tuple[str, ...] = ("attention_mask",)
    """Arguments of `forward` with a value for each place of the cache; those of the next token are the last one's."""
    row_tables: tuple[str, ...] = ()
    """Arguments of `forward` that a row keeps as they are."""

    @torch.no_grad()
    def read_rows(self, inputs: Mapping[str, Any]) -> tuple[RowState, torch.Tensor]:
        """Reads prompts.

        Args:
            inputs: of `forward`, padded on the left, on the model's device.

        Returns:
            The rows, and the logits of their next tokens `(rows, vocab_size)` in fp32.
        """
        places, tables = ({name: inputs[name] for name in names} for names in (self.row_places, self.row_tables))
        state = RowState(CpmBeeCache(), {**places, "attention_mask": places["attention_mask"].bool()}, tables)
        return state, self._row_logits(state, inputs)

    @torch.no_grad()
    def step_rows(self, state: RowState, tokens: Sequence[int]) -> torch.Tensor:
        """Reads the next token of every row; returns the logits of those after it, `(rows, vocab_size)` in fp32."""
        state.grow()
        ids = torch.tensor(tokens, device=state.visible.device)[:, None]
        return self._row_logits(state, {"input_ids": ids, **state.places, **state.tables})

    def row_positions(self, state: RowState, count: int) -> dict[str, torch.Tensor]:
        """What tells `forward` where the last `count` places stand in their rows."""
        return {"position_ids": (state.visible.cumsum(-1) - 1).clamp(min=0)[:, -count:]}

    def row_logits(self, state: RowState, logits: torch.Tensor) -> torch.Tensor:
        """`(rows, vocab_size)` in fp32 without what a row can't have; in place."""
        return logits

    def _row_logits(self, state: RowState, inputs: Mapping[str, Any]) -> torch.Tensor:
        positions = self.row_positions(state, inputs["input_ids"].shape[1])
        outputs = self(**inputs, **positions, cache=state.cache, use_cache=True, logits_to_keep=1)
        return self.row_logits(state, outputs.logits[:, -1].float())


__all__ = ["ContinuousRowsMixin", "RowState"]
