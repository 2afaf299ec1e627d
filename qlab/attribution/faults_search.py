"""Which weights, and which of them under which recipes, give the bits that a kernel gave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qlab.attribution.fault import Fault
from qlab.attribution.faults_damage import OTHER_GROUPS, damage, regrouped
from qlab.attribution.faults_recipe import Variant
from qlab.attribution.faults_weight import MOST_DAMAGED, Reading, Tables, same, sampled_columns, vocabulary
from qlab.replay.operands import operands, row_order
from qlab.replay.prepared import Panel
from qlab.weights import Int4Weight


@dataclass(frozen=True, eq=False)
class Candidate:
    """A weight and the faults that make it of the clean one."""

    tables: Tables
    faults: tuple[Fault, ...]

    @cached_property
    def weight(self) -> Int4Weight:
        """Built on first use."""
        return self.tables.weight()


class Weights:
    """The weights that explain what one-hot rows showed, by number of faults."""

    def __init__(self, weight: Int4Weight, got: Tensor, seed: int) -> None:
        self.weight, self.got = weight, got
        self.clean = Tables.of(weight)
        self.columns = sampled_columns(weight.N, seed)
        self.sample = got[:, self.columns]
        self._known: dict[tuple[object, ...], dict[int, tuple[Candidate, ...]]] = {}
        self.none = Candidate(self.clean, ())

    @cached_property
    def single(self) -> tuple[Candidate, ...]:
        """Each named fault that changes this weight."""
        return tuple(self._after(self.none))

    def double(self) -> Iterator[Candidate]:
        """Two named faults, in either order; made one by one, for each may hold a whole weight."""
        return (c for first in self.single for c in self._after(first))

    def _after(self, first: Candidate) -> Iterator[Candidate]:
        kinds = {f.kind for f in first.faults}
        for fault, change in vocabulary(self.weight):
            if fault.kind in kinds:
                continue
            tables = change(first.tables)
            if tables.possible and not tables.identical(first.tables):
                yield Candidate(tables, (*first.faults, fault))

    def of(self, reading: Reading, count: int) -> tuple[Candidate, ...]:
        """Those of ``count`` faults; none where fewer explain all, for then there is nothing left to explain."""
        known = self._known.setdefault(reading.key, {})
        if count not in known:
            fewer = any(self.of(reading, c) for c in range(count))
            known[count] = () if fewer else tuple(self._search(reading, count))
        return known[count]

    def _search(self, reading: Reading, count: int) -> list[Candidate]:
        bases = ((self.none,), self.single if count else (), self.double() if count > 1 else ())
        found: list[Candidate] = []
        for level in range(min(count, 2), -1, -1):
            for base in bases[level]:
                for tables, more in self._explained(reading, base.tables, count - level):
                    new = Candidate(tables, (*base.faults, *more))
                    solved = any(f.kind == OTHER_GROUPS for f in more)
                    if len(new.faults) == count and not (solved and any(tables.same(c.tables) for c in found)):
                        found.append(new)
        return found

    def _explained(self, reading: Reading, t: Tables, most: int) -> Iterator[tuple[Tables, tuple[Fault, ...]]]:
        """Up to ``most`` further faults, solved for, with which the tables show all that was read."""
        agree = same(reading.predict(t, self.columns), self.sample)
        wrong = int((~agree).any(0).sum())
        if wrong <= (MOST_DAMAGED if most else 0):
            if most:
                solved = damage(reading, t, self.got)
                if solved is not None and len(solved[1]) <= most:
                    yield solved
            elif bool(same(reading.predict(t), self.got).all()):
                yield t, ()
        elif most and (found := regrouped(reading, t, self.sample, self.columns)) is not None:
            tables, fault = found
            for more, faults in self._explained(reading, tables, most - 1):
                yield more, (fault, *faults)


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A kernel that may be the one that was probed."""

    weight: Candidate
    variant: Variant

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Those of the weight, then those of the recipe."""
        return (*self.weight.faults, *self.variant.faults)

    @property
    def names(self) -> tuple[tuple[Fault, ...], ...]:
        """All names for it of equally many faults."""
        return tuple((*self.weight.faults, *v) for v in (self.variant.faults, *self.variant.also))

    def equals(self, other: Hypothesis) -> bool:
        """Whether both are one function, by construction."""
        return self.variant.recipe.hash == other.variant.recipe.hash and self.weight.tables.same(other.weight.tables)


@dataclass(frozen=True, eq=False)
class Seen:
    """What the kernel gave for x [M, K]: y's bits int16 [M, N]."""

    kind: str
    x: Tensor
    y: Tensor


class Replays:
    """Replays of hypotheses, their weights decoded once; ``slab`` holds the columns that are compared first."""

    def __init__(self, bias: Tensor | None, slab: tuple[int, int]) -> None:
        self.bias, self.slab = bias, slab
        self._panels: dict[tuple[int, str, str, bool], tuple[Candidate, Panel, Tensor | None]] = {}

    def run(self, h: Hypothesis, x: Tensor, part: bool = False) -> Tensor:
        """y's bits int16 [M, N], or of the slab's columns alone."""
        panel, order = self._panel(h, part)
        program = h.variant.program.columns(*self.slab) if part else h.variant.program
        y = panel.run("native", program, x if order is None else x[:, order])
        return y.view(torch.int16)

    def agrees(self, h: Hypothesis, seen: Sequence[Seen]) -> bool:
        """Whether the hypothesis gives every bit of every output."""
        if not seen:
            return True
        first = seen[0]
        if not torch.equal(self.run(h, first.x, part=True), first.y[:, slice(*self.slab)]):
            return False
        return all(torch.equal(self.run(h, s.x), s.y) for s in seen)

    def _panel(self, h: Hypothesis, part: bool) -> tuple[Panel, Tensor | None]:
        r = h.variant.recipe
        key = (id(h.weight), r.weights, r.rows, part)
        if key not in self._panels:
            weight = h.weight.weight
            start, stop = self.slab if part else (0, weight.N)
            order = row_order(r, weight)
            made = Panel(start, stop, operands(r, weight, slice(start, stop), order, self.bias))
            self._panels[key] = h.weight, made, order  # the candidate is kept, so that its id stays its own
        _, panel, order = self._panels[key]
        return panel, order
