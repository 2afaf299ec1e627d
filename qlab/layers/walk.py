"""The way through the network: A, B and every hybrid side by side, one decoder layer's weights in memory at a time.

A hybrid is known by its swaps. The nested hybrid of a swap has everything up to it from B and the rest from A: where it begins
it is B, so it starts from B's residual stream and goes on through A's layers. A single swap starts from A's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.layers.coordinates import TAPS
from qlab.layers.layer import ALL_A, ALL_B, Layer, sides_with
from qlab.layers.measure import linear_rows, relative
from qlab.layers.pair import A, B, Pair
from qlab.layers.result import EMBEDDING, HEAD, LinearRow, StreamRow

By = Literal["linear", "layer"]
Advance = Callable[[int], None]
"""Called with the number of decoder layers that were run."""


@dataclass(frozen=True)
class Swap:
    """A step of the way from A to B."""

    name: str
    layer: int = -1
    taps: tuple[str, ...] = ()
    """Linears of that decoder layer; none for the embedding, and for the final norm and head."""


@dataclass(frozen=True, eq=False)
class Walked:
    """What is left of the way forward."""

    linears: tuple[LinearRow, ...]
    stream: tuple[StreamRow, ...]
    entered: tuple[Tensor, ...]
    """A's residual stream before each decoder layer and behind the last: float64 [1, T, hidden] each."""
    last_b: Tensor
    """B's behind the last layer."""
    nested: dict[int, Tensor] = field(default_factory=dict)
    """Hybrids' residual streams behind the last layer, by swap."""
    single: dict[int, Tensor] = field(default_factory=dict)


def check_by(by: str) -> None:
    """Raise QlabError for another unit than those."""
    if by not in get_args(By):
        raise QlabError(f"--by {by!r} is neither {' nor '.join(get_args(By))}")


def swaps_of(pair: Pair, by: By) -> tuple[Swap, ...]:
    """In the order of the network. Raises QlabError for another unit."""
    check_by(by)
    found = [Swap(EMBEDDING)] if pair.other_embedding else []
    for i in range(pair.a.blocks.depth):
        if by == "layer":
            found.append(Swap(f"model.layers.{i}", i, TAPS))
        else:
            found += [Swap(f"model.layers.{i}.{tap}", i, (tap,)) for tap in TAPS]
    return (*found, Swap(HEAD)) if pair.other_head else tuple(found)


def work(pair: Pair, swaps: Sequence[Swap], singles: bool) -> int:
    """Runs of a decoder layer on the way forward."""
    depth, kinds = pair.a.blocks.depth, 2 if singles else 1
    hybrids = sum(depth - max(s.layer, 0) for s in swaps if s.name != HEAD)
    return 2 * depth + kinds * hybrids


@torch.no_grad()
def forward(
    pair: Pair, tokens: Sequence[int], swaps: Sequence[Swap], *, singles: bool, seed: int, advance: Advance = lambda n: None
) -> Walked:
    """Raises UnsupportedError where a linear cannot run these tokens here."""
    a, b = (side.blocks.embed(tokens) for side in pair.sides)
    nested = {j: b for j, s in enumerate(swaps) if s.name == EMBEDDING}
    single = dict(nested) if singles else {}
    entered, linears = [a], []
    stream = [StreamRow(EMBEDDING, relative(b - a, a), float("nan"))]
    for index in range(pair.a.blocks.depth):
        layer = Layer(pair, index, len(tokens), seed)
        here = layer.run(a, ALL_A), layer.run(b, ALL_B)
        linears += linear_rows(layer, *here)
        advance(2)
        for begun in (nested, single):
            for j, hidden in begun.items():
                begun[j] = layer.run(hidden, ALL_A).out
            advance(len(begun))
        up_to: tuple[str, ...] = ()
        for j, swap in enumerate(swaps):
            if swap.layer != index:
                continue
            up_to += swap.taps
            sides = sides_with(up_to)
            nested[j] = here[B].out if sides == ALL_B else layer.run(b, sides).out
            if singles:
                single[j] = layer.run(a, sides_with(swap.taps)).out
            advance(2 if singles else 1)
        a, b = here[A].out, here[B].out
        entered.append(a)
        stream.append(_grown(f"model.layers.{index}", relative(b - a, a), stream[-1]))
        del layer, here  # before the next one is read
    return Walked(tuple(linears), tuple(stream), tuple(entered), b, nested, single)


def _grown(name: str, divergence: float, before: StreamRow) -> StreamRow:
    return StreamRow(name, divergence, divergence / before.divergence if before.divergence else float("nan"))
