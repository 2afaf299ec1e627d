"""Intervals: they cover, they move jointly, and they do not hide what is infinite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlab.logprobs.statistics import mean, ratio


def test_the_figure_itself():
    f = mean([1.0, 2.0, 3.0, 6.0])
    assert (f.value, f.prompts, f.infinite) == (3.0, 4, 0)
    assert f.low < 3 < f.high
    assert mean([1.0, 2.0, 3.0, 6.0]) == f
    assert (mean([2.0] * 5).low, mean([2.0] * 5).high) == (2.0, 2.0)


@pytest.mark.parametrize("prompts", [7, 16])
def test_intervals_cover_the_true_mean_as_often_as_they_say(prompts):
    rng = np.random.default_rng(0)
    data = rng.gamma(16, 1 / 16, (600, prompts))  # positive and a little skewed, like distances
    figures = [mean(d) for d in data]
    covered = sum(f.low <= 1 <= f.high for f in figures)
    assert 0.92 <= covered / 600 <= 0.98  # 95% and three standard errors
    assert 0.2 < np.mean([f.high - f.low for f in figures]) * math.sqrt(prompts) < 1.6


def test_infinite_and_nan_entries():
    f = mean([1.0, 2.0, math.inf, 1.0, 1.0, 2.0, 2.0, 1.0])
    assert (f.value, f.high, f.infinite) == (math.inf, math.inf, 1)
    assert 1 <= f.low < 2
    f = mean([math.inf] * 3)
    assert (f.low, f.infinite) == (math.inf, 3)
    f = mean([1.0, math.nan])
    assert all(map(math.isnan, (f.value, f.low, f.high)))


def test_one_prompt_has_no_interval():
    f = mean([3.0])
    assert (f.value, math.isnan(f.low), math.isnan(f.high)) == (3.0, True, True)


def test_a_ratio_resamples_signal_and_noise_together():
    noise = np.random.default_rng(0).gamma(1, 1, 12)
    together = ratio(2 * noise, noise)
    assert together.value == pytest.approx(2)
    assert together.high - together.low < 1e-12  # each prompt's ratio is 2
    apart = ratio(2 * noise[::-1], noise)
    assert apart.value == pytest.approx(2)
    assert apart.high - apart.low > 0.5


def test_ratios_without_noise():
    f = ratio([1.0, 2.0], [0.0, 0.0])
    assert (f.value, f.low, f.high) == (math.inf, math.inf, math.inf)
    assert math.isnan(ratio([0.0, 0.0], [0.0, 0.0]).value)
    f = ratio([0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0])
    assert 0 <= f.low < 1.5 < f.high == math.inf


def test_a_figure_needs_prompts():
    with pytest.raises(ValueError, match="one number per prompt"):
        mean([])
