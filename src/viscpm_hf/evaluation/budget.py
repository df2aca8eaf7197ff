"""What requests to a paid endpoint may cost, shared by threads that send them."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any


class BudgetSpentError(ValueError):
    """The next request might cost more than is left."""


@dataclass(frozen=True)
class Usage:
    """What requests have used."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Limits:
    """None is no limit. Prices are for a million tokens, in any currency."""

    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    prompt_price: float | None = None
    completion_price: float | None = None

    def __post_init__(self):
        if self.max_cost is not None and (self.prompt_price is None or self.completion_price is None):
            raise ValueError("A limit of the cost needs both prices: --prompt-price and --completion-price.")

    def cost(self, usage: Usage) -> float | None:
        if self.prompt_price is None or self.completion_price is None:
            return None
        return (usage.prompt_tokens * self.prompt_price + usage.completion_tokens * self.completion_price) / 1e6

    def exceeded_by(self, usage: Usage) -> str | None:
        """The limit that such usage is above; None if there is none."""
        if self.max_requests is not None and usage.requests > self.max_requests:
            return f"{self.max_requests:,} requests"
        if self.max_tokens is not None and usage.tokens > self.max_tokens:
            return f"{self.max_tokens:,} tokens"
        if self.max_cost is not None and self.cost(usage) > self.max_cost:
            return f"a cost of {self.max_cost:g}"
        return None


class Budget:
    """Lets a request begin only if the most that it can use still fits, so that a limit is never passed.

    Args:
        limits: of everything together.
        spent: by earlier runs.
    """

    def __init__(self, limits: Limits, spent: Usage = Usage()):  # noqa: B008, it is immutable
        self.limits = limits
        self.spent = spent
        self._reserved = Usage()
        self._changed = threading.Condition()
        self._is_closed = False

    def reserve(self, most: Usage) -> Usage:
        """Sets aside what a request may use; waits while running ones might leave enough.

        Returns:
            What was set aside: as asked, with fewer requests (retries) where not all of them are left.

        Raises:
            BudgetSpentError: if there isn't enough, or the budget was closed.
        """
        with self._changed:
            while True:
                if self._is_closed:
                    raise BudgetSpentError("No further request may begin.")
                granted = most
                if self.limits.max_requests is not None:
                    left = self.limits.max_requests - (self.spent + self._reserved).requests
                    granted = Usage(max(1, min(most.requests, left)), most.prompt_tokens, most.completion_tokens)
                limit = self.limits.exceeded_by(self.spent + self._reserved + granted)
                if limit is None:
                    self._reserved += granted
                    return granted
                if self._reserved == Usage():
                    raise BudgetSpentError(f"The budget of {limit} is spent.")
                self._changed.wait()

    def settle(self, granted: Usage, used: Usage) -> None:
        """Gives back what was set aside, and notes what was used."""
        with self._changed:
            self._reserved -= granted
            self.spent += used
            self._changed.notify_all()

    def close(self) -> None:
        """From now on no request begins."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.spent), "cost": self.limits.cost(self.spent)}
