"""A map of recipes as data: what qlab/attribution/maps.py finds and qlab/report/maps.py shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from qlab.environment import Environment
from qlab.serial import read_json

SCHEMA = "qlab.map/1"


@dataclass(frozen=True)
class Shape:
    """The problem; the axis of the map replaces one of its numbers."""

    M: int
    K: int
    N: int
    group_size: int
    dtype: str
    act_order: bool
    symmetric: bool
    bias: bool


@dataclass(frozen=True)
class Function:
    """One way in which a row is computed (along K, one form of it): a class."""

    kernel: str
    """Registry name of the kernel that showed it first."""
    hash: str
    """sha256 of its columns with their trees and rules."""
    state: str
    """``fixed``: the bits are determined; ``atomics``: the order of a sum is not; ``opaque``: a library's sum, not modelled."""
    chains: tuple[int, ...]
    """Fewest and most chains that one output is summed from."""
    sums: int
    """Different sums over the columns."""
    note: str = ""
    """What is opaque."""


@dataclass(frozen=True)
class Point:
    """One value of the axis."""

    value: int
    kernel: str
    """Registry name of the kernel that runs; empty where none does."""
    reason: str = ""
    """The rule by which a label chose it, or why none runs."""
    function: int = -1
    """Class of row 0, by its place in ``Strip.functions``; -1 where no kernel runs."""
    same: bool | None = None
    """Whether row 0 keeps the bits that it has at the map's ``base``; None where that is not determined, and along K."""
    changed: float | None = None
    """Share of row 0's columns that another sum computes than at ``base`` (along K, a sum of another form)."""
    chains: tuple[tuple[int, int], ...] = ()
    """(chains, columns of row 0 that are summed from so many)."""
    structure: int = -1
    """Number of the set of forms that the call's sums have, lengths and places aside; equal numbers, equal sets."""
    rows: tuple[tuple[int, int], ...] = ()
    """Along M, from the first row to the last: (number of rows, their class)."""


@dataclass(frozen=True)
class Range:
    """Consecutive values of one class, both ends included."""

    first: int
    last: int
    function: int
    reason: str = ""
    """Where no kernel runs: why."""


@dataclass(frozen=True)
class OnGpu:
    """A GPU of the table."""

    gpu: str
    sms: int
    kernel: str
    reason: str
    function: int
    """Class of row 0 with this GPU's number of SMs and the tensor core of the map's GPU; -1 where no kernel runs."""
    recipe: str = ""
    """Hash of the whole recipe on this GPU, its own tensor core included: equal hashes, equal bits."""


@dataclass(frozen=True)
class Strip:
    """One kernel, or label, along the axis."""

    name: str
    columns: int
    """Columns that functions are compared over: those that every value has."""
    functions: tuple[Function, ...]
    """The classes: that of row 0 at ``base`` first, then those of row 0 and those of other rows in order of appearance."""
    points: tuple[Point, ...]
    ranges: tuple[Range, ...]
    gpus: tuple[OnGpu, ...] = ()
    """Along sms: every GPU of the table."""

    @property
    def classes(self) -> int:
        """Classes of row 0."""
        return len({p.function for p in self.points if p.kernel})

    def at(self, value: int) -> Point:
        """The point of a value of the map."""
        return next(p for p in self.points if p.value == value)

    def as_at(self, base: int) -> tuple[Range, ...]:
        """The ranges over which row 0 is of the class that it has at ``base``."""
        function = self.at(base).function
        return tuple(r for r in self.ranges if r.function == function >= 0)

    def rows_as_at(self, base: int, within: Range | None = None) -> float:
        """Along M: of all rows of all calls, or of those of a range, the share that is of row 0's class at ``base``."""
        function = self.at(base).function
        points = [p for p in self.points if within is None or within.first <= p.value <= within.last]
        every = [(count, f) for p in points for count, f in p.rows]
        return sum(count for count, f in every if f == function) / max(sum(count for count, _ in every), 1)


@dataclass(frozen=True)
class Map:
    """The answer of ``python -m qlab.kernels --map``."""

    schema: str
    environment: Environment
    arguments: dict[str, str]
    axis: str
    gpu: str
    sms: int
    shape: Shape
    values: tuple[int, ...]
    base: int
    """The value that every other is compared with: the smallest M; along N, K and sms that of the shape and the GPU."""
    strips: tuple[Strip, ...]

    @classmethod
    def read(cls, path: Path) -> Map:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, SCHEMA)


def ranges(points: Sequence[Point]) -> tuple[Range, ...]:
    """Neighbouring points of one class; where no kernel runs, of one reason."""
    out = []
    for (function, reason), group in groupby(points, key=lambda p: (p.function, "" if p.kernel else p.reason)):
        found = list(group)
        out.append(Range(found[0].value, found[-1].value, function, reason))
    return tuple(out)
