"""Intervals: known values, and that they hold what they promise."""

import math

import numpy as np
import pytest

from viscpm_hf.evaluation.statistics import mean, proportion, ratio_of_means


def test_wilson_interval_has_its_textbook_values():
    # Wilson (1927) by the formula's two roots, worked out independently for 8 of 10.
    z, share, count = 1.959964, 0.8, 10
    root = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    denominator = 1 + z * z / count
    estimate = proportion(8, 10)
    assert estimate.value == 0.8
    assert estimate.low == pytest.approx((share + z * z / (2 * count) - root) / denominator, abs=1e-6)
    assert estimate.high == pytest.approx((share + z * z / (2 * count) + root) / denominator, abs=1e-6)
    assert (round(estimate.low, 3), round(estimate.high, 3)) == (0.49, 0.943)


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (5, 5), (1, 1)])
def test_wilson_interval_at_the_ends(successes, count):
    estimate = proportion(successes, count)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0.3


def test_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(5, 2, 400)
    estimate = mean(values, resamples=1000)
    reach = 1.96 * values.std() / math.sqrt(len(values))
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - reach, abs=0.05)
    assert estimate.high == pytest.approx(values.mean() + reach, abs=0.05)


def test_same_seed_same_interval():
    values = [1.0, 2.0, 5.0, 9.0]
    assert mean(values, seed=3) == mean(values, seed=3)
    assert mean(values, seed=3, resamples=50) != mean(values, seed=4, resamples=50)


def test_pairs_stay_together():
    """Of answers that are worth exactly half of their references any sample is too."""
    references = np.random.default_rng(0).uniform(1, 10, 30)
    estimate = ratio_of_means(references / 2, references)
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(0.5),) * 3


def test_nothing_to_count():
    with pytest.raises(ValueError, match="0 observations"):
        proportion(0, 0)
    with pytest.raises(ValueError, match="0 values"):
        mean([])
    with pytest.raises(ValueError, match="references' mean is 0"):
        ratio_of_means([1], [0])
