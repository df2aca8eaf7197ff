"""Rows of different requests to a sibling, decoded together: they join and leave between any two steps.

All rows share one cache that is padded on the left, as in [`ContinuousBatch`]; the language models are ordinary causal
ones, so keys, values and which places are padding are all there is to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from ..chat.sibling_chat import AnswerText, model_inputs
from ..modeling.processing_vision_resampler import VisionResamplerProcessor
from .sampling import Sampler, choose_tokens


@dataclass(eq=False)
class SiblingRow:
    """One answer in the making."""

    prompt: list[int]
    sampler: Sampler
    text: AnswerText
    image: torch.Tensor | None = None
    """Encoded views of the prompt's images, `(views, queries, hidden)`."""
    answer: list[int] = field(default_factory=list)

    @property
    def max_length(self) -> int:
        """Places of the cache that it may come to take."""
        return len(self.prompt) + self.sampler.settings.max_new_tokens


@dataclass
class _State:
    """What the rows' next step needs; every tensor has the rows first."""

    cache: DynamicCache
    tokens: torch.Tensor
    """`(rows, 1)`, chosen but not yet read."""
    visible: torch.Tensor
    """`(rows, places)`: 0 for padding."""


def _changed_cache(cache: DynamicCache, change: Callable[[torch.Tensor, int], torch.Tensor]) -> DynamicCache:
    changed = DynamicCache()
    for index, layer in enumerate(cache.layers):
        changed.update(change(layer.keys, index), change(layer.values, index), index)
    return changed


class SiblingBatch:
    """As [`ContinuousBatch`], for a [`VisionResamplerForConditionalGeneration`]."""

    def __init__(self, model, processor: VisionResamplerProcessor):
        self.model = model
        self.processor = processor
        self.rows: list[SiblingRow] = []
        self._state: _State | None = None

    @torch.no_grad()
    def join(self, rows: Sequence[SiblingRow]) -> list[int]:
        """Reads the prompts of new rows (with what they have of an answer) and adds them; returns their next tokens.

        If this raises, the batch is as it was.
        """
        prompts = [[*row.prompt, *row.answer] for row in rows]
        inputs = model_inputs(self.model, self.processor, prompts, [row.image for row in rows])
        visible, cache = inputs["attention_mask"], DynamicCache()
        logits = self._logits(position_ids=(visible.cumsum(-1) - 1).clamp(min=0), cache=cache, **inputs)
        tokens = choose_tokens(logits, [row.sampler for row in rows])
        joining = _State(cache, tokens[:, None].to(self.model.device), visible)
        self._state = joining if self._state is None else self._together(self._state, joining)
        self.rows = [*self.rows, *rows]
        return self._record(rows, tokens)

    @torch.no_grad()
    def step(self) -> list[int]:
        """The next token of every row. If this raises, [`clear`] the batch and let the rows join again."""
        state = self._state
        state.visible = torch.cat([state.visible, state.visible.new_ones(len(self.rows), 1)], dim=1)
        logits = self._logits(
            input_ids=state.tokens,
            attention_mask=state.visible,
            position_ids=state.visible.sum(-1, keepdim=True) - 1,
            cache=state.cache,
        )
        tokens = choose_tokens(logits, [row.sampler for row in self.rows])
        state.tokens = tokens[:, None].to(state.tokens.device)
        return self._record(self.rows, tokens)

    def keep(self, rows: Sequence[SiblingRow]) -> None:
        """Lets all other rows leave, and the places on the left that all the rest leave empty."""
        wanted = set(rows)
        places = [place for place, row in enumerate(self.rows) if row in wanted]
        if len(places) == len(self.rows):
            return
        if not places:
            self.clear()
            return
        state = self._state
        index = torch.tensor(places, device=state.visible.device)
        visible = state.visible[index]
        begin = int(visible.any(0).int().argmax())
        cache = _changed_cache(state.cache, lambda states, _: states[index.to(states.device), :, begin:])
        self._state = _State(cache, state.tokens[index], visible[:, begin:])
        self.rows = [self.rows[place] for place in places]

    def clear(self) -> None:
        self.rows, self._state = [], None

    def _logits(self, **inputs) -> torch.Tensor:
        """Of the last place, `(rows, vocabulary)` in fp32."""
        return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def _together(self, state: _State, other: _State) -> _State:
        places = max(state.visible.shape[1], other.visible.shape[1])

        def joined(states: torch.Tensor, index: int, name: str) -> torch.Tensor:
            pair = (states, getattr(other.cache.layers[index], name))
            return torch.cat([pad(part, (0, 0, places - part.shape[-2], 0)) for part in pair])

        cache = DynamicCache()
        for index, layer in enumerate(state.cache.layers):
            cache.update(joined(layer.keys, index, "keys"), joined(layer.values, index, "values"), index)
        visible = torch.cat([pad(part.visible, (places - part.visible.shape[1], 0)) for part in (state, other)])
        return _State(cache, torch.cat([state.tokens, other.tokens]), visible)

    def _record(self, rows: Sequence[SiblingRow], tokens: torch.Tensor) -> list[int]:
        chosen = tokens.tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.answer.append(token)
            row.sampler.seen.append(token)
        return chosen
