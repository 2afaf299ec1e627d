"""Random admissible orders, for games with too many coalitions, and what they leave uncertain.

A draw is one admissible order, each as likely as any other, with its reverse where that is admissible too: an antithetic pair,
whose errors partly cancel (Mitchell, Cooper, Frank and Holmes 2022, Sampling permutations for Shapley value estimation, Journal
of Machine Learning Research 23). The mean over draws is unbiased either way, since a pair's two orders are equally likely.
Along an order the differences telescope, so that the parts of a sample, too, add up to the total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from qlab.attribution.lattice import Lattice, Order, factors_of
from qlab.errors import QlabError

TRIES = 10_000
"""Random orders that are tried for each draw where the orders could not be counted."""
Draw = tuple[Order, ...]
"""One admissible order, or it and its reverse."""


def draw(
    samples: int, seed: int, unions: Sequence[int], admissible: Callable[[int], bool], lattice: Lattice | None
) -> tuple[Draw, ...]:
    """``samples`` independent draws, uniform over the admissible orders, the same for the same ``seed``.

    By a random rank where the orders were counted (``lattice``); else by shuffling, until every prefix is admissible. Raises
    QlabError where ``TRIES`` shuffles gave no admissible order.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(samples):
        if lattice is not None:
            order = lattice.order(_below(lattice.orders, generator))
        else:
            order = _shuffled(unions, admissible, generator)
        reverse = order[::-1]
        found.append((order, reverse) if len(order) > 1 and all(map(admissible, prefixes(reverse))) else (order,))
    return tuple(found)


def prefixes(order: Order) -> list[int]:
    """The coalitions that an order passes through, without the empty one."""
    masks, mask = [], 0
    for i in order:
        mask |= 1 << i
        masks.append(mask)
    return masks


def interval(draws: Sequence[float], value: float, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean over independent draws (at least two) around ``value``, which is that mean."""
    from scipy.stats import t

    count = len(draws)
    half = float(t.ppf(0.5 + level / 2, count - 1)) * float(np.std(draws, ddof=1)) / math.sqrt(count)
    return value - half, value + half


def _below(bound: int, generator: np.random.Generator) -> int:
    """A uniform integer from 0 to ``bound`` - 1; the counts of orders go beyond 64 bits."""
    bits = (bound - 1).bit_length()
    size = (bits + 7) // 8
    while True:
        found = int.from_bytes(generator.bytes(size), "little") & ((1 << bits) - 1)
        if found < bound:
            return found


def _shuffled(unions: Sequence[int], admissible: Callable[[int], bool], generator: np.random.Generator) -> Order:
    """A uniform order in which unions stand together, again until every prefix is admissible."""
    members = [list(factors_of(u)) for u in unions]
    for _ in range(TRIES):
        order = tuple(
            members[u][m] for u in generator.permutation(len(members)) for m in generator.permutation(len(members[u]))
        )
        if all(map(admissible, prefixes(order))):
            return order
    raise QlabError(
        f"of {TRIES} random orders of the {sum(map(len, members))} factors none is admissible; merge the factors that cannot "
        "be swapped alone, or allow more coalitions"
    )
