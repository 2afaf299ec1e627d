"""Which slices of K and which tile a kernel of ours takes, by GPU and shape: a table that is part of the recipe.

A tuner that is run on purpose writes the tables (``qlab/data/tuned/GPU-KERNEL.json``); nothing is tuned while a kernel runs,
since the number of slices decides the bits. GPUs of one design read one table (:data:`SHARED`). :func:`choice` looks up

1. the shape: an entry with this K and N or, where there is none, the nearest one, by the product of the larger over the smaller
   K and the larger over the smaller N, if that is at most :data:`NEAR`; the first in the file where two are equally near;
2. the rows: of that shape's entries the one with the fewest ``rows`` that holds M, or the one with the most.

Without a table, or with no shape near, a rule from the shape alone decides (:func:`heuristic`). Either way there are at most as
many slices as K has blocks of 128 rows. Tiles never change the bits, so that a launcher may take another one; slices do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlab.errors import QlabError
from qlab.serial import read_json, write_json

SCHEMA = "qlab.tuned/1"
FOLDER = Path(__file__).resolve().parents[1] / "data" / "tuned"
SHARED = {"h200": "h100"}
"""GPUs that read another one's table: their tensor cores and SM counts are the same, so that their bits are."""
ONE_RECIPE = ("cuda.batch_invariant",)
"""Kernels whose slices may depend on K and N only: those for one row hold for every M."""
NEAR = 4
SLICE = 128
"""Rows of K that slices are multiples of."""
SLICES = (1, 2, 4, 8)
FEW_ROWS = 16
"""Rows up to which the tiles are those of mma.sync; above they are those of wgmma."""
FEW_COLUMNS, MANY_COLUMNS = 128, 256
"""Columns of a tile for few and for many rows."""
FEW_BLOCKS, MANY_BLOCKS = 128, 132
"""Thread blocks that are enough for few rows, and that run at once for many."""
FEWEST_ROWS, JOIN = 48, 43
"""Rows of a tile below which its time is that of its weights; products in the time of one number's way to a join and back."""

Value = int | str | bool


@dataclass(frozen=True)
class Choice:
    """Slices of K, and what else a launcher wants to know: names and values of its own, empty without a table."""

    slices: int
    config: tuple[tuple[str, Value], ...] = ()

    def get(self, name: str, default: Value) -> Value:
        return dict(self.config).get(name, default)


@dataclass(frozen=True, eq=False)
class Entry:
    """What is best for one K and N up to ``rows`` rows of x."""

    k: int
    n: int
    rows: int
    slices: int
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Table:
    """The entries of one kernel on one GPU, and the command or commit that they come from."""

    schema: str
    gpu: str
    kernel: str
    source: str
    entries: tuple[Entry, ...]


def choice(kernel: str, gpu_key: str, m: int, k: int, n: int) -> Choice:
    """What ``kernel`` takes for x [m, k] and a weight [k, n] on ``gpu_key``, by the rules of this module."""
    chosen = _choice(kernel, gpu_key, m, k, n)
    slices = _choice(kernel, gpu_key, 1, k, n).slices if kernel in ONE_RECIPE else chosen.slices
    return replace(chosen, slices=len(ranges(k, slices)))


def ranges(k: int, count: int) -> tuple[tuple[int, int], ...]:
    """``count`` contiguous slices of K, ascending: multiples of 128 rows but for the last; fewer where some would be empty."""
    rows = -(-k // (count * SLICE)) * SLICE
    return tuple((start, min(start + rows, k)) for start in range(0, k, rows))


def heuristic(m: int, k: int, n: int) -> Choice:
    """1, 2, 4 or 8 slices, from the shape alone.

    For few rows the fewest that give :data:`FEW_BLOCKS` thread blocks; for more the number that would be fastest if every
    thread block took a time proportional to its products, and a join one proportional to its numbers.
    """
    possible = [s for s in SLICES if s == 1 or s * SLICE <= k]
    if m <= FEW_ROWS:
        tiles = -(-n // FEW_COLUMNS)
        return Choice(next((s for s in possible if tiles * s >= FEW_BLOCKS), possible[-1]))
    rows = min(m, 128)
    tiles = -(-n // MANY_COLUMNS) * -(-m // rows)

    def time(s: int) -> int:
        return -(-tiles * s // MANY_BLOCKS) * max(rows, FEWEST_ROWS) * k // s + (s * m * n // JOIN if s > 1 else 0)

    return Choice(min(possible, key=time))


def path(kernel: str, gpu_key: str) -> Path:
    """The table's file, whether or not there is one."""
    return FOLDER / f"{SHARED.get(gpu_key, gpu_key)}-{kernel}.json"


def write(table: Table) -> Path:
    """Write a table where :func:`choice` reads it. Raises QlabError for entries that it would refuse."""
    _check(table)
    FOLDER.mkdir(exist_ok=True)
    file = path(table.kernel, table.gpu)
    write_json(file, table)
    read.cache_clear()
    return file


@lru_cache(maxsize=64)
def read(kernel: str, gpu_key: str) -> Table | None:
    """The table of a kernel on a GPU, None where there is none. Raises QlabError for a damaged file."""
    file = path(kernel, gpu_key)
    if not file.is_file():
        return None
    table = read_json(Table, file, SCHEMA)
    _check(table)
    return table


def _choice(kernel: str, gpu_key: str, m: int, k: int, n: int) -> Choice:
    table = read(kernel, gpu_key)
    near = nearest(table.entries, k, n) if table else ()
    if not near:
        return heuristic(m, k, n)
    held = [e for e in near if e.rows >= m]
    entry = min(held, key=lambda e: e.rows) if held else max(near, key=lambda e: e.rows)
    return Choice(entry.slices, tuple(sorted(entry.config.items())))


def nearest(entries: tuple[Entry, ...], k: int, n: int) -> tuple[Entry, ...]:
    """The entries of the nearest shape; none where no shape is near."""

    def apart(shape: tuple[int, int]) -> Fraction:
        return Fraction(max(shape[0], k), min(shape[0], k)) * Fraction(max(shape[1], n), min(shape[1], n))

    shapes = dict.fromkeys((e.k, e.n) for e in entries)
    best = min(shapes, key=apart, default=None)
    if best is None or apart(best) > NEAR:
        return ()
    return tuple(e for e in entries if (e.k, e.n) == best)


def _check(table: Table) -> None:
    for why in _faults(table):
        raise QlabError(f"the table of {table.kernel} on {table.gpu}: {why}")


def _faults(table: Table) -> Iterator[str]:
    places = [(e.k, e.n, e.rows) for e in table.entries]
    if len(set(places)) < len(places):
        yield "two entries have the same k, n and rows"
    for e in table.entries:
        if min(e.k, e.n, e.rows, e.slices) < 1:
            yield f"k={e.k}, n={e.n}, rows={e.rows} and slices={e.slices} must be positive"
        if wrong := [name for name, value in e.config.items() if not isinstance(value, Value)]:
            yield f"k={e.k}, n={e.n}, rows={e.rows}: {wrong[0]} is neither a number nor a word"
    if table.kernel in ONE_RECIPE:
        counts: dict[tuple[int, int], int] = {}
        for e in table.entries:
            if counts.setdefault((e.k, e.n), e.slices) != e.slices:
                yield f"k={e.k}, n={e.n} has two numbers of slices, and its recipe is to be the same for every M"
