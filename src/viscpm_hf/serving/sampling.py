"""Choosing the next token of rows that each have settings of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch


@dataclass(frozen=True)
class SamplingSettings:
    """How one answer is decoded.

    Raises:
        ValueError: for a setting outside its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 takes the best token."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    """Over the answer so far, never over the prompt."""
    seed: int | None = None
    """Makes the answer repeatable, whatever is answered beside it."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are no part of it."""

    def __post_init__(self):
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise ValueError(f"max_new_tokens must be a whole number, got {self.max_new_tokens!r}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        for name, lowest, highest in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not lowest <= value <= highest:
                raise ValueError(f"{name} must be a number from {lowest:g} to {highest:g}, got {value!r}.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be a 64-bit whole number, got {self.seed}.")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop strings must be non-empty strings, got {self.stop!r}.")


class Sampler:
    """The settings of one row and its source of randomness."""

    def __init__(self, settings: SamplingSettings):
        self.settings = settings
        # On the CPU whatever the device, one number a token: the same seed gives the same answer everywhere.
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed % 2**64)
        self.seen: list[int] = []
        """Base ids of the answer so far."""

    def random(self) -> float:
        return float(torch.rand((), generator=self._generator, dtype=torch.float32))


def choose_tokens(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """The next token of every row.

    Args:
        logits: `(rows, vocabulary)` in fp32; changed in place.
        samplers: one for every row.

    Returns:
        Token ids `(rows,)` on the device of the logits.
    """
    for row, sampler in enumerate(samplers):
        penalty = sampler.settings.repetition_penalty
        if penalty != 1.0 and sampler.seen:
            seen = torch.tensor(sorted(set(sampler.seen)), device=logits.device)
            values = logits[row, seen]
            logits[row, seen] = torch.where(values < 0, values * penalty, values / penalty)
    tokens = logits.argmax(-1)
    sampled = [row for row, sampler in enumerate(samplers) if sampler.settings.temperature > 0]
    if not sampled:
        return tokens

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device, dtype=logits.dtype)[:, None]

    settings = [samplers[row].settings for row in sampled]
    index = torch.tensor(sampled, device=logits.device)
    scaled = logits[index] / column([max(entry.temperature, 1e-4) for entry in settings])
    probabilities, order = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    # The most probable tokens that together reach top_p; always at least one.
    num_kept = (cumulative - probabilities < column([entry.top_p for entry in settings])).sum(-1, keepdim=True)
    num_kept = num_kept.clamp(min=1)
    total = cumulative.gather(-1, num_kept - 1)
    drawn = total * column([samplers[row].random() for row in sampled])
    place = (cumulative <= drawn).sum(-1, keepdim=True).minimum(num_kept - 1)
    tokens[index] = order.gather(-1, place)[:, 0]
    return tokens
