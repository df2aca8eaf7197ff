"""How models that chat answer padded prompts, whichever family they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch


class Decoding(Protocol):
    """How answers are decoded."""

    streaming_condition: ClassVar[str]
    """What it takes for [`can_stream`]."""

    @property
    def num_beams(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def last_step(self) -> int:
        """The number of the last step there may be."""

    @property
    def can_stream(self) -> bool:
        """Whether tokens are known as they come."""


@dataclass(frozen=True)
class GenerateDecoding:
    """Decoding by `generate`."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Its arguments."""
    streaming_condition: ClassVar[str] = "num_beams=1"

    @property
    def num_beams(self) -> int:
        return self.options.get("num_beams") or 1

    @property
    def max_new_tokens(self) -> int:
        return self.options["max_new_tokens"]

    @property
    def last_step(self) -> int:
        return self.max_new_tokens

    @property
    def can_stream(self) -> bool:
        return self.num_beams == 1


@dataclass(frozen=True)
class Answer:
    """What came of one prompt."""

    ids: list[int]
    """Without what ends it."""
    is_cut: bool
    """Whether the limit of its length ended it."""


class AnsweringMixin:
    """For models with `generate`."""

    def chat_decoding(self, mode: str, options: Mapping[str, Any]) -> Decoding:
        """The decoding of a chat's answers.

        Args:
            mode: `"reference"`: as the original decodes, with `options` in place of its values; `"generate"`: as
                `generate` does, with `options` as its arguments.

        Raises:
            ValueError: for what the original's decoding hasn't, or a value outside its range.
        """
        raise NotImplementedError

    def enable_fast_decoding(self) -> None:
        """Sets the model up for compiled graphs: whatever doesn't say `fast=False` is then decoded with them.

        Raises:
            ValueError: for a model that can't be decoded so.
        """
        raise ValueError(f"{type(self).__name__} has no fast decoding: leave out fast.")

    def fill(self, documents: Sequence[Mapping[str, Any]], *args: Any, **options: Any) -> list[dict[str, Any]]:
        """Fills the answers of documents; of CPM-Bee's models only."""
        raise ValueError(f"{type(self).__name__} fills no documents: ask it questions.")

    def take_images_of(self, processor: Any) -> None:
        """Makes the model ready for images of the size that a processor gives them."""

    @torch.no_grad()
    def answers(
        self,
        inputs: Mapping[str, Any],
        decoding: Decoding,
        tokenizer: Any,
        *,
        progress: Callable[[int], None] | None = None,
        fast: bool | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answers prompts, each as it would be alone.

        Args:
            inputs: of the processor's `pad_prompts`.
            decoding: of [`chat_decoding`].
            progress: called with the number of steps so far after each of them; what it raises ends the work.
            fast: whether to decode with compiled graphs; if None, as the model was set up.
            options: further arguments of `generate`: `logits_processor`, `streamer`; none for another decoding.
        """
        options = {**decoding.options, **options}
        if fast is not None:
            options["fast"] = fast
        if options.get("stop_strings") is not None:
            options["tokenizer"] = tokenizer
        length = inputs["input_ids"].shape[1]
        if progress is not None:

            def step(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                progress(ids.shape[1] - length)
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

            options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), step]
        sequences = self.generate(**inputs, **options)[:, length:]
        return [until(ids, tokenizer.eos_token_id) for ids in sequences.tolist()]


def until(ids: Sequence[int], end: int) -> Answer:
    """Tokens up to the one that ends an answer."""
    ids = list(ids)
    return Answer(ids[: ids.index(end)], False) if end in ids else Answer(ids, True)


__all__ = ["Answer", "AnsweringMixin", "Decoding", "GenerateDecoding"]
