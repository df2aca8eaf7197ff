"""Figures with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np


CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure, and the interval that holds the true one in `CONFIDENCE` of all such experiments."""

    value: float
    low: float
    high: float
    count: int
    """Of observations."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """`"83.3 (79.1–87.4)"`."""
        value, low, high = (f"{figure * scale:.{digits}f}" for figure in (self.value, self.low, self.high))
        return f"{value} ({low}–{high})"


def proportion(successes: int, count: int) -> Estimate:
    """A share of successes with Wilson's interval, which holds for few observations and for shares near 0 or 1 too.

    Raises:
        ValueError: without observations.
    """
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"There is no share of {successes} successes in {count} observations.")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, min(share, max(0.0, middle - reach)), max(share, min(1.0, middle + reach)), count)


def mean(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """A mean with its bootstrap interval (percentiles)."""
    return ratio_of_means(values, np.ones(len(values)), seed, resamples)


def ratio_of_means(
    values: Sequence[float], references: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """`mean(values) / mean(references)` with its bootstrap interval; the pairs stay together when they are drawn.

    Raises:
        ValueError: without values, or if the references' mean is 0.
    """
    above, below = np.asarray(values, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if not len(above) or len(above) != len(below):
        raise ValueError(f"There is no mean of {len(above)} values and {len(below)} references.")
    if below.mean() == 0:
        raise ValueError("The references' mean is 0, so nothing can be said relative to it.")
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for index in range(resamples):  # one by one: all at once would be resamples × values numbers
        rows = rng.integers(0, len(above), len(above))
        drawn[index] = above[rows].sum() / max(below[rows].sum(), np.finfo(np.float64).tiny)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(above.mean() / below.mean()), float(low), float(high), len(above))
