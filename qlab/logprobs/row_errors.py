"""Bounds on the errors of decisions by rows: exact binomial figures, and the beta-binomial law of differing elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

ERROR = 1e-6
"""Error rate that a decision must stay below."""
CALIBRATION = ERROR / 2
"""Half of it goes to the calibration: probability that a bound taken from calibration rows is below the truth."""
MOST_ROWS = 100_000
"""Rows up to which a number of rows is looked for."""


def upper(hits: int, trials: int, risk: float = CALIBRATION) -> float:
    """Clopper and Pearson's upper bound of a probability of which ``hits`` of ``trials`` were seen; 1 without a trial."""
    return 1.0 if hits >= trials else float(special.betaincinv(hits + 1, trials - hits, 1 - risk))


def lower(hits: int, trials: int, risk: float = CALIBRATION) -> float:
    """The lower bound; 0 without a trial."""
    return 0.0 if hits <= 0 or not trials else float(special.betaincinv(hits, trials - hits + 1, risk))


def majority_error(wrong: float, rows: int) -> float:
    """Probability that at least half of ``rows`` independent votes are wrong; no majority counts as an error."""
    return float(stats.binom.sf(math.ceil(rows / 2) - 1, rows, wrong)) if rows else 1.0


def majority_rows(wrong: float, error: float) -> float:
    """Fewest rows whose majority is wrong with probability ``error`` at most; infinite where no number is found."""
    if wrong >= 0.5:
        return math.inf
    n, most = 1, 1
    while majority_error(wrong, most) > error:
        most = 2 * most + 1  # odd numbers alone: one row more makes a tie possible, which is an error
        if most > MOST_ROWS:
            return math.inf
    while n < most:
        middle = n + (most - n) // 4 * 2
        n, most = (n, middle) if majority_error(wrong, middle) <= error else (middle + 2, most)
    return float(most)


def exclusion_rows(equal: float, error: float) -> float:
    """Rows after which a candidate survives by chance with probability ``error`` at most; ``equal`` is its chance per row."""
    if equal >= 1:
        return math.inf
    return 1.0 if equal <= error else float(math.ceil(math.log(error) / math.log(equal)))


@dataclass(frozen=True)
class Spread:
    """Beta-binomial law of the number of differing elements of a row of ``size`` elements."""

    size: int
    mean: float
    """Share of elements that differ."""
    correlation: float
    """Between elements of a row: 0 is binomial, and the variance is 1 + (size - 1) * correlation times the binomial one."""

    def at_least(self, count: int) -> float:
        """P(differing >= count)."""
        return self._sum(count, self.size)

    def at_most(self, count: int) -> float:
        """P(differing <= count)."""
        return self._sum(0, count)

    def _sum(self, first: int, last: int) -> float:
        if last < first:
            return 0.0
        k = np.arange(max(first, 0), min(last, self.size) + 1)
        if self.mean <= 0 or self.mean >= 1:
            return float(((k == 0) if self.mean <= 0 else (k == self.size)).any())
        if self.correlation <= 0:
            logs = stats.binom.logpmf(k, self.size, self.mean)
        else:
            logs = stats.betabinom.logpmf(k, self.size, *_shape(self.mean, self.correlation))
        return float(min(1.0, math.exp(special.logsumexp(logs))))


def fit(counts: ArrayLike, size: int) -> Spread:
    """The law by maximum likelihood, from calibration rows' counts of ``size`` elements each.

    Where no element differs, or all do, the mean is Clopper and Pearson's bound and the law binomial: nothing can be said of
    its spread.
    """
    k = np.asarray(counts, np.int64)
    total = len(k) * size
    if k.sum() in (0, total):
        return Spread(size, upper(0, total) if k.sum() == 0 else lower(total, total), 0.0)
    mean = float(k.sum() / total)
    values, weights = np.unique(k, return_counts=True)

    def loss(p: np.ndarray) -> float:
        m, rho = special.expit(p)
        return -float((weights * stats.betabinom.logpmf(values, size, *_shape(m, rho))).sum())

    ratio = float(k.var() / (size * mean * (1 - mean)))
    rho = min(max((ratio - 1) / max(size - 1, 1), 1e-5), 0.9)
    found = optimize.minimize(loss, special.logit([mean, rho]), method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-6})
    m, rho = special.expit(found.x)
    binomial = -float((weights * stats.binom.logpmf(values, size, mean)).sum())
    return Spread(size, float(m), float(rho)) if found.fun < binomial else Spread(size, mean, 0.0)


def crossing(own: Spread, other: Spread) -> float:
    """Bound on P(a row differs in no fewer elements from its own method than from the other), however the two hang together:
    the least over c of P(own >= c) + P(other <= c)."""
    if own.size != other.size:
        raise ValueError(f"rows of {own.size} and of {other.size} elements are not of one linear")
    return min(1.0, *(own.at_least(c) + other.at_most(c) for c in _cuts(own, other)))


def _cuts(own: Spread, other: Spread) -> Sequence[int]:
    low, high = sorted((own.mean * own.size, other.mean * other.size))
    return sorted({1, *np.unique(np.linspace(low, high, 33).round().astype(int)).tolist()})


def _shape(mean: float, correlation: float) -> tuple[float, float]:
    """alpha and beta."""
    total = 1 / max(correlation, 1e-7) - 1
    return mean * total, (1 - mean) * total
