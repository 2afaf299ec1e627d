"""Sums left to atomics: which k are summed in a fixed order, and in which type the rest is added."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from qlab.recipe import Type
from qlab.reveal.check import ROWS, random_rows
from qlab.reveal.probe import Prober
from qlab.reveal.target import Target
from qlab.reveal.topology import Count, RevealError

REPEATS = 8
GRAIN = 32
"""k of which one stands for all, when the ordered parts are told apart."""
RUNS = 24
"""Repetitions without a difference that count as none: by chance, three parts in random order stay so once in 10,000 times."""


def repeats(target: Target, runs: int = REPEATS) -> bool:
    """Whether random activations give the same bits in every run."""
    rows = random_rows(range(target.k), target.k, target.dtype, seed=1)[:ROWS]
    first = target.ask(rows)
    return all(bool((target.ask(rows) == first).all()) for _ in range(runs - 1))


def ordered_parts(prober: Prober) -> list[list[int]]:
    """The k of each part whose sum is always the same, by increasing k.

    Two k of one part cancel within it, and what is outside of it always comes out. Two of different parts swamp whatever is
    added between them, which differs from run to run. One k stands for 32.
    """
    k = prober.target.k
    stands = list(range(0, k, GRAIN))
    units = tuple(s + 1 for s in stands)[: prober.most]
    neighbours = _same(prober, list(itertools.pairwise(stands)), units)
    starts = [0, *(b for (_, b), same in zip(itertools.pairwise(stands), neighbours, strict=True) if not same)]
    pairs = [(a, b) for a, b in itertools.combinations(starts, 2)]
    for (a, b), same in zip(pairs, _same(prober, pairs, units), strict=True):
        if same:
            raise RevealError(f"k={a} and k={b} are summed in a fixed order, and some k between them are not")
    return [list(range(a, b)) for a, b in itertools.pairwise((*starts, k))]


def _same(prober: Prober, pairs: Sequence[tuple[int, int]], units: tuple[int, ...]) -> list[bool]:
    seen: list[float | None] = [None] * len(pairs)
    open_ = list(range(len(pairs)))
    for _ in range(RUNS):
        answers = prober.answers([Count(*pairs[i], units) for i in open_])
        for i, answer in zip(tuple(open_), answers, strict=True):
            if seen[i] is not None and seen[i] != answer:
                open_.remove(i)
            seen[i] = answer
    return [i in set(open_) for i in range(len(pairs))]


def addition_type(prober: Prober, parts: Sequence[Sequence[int]]) -> Type:
    """The type that parts are added in: a small one is lost in it in some order, if in any."""
    a, b, c = (p[0] for p in parts[:3])
    kept: Type = "fp32"
    narrower: tuple[tuple[Type, int], ...] = (("fp16", 11), ("bf16", 8))
    for type, t in narrower:
        row = {a: 2.0**12, b: 2.0 ** (12 - t), c: -(2.0**12)}
        if all(prober.values([row])[0] for _ in range(RUNS)):
            break
        kept = type
    return kept
