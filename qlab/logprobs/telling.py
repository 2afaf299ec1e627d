"""How well a verifier's per-prompt scores tell two generators apart, and how many tokens that takes.

A verifier re-executes with one path. Its score of a prompt is the distance between the trace and the re-execution: *negatives*
are scores of the path that was claimed, *positives* those of another path. Both are scores of the same prompts, in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qlab.logprobs.statistics import Array, Figure, bootstrap, interval, resamples

POWER, FALSE_POSITIVES = 0.99, 0.01
ENOUGH = 20
"""Prompts from which on resampling them can say something about the 99th percentile of their means."""
MOST = 512
"""Prompts up to which the empirical number is looked for."""


@dataclass(frozen=True)
class Roc:
    """Share of positives told (true) against share of negatives told (false), as the threshold falls."""

    false: tuple[float, ...]
    true: tuple[float, ...]


@dataclass(frozen=True)
class Telling:
    """A claimed path against another, as the verifier's path sees them."""

    claimed: str
    other: str
    verifier: str
    auc: Figure
    """Probability that the other path's score of one prompt is larger, ties counted half: 0.5 cannot be told."""
    roc: Roc
    tokens: Figure
    """Tokens for 99% power at 1% false positives, by the normal approximation; infinite where the two are one function."""
    resampled: Figure | None
    """The same by resampling prompts; None with fewer than 20 prompts."""
    tokens_per_prompt: float

    @property
    def one_prompt(self) -> bool:
        """Whether a single prompt was enough under every resampling: fewer tokens were not tried, so the number is a limit."""
        return self.tokens.high <= self.tokens_per_prompt


def tell(
    claimed: str, other: str, verifier: str, negatives: ArrayLike, positives: ArrayLike, tokens_per_prompt: float
) -> Telling:
    """All of it from two arrays of scores [prompts]."""
    return Telling(
        claimed,
        other,
        verifier,
        auc(negatives, positives),
        roc(negatives, positives),
        tokens_needed(negatives, positives, tokens_per_prompt),
        tokens_resampled(negatives, positives, tokens_per_prompt),
        tokens_per_prompt,
    )


def roc(negatives: ArrayLike, positives: ArrayLike) -> Roc:
    """Corners of the curve, from (0, 0) to (1, 1); equal scores are told at once, so that one function gives the diagonal."""
    neg, pos = np.asarray(negatives, np.float64), np.asarray(positives, np.float64)
    thresholds = np.unique(np.concatenate([neg, pos]))[::-1]
    false, true = ([0.0, *(float((v >= t).mean()) for t in thresholds)] for v in (neg, pos))
    return Roc(tuple(false), tuple(true))


def auc(negatives: ArrayLike, positives: ArrayLike) -> Figure:
    """Mann-Whitney: the share of pairs in which the positive is larger, ties counted half. Prompts are resampled jointly."""
    neg, pos = np.asarray(negatives, np.float64), np.asarray(positives, np.float64)
    wins = (pos[:, None] > neg[None, :]) + 0.5 * (pos[:, None] == neg[None, :])
    value = float(wins.mean())
    counts = _counts(resamples(len(neg)))
    draws = ((counts @ wins) * counts).sum(1) / len(neg) ** 2
    return Figure(value, *interval(value, draws, len(neg)), 0, len(neg))


def tokens_needed(negatives: ArrayLike, positives: ArrayLike, tokens_per_prompt: float) -> Figure:
    """Tokens, in whole prompts, until the mean score of the other path exceeds the threshold for 1% false positives in 99%.

    Means over n prompts are taken as normal: n = ((z_fpr sd_0 + z_power sd_1) / (mean_1 - mean_0))^2, 1 at least. Infinite
    where the other path's mean score is not the larger one.
    """
    z0, z1 = (NormalDist().inv_cdf(p) for p in (1 - FALSE_POSITIVES, POWER))

    def count(v: Array) -> Array:
        neg, pos = v
        gap = pos.mean(-1) - neg.mean(-1)
        spread = z0 * _deviation(neg) + z1 * _deviation(pos)
        with np.errstate(divide="ignore", invalid="ignore"):
            prompts = np.where(gap > 0, (spread / gap) ** 2, np.inf)
        return np.asarray(tokens_per_prompt * np.maximum(np.ceil(prompts), 1))

    return bootstrap(count, np.stack([np.asarray(negatives, np.float64), np.asarray(positives, np.float64)]))


def tokens_resampled(
    negatives: ArrayLike, positives: ArrayLike, tokens_per_prompt: float, *, draws: int = 1000, outer: int = 60
) -> Figure | None:
    """:func:`tokens_needed` without the normal approximation: the smallest number of prompts, drawn with replacement, whose
    means reach 99% power. Infinite where 512 prompts do not. None with fewer than 20 prompts.

    The interval repeats this on ``outer`` resamples of the prompts.
    """
    pair = np.stack([np.asarray(negatives, np.float64), np.asarray(positives, np.float64)])
    prompts = pair.shape[1]
    if prompts < ENOUGH:
        return None
    rng = np.random.default_rng(prompts)

    def power(v: Array, n: int) -> float:
        neg, pos = (x[rng.integers(0, prompts, (draws, n))].mean(1) for x in v)
        return float((pos > np.quantile(neg, 1 - FALSE_POSITIVES, method="higher")).mean())

    def smallest(v: Array) -> float:
        n = 1
        while power(v, n) < POWER:
            if (n := 2 * n) > MOST or v[1].mean() <= v[0].mean():
                return math.inf
        low = n // 2
        while n - low > 1:
            middle = (low + n) // 2
            low, n = (low, middle) if power(v, middle) >= POWER else (middle, n)
        return n * tokens_per_prompt

    value = smallest(pair)
    again = np.array([smallest(pair[:, i]) for i in resamples(prompts)[:outer]])
    return Figure(value, *interval(value, again, prompts), 0, prompts)


def _counts(drawn: NDArray[np.int64]) -> Array:
    """How often each prompt was drawn, [draws, prompts]."""
    draws, n = drawn.shape
    flat = (drawn + n * np.arange(draws)[:, None]).ravel()
    return np.bincount(flat, minlength=draws * n).reshape(draws, n).astype(np.float64)


def _deviation(v: Array) -> Array:
    """Sample standard deviation over the last axis; a single prompt has none."""
    return np.asarray(v.std(-1, ddof=1) if v.shape[-1] > 1 else np.full(v.shape[:-1], np.nan))
