"""From counts to a tree: which leaf meets which other, and how many leaves lie below the place where they meet.

The method is FPRev's (arXiv 2411.00442, USENIX ATC 2025): every leaf holds one unit u, two hold +M and -M. Units added before
the two cancel are swamped by M; the others are counted in the output. So one probe tells how many leaves lie below the lowest
common ancestor of two. The pivot is the middle leaf, with which chains take about 2n probes whichever way they run.

Probes are asked in rounds: :func:`together` runs the questions of many subtrees side by side.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qlab.errors import QlabError

Tree = int | tuple["Tree", ...]
"""A leaf (a k), or a sum of its children; three children or more are added in one fused sum."""
R = TypeVar("R")
CUTS = range(21, 29)
"""Where the cut of a fused sum is looked for, in bits below the largest addend; tensor cores have it at 23 to 25."""


class RevealError(QlabError):
    """Answers that fit no tree: the sum has no fixed order, is not made of additions that swamp, or is wider than M / u."""


@dataclass(frozen=True)
class Count:
    """+M at ``plus``, -M at ``minus``, a unit at each of ``units``. Answered by the number of units that were swamped."""

    plus: int
    minus: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """Numbers at some k, zero elsewhere. Answered by the output."""

    at: tuple[tuple[int, float], ...]


Question = Count | Value
Asking = Generator[list[Question], list[float], R]
"""Yields rounds of questions, is sent their answers, and returns what they say."""


def together(askings: Sequence[Asking[R]]) -> Asking[list[R]]:
    """The same questions in as few rounds as the longest of ``askings`` has."""
    results: list[Any] = [None] * len(askings)
    open_: dict[int, list[Question]] = {}

    def step(i: int, answers: list[float] | None) -> None:
        try:
            open_[i] = next(askings[i]) if answers is None else askings[i].send(answers)
        except StopIteration as end:
            open_.pop(i, None)
            results[i] = end.value

    for i in range(len(askings)):
        step(i, None)
    while open_:
        round_ = list(open_.items())
        answers = yield [q for _, questions in round_ for q in questions]
        at = 0
        for i, questions in round_:
            step(i, answers[at : at + len(questions)])
            at += len(questions)
    return results


def leaves(tree: Tree) -> Iterator[int]:
    """The leaves of a tree, from the left. Without recursion: chains are deep."""
    stack = [tree]
    while stack:
        here = stack.pop()
        if isinstance(here, int):
            yield here
        else:
            stack.extend(reversed(here))


def first(tree: Tree) -> int:
    return next(leaves(tree))


def span(tree: Tree) -> tuple[int, int]:
    """Two leaves that meet only in the tree's root."""
    assert not isinstance(tree, int)
    return first(tree[0]), first(tree[1])


def build(found: Sequence[int], big: float) -> Asking[Tree]:
    """The tree over some leaves; whatever else feeds the sum is left zero. ``big`` is M."""
    tree, _ = yield from _build(tuple(found), None, big)
    return tree


def _build(group: tuple[int, ...], outside: int | None, big: float) -> Asking[tuple[Tree, bool]]:
    """The tree over ``group``, and whether its root is the very sum in which ``outside`` joins, too."""
    if len(group) == 1:
        return group[0], False
    pivot = group[len(group) // 2]
    others = [k for k in group if k != pivot]
    extra = () if outside is None else (outside,)
    swamped = yield [Count(pivot, k, (*(o for o in others if o != k), *extra)) for k in others]
    # One that swamps everything, the leaf outside included, meets the pivot where that one joins.
    merged = outside is not None and len(group) - 1 in swamped
    if merged and min(swamped) == len(group) - 1 and (yield from _flat(group, pivot, outside, big)):
        return group, True
    if len(group) > 2 and not any(swamped):
        raise RevealError("M swamps no unit: the sum is exact, or wider than M / u, and has no order to reveal")
    classes: dict[int, list[int]] = {}
    for k, count in zip(others, swamped, strict=True):
        classes.setdefault(min(int(count) + 2, len(group)), []).append(k)
    below = 1
    for size in sorted(classes):
        below += len(classes[size])
        if size != below:
            where = f"k={pivot} and k={classes[size][0]} meet above {size} leaves"
            raise RevealError(f"no tree has these answers: {where}, and {below} meet there or below")
    ordered = [tuple(classes[size]) for size in sorted(classes)]
    subtrees = yield from together([_build(c, pivot, big) for c in ordered])
    tree: Tree = pivot
    for subtree, fused in subtrees:
        tree = (tree, *subtree) if fused and not isinstance(subtree, int) else (tree, subtree)
    return tree, merged


def _flat(group: tuple[int, ...], pivot: int, outside: int | None, big: float) -> Asking[bool]:
    """Whether all of ``group`` are addends of one fused sum, given that each meets ``pivot`` and ``outside`` there.

    A fused sum cuts every addend at the same bit. With +-M in it, addends of half that bit vanish; two of them that were added
    beforehand would not. False also where the cut is not found, so that the leaves are then told apart pair by pair.
    """
    rest = [k for k in group if k != pivot]
    if outside is None or len(rest) < 3:
        return False
    pair = ((outside, big), (pivot, -big))
    reach = yield [Value((*pair, (rest[0], big * 2.0**-t))) for t in CUTS]
    kept = [t for t, value in zip(CUTS, reach, strict=True) if value]
    if not kept or kept[-1] == CUTS[-1]:
        return False
    half = big * 2.0 ** -(kept[-1] + 1)
    (left,) = yield [Value((*pair, *((k, half) for k in rest)))]
    return left == 0
