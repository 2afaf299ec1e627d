"""Faults of packing and group layout: what each makes of a weight, and which of them explain a weight that was read.

One-hot activations read the decoded weight element by element, through the recipe's rule of decoding and its output rule.
Named faults predict all of it; parameters of single elements and the group of each row are solved for. The vocabulary is the
probe's (qlab.lab.faults), with the zero points that storage wraps around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qlab.attribution.fault import Fault
from qlab.attribution.rewrites import has
from qlab.lab.faults import ONE_HIGH, ONE_LOW, hypotheses
from qlab.recipe import HalfDot, Output, Recipe
from qlab.replay.operands import decode
from qlab.weights import Int4Weight, round_once

SAMPLED = 16
"""Columns that a hypothesis must explain before the others are looked at."""
MOST_DAMAGED = 2
"""Sampled columns that may differ and still be damage of single elements."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The parts of a weight without Int4Weight's checks: groups of any size."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group_index: Tensor

    @classmethod
    def of(cls, weight: Int4Weight) -> Tables:
        return cls(weight.codes, weight.zeros, weight.scales, weight.group_index)

    @property
    def possible(self) -> bool:
        """Whether storage of some kind holds it: zero points from 0 to 16."""
        return bool((self.zeros <= 16).all())

    def columns(self, chosen: Tensor) -> Tables:
        """Some columns."""
        return Tables(self.codes[:, chosen], self.zeros[:, chosen], self.scales[:, chosen], self.group_index)

    def weight(self) -> Int4Weight:
        """An Int4Weight that decodes alike; where groups are not equally large, one group for each row."""
        g = self.group_index.long()
        sizes = torch.bincount(g, minlength=len(self.scales))
        if bool((sizes == sizes[0]).all()):
            return Int4Weight(self.codes, self.zeros, self.scales, self.group_index)
        rows = torch.arange(len(g), dtype=torch.int32)
        return Int4Weight(self.codes, self.zeros[g], self.scales[g], rows)

    def identical(self, other: Tables) -> bool:
        """Whether every part is the same."""
        parts = (self.codes, other.codes), (self.zeros, other.zeros), (self.scales, other.scales)
        return all(a is b or torch.equal(a, b) for a, b in (*parts, (self.group_index, other.group_index)))

    def same(self, other: Tables) -> bool:
        """Whether both decode alike under every rule and are sorted alike."""
        parts = (self.codes, other.codes), (self.group_index, other.group_index)
        mine, others = self.group_index.long(), other.group_index.long()
        looked_up = (self.zeros[mine], other.zeros[others]), (self.scales[mine], other.scales[others])
        return all(torch.equal(a, b) for a, b in (*parts, *looked_up))


WeightFault = Callable[[Any], Any]
"""From tables to the faulty ones; a fault of qlab.lab.faults works on them, too."""


@dataclass(frozen=True, eq=False)
class Reading:
    """How a recipe shows its weight to one-hot rows of ``2 ** power``: y = rule(w * 2 ** power) at row k % M."""

    recipe: Recipe
    bias: Tensor | None
    power: int

    @cached_property
    def rules(self) -> tuple[Output, ...]:
        """The output rules of the recipe's regions, each once."""
        return tuple(dict.fromkeys(region.output for region in self.recipe.regions))

    @cached_property
    def dotted(self) -> bool:
        """Whether the scale comes behind ExLlama's dots."""
        return has(self.recipe, HalfDot)

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for recipes that show a weight alike."""
        r = self.recipe
        where = () if len(self.rules) == 1 else tuple((region.rows, region.columns, region.output) for region in r.regions)
        return r.weights, self.dotted, self.rules, where

    def predict(self, t: Tables, columns: Tensor | None = None) -> Tensor:
        """What one-hot rows show of all [K, N], or of some columns, in the weight's dtype."""
        k, n = t.codes.shape
        if columns is None:
            return self.show(t, torch.arange(k), torch.arange(n))
        return self.show(t.columns(columns), torch.arange(k), columns)

    def show(self, t: Tables, rows: Tensor, columns: Tensor) -> Tensor:
        """The same of tables whose rows and columns are those of the weight that are named, in any order."""
        dtype = t.scales.dtype
        w = decode(self.recipe, t.codes, t.zeros, t.scales, t.group_index).float() * 2.0**self.power
        if self.dotted:
            w = w * t.scales.float()[t.group_index.long()]
        w = w.to(dtype)
        bias = None if self.bias is None else self.bias[columns]
        if len(self.rules) == 1:
            return _written(w, self.rules[0], t.scales, bias)
        out, row = torch.empty_like(w), rows % self.recipe.M
        for region in self.recipe.regions:
            inside = torch.zeros(len(columns), dtype=torch.bool)
            for start, stop in region.columns:
                inside |= (columns >= start) & (columns < stop)
            mask = ((row >= region.rows[0]) & (row < region.rows[1]))[:, None] & inside
            out = torch.where(mask, _written(w, region.output, t.scales, bias), out)
        return out


def _written(y: Tensor, rule: Output, scales: Tensor, bias: Tensor | None) -> Tensor:
    """A rounded sum under its output rule; fp16 products are exact in float64, and so are sums rounded once from it."""
    if rule.bias == "fused" and bias is not None:
        return round_once(y.double() * scales[:1].double() + bias.double(), y.dtype)
    if rule.scale:
        y = round_once(y.double() * scales[:1].double(), y.dtype)
    return round_once(y.double() + bias.double(), y.dtype) if rule.bias == "added" and bias is not None else y


WRAPPED = "zero points: 0 became 16 (minus one wrapped to 15 where GPTQ v1 stores it)"
CUT = "zero points: 16 became 0 (the one that GPTQ v1 adds was cut to four bits)"


def vocabulary(weight: Int4Weight) -> Iterator[tuple[Fault, WeightFault]]:
    """Every named fault for a weight of this shape. Zero points that four bits cannot hold wrap around, as in storage."""
    yield Fault(ONE_LOW), lambda t: replace(t, zeros=torch.where(t.zeros == 0, 15, t.zeros - 1).to(torch.uint8))
    yield Fault(ONE_HIGH), lambda t: replace(t, zeros=(t.zeros & 15) + 1)
    yield Fault(WRAPPED), lambda t: replace(t, zeros=torch.where(t.zeros == 0, 16, t.zeros).to(torch.uint8))
    yield Fault(CUT), lambda t: replace(t, zeros=t.zeros & 15)
    for name, change in hypotheses(weight):
        if name not in (ONE_LOW, ONE_HIGH):
            yield Fault(name), change


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two readings agree [K, N]; a weight of -0 shows as one of +0."""
    return (a == b) | (torch.isnan(a) & torch.isnan(b))


def sampled_columns(n: int, seed: int) -> Tensor:
    """Columns from all over the weight: int64 [SAMPLED], or all where there are fewer."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:SAMPLED].sort().values
