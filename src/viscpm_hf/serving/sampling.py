"""Choosing the next token of rows that each have settings of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from .constraints import Constraint


# OpenAI's number for what is impossible.
MIN_LOGPROB = -9999.0


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
    top_logprobs: int | None = None
    """Notes the log-probability of each token and of so many of the best; None notes nothing."""
    constraint: Constraint | None = None
    """The answer's form."""

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


@dataclass(frozen=True)
class TokenScore:
    """How probable a token was, before temperature, penalties and constraints."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]
    """The most probable tokens and their log-probabilities."""


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
        self.chosen: list[int] = []
        """The answer's tokens so far."""
        self.matcher = settings.constraint.begin() if settings.constraint else None
        self.score: TokenScore | None = None
        """Of the newest token, if scores are noted."""

    def random(self) -> float:
        return float(torch.rand((), generator=self._generator, dtype=torch.float32))


def choose_tokens(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of every row, which its sampler notes.

    Args:
        logits: `(rows, vocabulary)` in fp32; changed in place.
        samplers: one for every row.

    Raises:
        ValueError: if nothing can go on with the form of an answer.
    """
    noting = [row for row, sampler in enumerate(samplers) if sampler.settings.top_logprobs is not None]
    logprobs = torch.log_softmax(logits[noting], dim=-1) if noting else None
    for row, sampler in enumerate(samplers):
        if sampler.matcher is not None:
            sampler.matcher.forbid(logits[row])
    tokens = _choose(logits, samplers).tolist()
    for place, row in enumerate(noting):
        samplers[row].score = _score(logprobs[place], tokens[row], samplers[row].settings.top_logprobs)
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.chosen.append(token)
        if sampler.matcher is not None:
            sampler.matcher.take(token)
    return tokens


def _score(logprobs: torch.Tensor, token: int, count: int) -> TokenScore:
    best = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    # What is impossible has no number in JSON.
    return TokenScore(token, max(float(logprobs[token]), MIN_LOGPROB), tuple(p for p in pairs if p[1] > MIN_LOGPROB))


def _choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    for row, sampler in enumerate(samplers):
        penalty = sampler.settings.repetition_penalty
        if penalty != 1.0 and sampler.chosen:
            seen = torch.tensor(sorted(set(sampler.chosen)), device=logits.device)
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
