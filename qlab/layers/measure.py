"""Divergence of one linear: local, inherited, in total."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlab import compare
from qlab.layers.coordinates import TAPS
from qlab.layers.layer import Layer, Pass
from qlab.layers.pair import A, B
from qlab.layers.result import LinearRow


def linear_rows(layer: Layer, a: Pass, b: Pass) -> list[LinearRow]:
    """A decoder layer's linears, from A's run and B's run of it."""
    found = []
    for tap in TAPS:
        y = a.y[tap][0]
        local = layer.give(tap, B, a)
        inherited, total = layer.give(tap, A, b) - y, layer.in_a(tap, B, b.y[tap][0]) - y
        linears = [block.linears[tap] for block in layer.blocks]
        forms = [linear.form(len(y)) for linear in linears]
        found.append(
            LinearRow(
                layer.names[tap],
                (forms[A].kernel, forms[B].kernel),
                (forms[A].origin, forms[B].origin),
                relative(local - y, y),
                compare.differing(local, y) / y.numel(),
                relative(inherited, y),
                relative(total, y),
                by_row(local - y, y),
                by_row(total, y),
            )
        )
    return found


def relative(difference: Tensor, of: Tensor) -> float:
    """Quotient of L2 norms; 0 of nothing is 0, anything else of nothing infinite."""
    return _quotient(float(difference.norm()), float(of.norm()))


def by_row(difference: Tensor, of: Tensor) -> tuple[float, ...]:
    """:func:`relative`, row by row of [T, N]."""
    lengths = zip(difference.norm(dim=-1).tolist(), of.norm(dim=-1).tolist(), strict=True)
    return tuple(_quotient(d, y) for d, y in lengths)


def gap(values: Sequence[float], others: Sequence[float]) -> float:
    """L2 distance of ``values`` from ``others``, relative to the latter."""
    v, o = (torch.tensor(list(s), dtype=torch.float64) for s in (values, others))
    return relative(v - o, o)


def _quotient(difference: float, of: float) -> float:
    return 0.0 if difference == 0 else difference / of if of else math.inf
