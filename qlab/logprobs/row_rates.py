"""Predicted rates: how often two candidates write other bits, and how many rows a verifier therefore needs.

Measured by replay on real activations. Rows are the units: elements of one row hang together, so that no interval is taken over
elements. Row i of the input stands at place i mod M of M, so that all places are in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.engine.path import Path
from qlab.errors import QlabError, UnsupportedError
from qlab.lab.run import SAME
from qlab.lab.run import Layer as LabLayer
from qlab.logprobs.row_bench import Layer, RowBench
from qlab.logprobs.row_errors import CALIBRATION, ERROR, exclusion_rows, upper
from qlab.logprobs.row_record import Place
from qlab.replay.operands import bits

ALL = "all"
"""In place of a linear's kind: all of them together, as a sample over all linears finds them."""
FREE_ROWS = 32
"""Rows per linear whose outputs are compared with what atomics can reach, which takes longer than equality."""
GENERATED, REPLAYED = 1, 2
"""Seeds of the orders of atomics: a verifier does not know the generator's."""
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Rate:
    """Rows of one kind of linear, written by a generator and tried on a candidate."""

    generator: str
    candidate: str
    linear: str
    """Last part of the name, or ``all``."""
    M: int
    K: int
    """0 for all linears."""
    N: int
    rows: int
    elements: int
    differing: int
    """Elements with other bits; for atomics in one order each."""
    share: float
    low: float
    """95% interval of the share, from the spread over rows."""
    high: float
    tried: int
    """Rows on which the candidate was tried as :func:`qlab.logprobs.rows.verify_by_replay` tries it."""
    passed: int
    """Rows that do not exclude the candidate: equal bits, or within reach of its atomics."""
    passes: float
    """Upper bound of the probability that a row does not exclude it (Clopper and Pearson, one-sided, risk 5e-7)."""
    needed: float
    """Rows after which the candidate survives with probability 1e-6 at most, by the measured probability."""
    needed_bound: float
    """The same by the bound, 5e-7 of the 1e-6 being the bound's own risk."""
    same: bool
    """One function on every row, by its recipe: no number of rows tells the two apart."""


@dataclass
class _Cell:
    """What is gathered for one generator, candidate, linear and M."""

    counts: list[Counts] = field(default_factory=list)
    sizes: list[Counts] = field(default_factory=list)
    """Elements of each of those rows."""
    tried: int = 0
    passed: int = 0
    same: bool = True

    def take(self, other: _Cell) -> None:
        """Add another linear's rows."""
        self.counts += other.counts
        self.sizes += other.sizes
        self.tried += other.tried
        self.passed += other.passed
        self.same &= other.same


def measure(
    layers: Iterable[LabLayer],
    paths: Sequence[Path],
    ms: Sequence[int],
    *,
    advance: Callable[[int], None] = lambda layers: None,
) -> tuple[tuple[Rate, ...], dict[str, str]]:
    """Rates of every pair of ``paths`` for calls of each of ``ms`` tokens, and the reasons of paths that cannot be replayed.

    ``layers`` come from :mod:`qlab.lab.sources`. A pair on one checkpoint whose sums are ordered has one rate, the first path
    its generator; other pairs have one in each direction, since the generator's input is the one that counts, and a path with
    atomics has one with itself. Raises QlabError where every path is refused.
    """
    cells: dict[tuple[str, str, str, int, int, int], _Cell] = {}
    refused: dict[str, str] = {}
    for layer in layers:
        work = Replays(layer)
        for m in ms:
            able = []
            for path in paths:
                if reason := work.refusal(path, m):
                    refused[f"{path}, M = {m}"] = reason
                else:
                    able.append(path)
            for a, b in _pairs(able, work, m):
                kind = layer.name.rpartition(".")[2]
                bench = work.bench(a)
                key = (str(a), str(b), kind, m, bench.weight.K, bench.weight.N)
                _add(cells.setdefault(key, _Cell()), work, a, b, m)
        advance(1)
    if not cells:
        raise QlabError(f"no two paths can be compared by replay: {'; '.join(refused.values()) or 'name two'}")
    for (a_, b_, _, m, _, _), cell in list(cells.items()):
        cells.setdefault((a_, b_, ALL, m, 0, 0), _Cell()).take(cell)
    found = [_rate(*key, cell) for key, cell in cells.items()]
    return tuple(sorted(found, key=lambda r: (r.generator, r.candidate, r.M, r.linear == ALL))), refused


class Replays:
    """One layer's rows under paths, each replayed once."""

    def __init__(self, layer: LabLayer, device: torch.device | str = "cpu") -> None:
        self.layer, self.device = layer, device
        self._benches: dict[str, RowBench] = {}
        self._known: dict[tuple[Path, str, int, int], Tensor] = {}

    def source(self, path: Path) -> str:
        """Family of the path's checkpoint in this layer."""
        return SAME if SAME in self.layer.weights else path.source or "gptq"

    def bench(self, path: Path) -> RowBench:
        source = self.source(path)
        if source not in self._benches:
            self._benches[source] = RowBench(Layer(self.layer.weights[source]), self.device)
        return self._benches[source]

    def x(self, path: Path) -> Tensor:
        """The rows that a generator on ``path`` would feed."""
        return self.layer.inputs[self.source(path)]

    def places(self, path: Path, m: int) -> list[Place]:
        return [(i % m, m) for i in range(len(self.x(path)))]

    def refusal(self, path: Path, m: int) -> str:
        """Why a path cannot be replayed for ``m`` tokens."""
        try:
            self.bench(path).recipe(path, m)
        except UnsupportedError as e:
            return str(e)
        return ""

    def ordered(self, path: Path, m: int) -> bool:
        return self.bench(path).recipe(path, m).ordered

    def y(self, path: Path, generator: Path, m: int, seed: int) -> Tensor:
        """What ``path`` gives for the generator's rows, [rows, N]."""
        key = (path, self.source(generator), m, 0 if self.ordered(path, m) else seed)
        if key not in self._known:
            self._known[key] = self.bench(path).replay(path, self.places(generator, m), self.x(generator), seed)
        return self._known[key]

    def counts(self, generator: Path, other: Path, m: int) -> Counts:
        """Elements per row in which the two differ."""
        mine, theirs = self.y(generator, generator, m, GENERATED), self.y(other, generator, m, REPLAYED)
        return np.asarray((bits(mine) != bits(theirs)).sum(1), np.int64)

    def same(self, a: Path, b: Path, m: int) -> bool:
        """Whether both are one function on every row, with all bits determined."""
        one, other = self.bench(a), self.bench(b)
        if one.digest != other.digest or not self.ordered(a, m):
            return False
        return one.recipe(a, m).hash == other.recipe(b, m).hash or all(
            one.function(a, (r, m)) == other.function(b, (r, m)) for r in range(m)
        )


def _pairs(paths: Sequence[Path], work: Replays, m: int) -> list[tuple[Path, Path]]:
    found = []
    for i, a in enumerate(paths):
        if not work.ordered(a, m):
            found.append((a, a))
        for b in paths[i + 1 :]:
            found.append((a, b))
            if work.source(a) != work.source(b) or not (work.ordered(a, m) and work.ordered(b, m)):
                found.append((b, a))
    return found


def _add(cell: _Cell, work: Replays, a: Path, b: Path, m: int) -> None:
    counts = work.counts(a, b, m)
    bench = work.bench(b)
    cell.counts.append(counts)
    cell.sizes.append(np.full_like(counts, bench.weight.N))
    cell.same &= work.same(a, b, m)
    if work.ordered(b, m):
        cell.tried += len(counts)
        cell.passed += int((counts == 0).sum())
        return
    rows = min(FREE_ROWS, len(counts))
    x, y = work.x(a)[:rows], work.y(a, a, m, GENERATED)[:rows]
    cell.tried += rows
    cell.passed += rows - len(bench.unreachable(b, work.places(a, m)[:rows], x, y))


def _rate(generator: str, candidate: str, linear: str, m: int, k: int, n: int, cell: _Cell) -> Rate:
    counts, sizes = np.concatenate(cell.counts), np.concatenate(cell.sizes)
    differing, elements = int(counts.sum()), int(sizes.sum())
    share, n_rows = differing / elements, len(counts)
    # A ratio over rows: the spread of what is left of each row's count, elements of a row hanging together as they may.
    spread = math.sqrt(float(((counts - share * sizes) ** 2).sum()) * n_rows / max(n_rows - 1, 1)) / elements
    half = 1.96 * spread if n_rows > 1 else math.inf
    passes = 1.0 if cell.same else upper(cell.passed, cell.tried)
    needed = math.inf if cell.same else exclusion_rows(cell.passed / cell.tried, ERROR)
    return Rate(
        generator,
        candidate,
        linear,
        m,
        k,
        n,
        n_rows,
        elements,
        differing,
        share,
        max(0.0, share - half),
        min(1.0, share + half),
        cell.tried,
        cell.passed,
        passes,
        needed,
        exclusion_rows(passes, ERROR - CALIBRATION),
        cell.same,
    )
