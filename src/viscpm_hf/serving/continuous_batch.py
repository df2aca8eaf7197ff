"""Rows of different requests, decoded together: they join and leave between any two steps.

A row's prompt is read in one piece when it joins, together with those of the others that join at that moment; what all
rows share from then on is the model's [`RowState`].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..modeling.chat_processing import AnswerText, ChatProcessing, Prompt
from ..modeling.continuous_rows import RowState
from .sampling import Sampler, choose_tokens


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    prompt: Prompt
    sampler: Sampler
    text: AnswerText
    image: torch.Tensor | None = None
    """Encoded views of the prompt's images, `(views, queries, hidden)`."""

    @property
    def answer(self) -> list[int]:
        """Tokens so far."""
        return self.sampler.chosen

    @property
    def max_length(self) -> int:
        """Places of the cache that it may come to take."""
        return len(self.prompt) + self.sampler.settings.max_new_tokens


class ContinuousBatch:
    """Decodes rows together, one token of each in a step."""

    def __init__(self, model, processor: ChatProcessing):
        self.model = model
        self.processor = processor
        self.rows: list[Row] = []
        self._state: RowState | None = None

    def join(self, rows: Sequence[Row]) -> list[int]:
        """Reads the prompts of new rows (with what they have of an answer) and adds them; returns their next tokens.

        If this raises, the batch is as it was.
        """
        prompts = [self.processor.with_answer(row.prompt, row.answer) if row.answer else row.prompt for row in rows]
        inputs = self.processor.pad_prompts(prompts, [row.image for row in rows], self.model)
        joining, logits = self.model.read_rows(inputs)
        state = joining if self._state is None else self._state.joined_by(joining)
        tokens = choose_tokens(logits, [row.sampler for row in rows])
        self._state, self.rows = state, [*self.rows, *rows]
        return tokens

    def step(self) -> list[int]:
        """The next token of every row. If this raises, [`clear`] the batch and let the rows join again."""
        logits = self.model.step_rows(self._state, [row.answer[-1] for row in self.rows])
        return choose_tokens(logits, [row.sampler for row in self.rows])

    def keep(self, rows: Sequence[Row]) -> None:
        """Lets all other rows leave."""
        wanted = set(rows)
        places = [place for place, row in enumerate(self.rows) if row in wanted]
        if not places:
            self.clear()
        elif len(places) < len(self.rows):
            self._state, self.rows = self._state.select(places), [self.rows[place] for place in places]

    def clear(self) -> None:
        self.rows, self._state = [], None
