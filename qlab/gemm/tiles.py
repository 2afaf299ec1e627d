"""From a scheme's areas to output tiles: which variant of a kernel takes an area, and how the area is cut for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlab.errors import UnsupportedError
from qlab.recipes.rules import Span

FEW_ROWS = 16
"""Rows of an area up to which mma.sync is chosen; above them wgmma, where the GPU has it."""
DECODING, LOADING = 32, 16
"""Rows of x, or columns, whose products take as long as decoding the weight or loading x once."""
FULL = 0.75
"""Share of the multiprocessors that have work when a tile's slices are worth taking in turn."""
ROW_TILES = 8
"""Row tiles that walk along the columns together: what they read of x and of the weight then fits the L2 cache."""


class Variant(NamedTuple):
    """One compiled kernel, as ``_cuda.int4_variants()`` lists it."""

    kernel: str
    """``mma`` or ``wgmma``."""
    rows: int
    columns: int
    """Of its output tile."""
    chains: int
    """Accumulators that share a piece, by turns of 32 k."""
    total: bool
    """Whether it keeps a running total beside the accumulator, and so can begin new chains by itself."""
    number: int
    """By which it is launched."""
    per_sm: int = 1
    """Thread blocks that an SM runs at once, at least."""


@dataclass(frozen=True)
class Area:
    """A rectangle of the output with the pieces of its sum, ascending, and how many chains a piece has."""

    rows: Span
    columns: Span
    pieces: tuple[Span, ...]
    chains: int

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]


class OutputTile(NamedTuple):
    """What one or more thread blocks compute: a variant's tile, cut at the area's end."""

    row: int
    rows: int
    column: int
    pieces: tuple[Span, ...]


def available(variants: Iterable[Variant], capability: tuple[int, int]) -> tuple[Variant, ...]:
    """The variants that a GPU runs: wgmma is compiled for Hopper alone."""
    return tuple(v for v in variants if v.kernel == "mma" or capability == (9, 0))


def fits(v: Variant, area: Area, n: int, k: int) -> bool:
    """Whether the variant's tiles can be laid over the area without touching another."""
    if v.chains != area.chains or v.total:
        return False
    if area.width % v.columns and area.columns[1] != n:
        return False
    return v.kernel == "mma" or all(a % 64 == 0 and (b % 64 == 0 or b == k) for a, b in area.pieces)


def choose(area: Area, variants: Sequence[Variant], shape: tuple[int, int, int], sms: int, wish: Mapping[str, Any]) -> Variant:
    """The variant for an area: the one wished for where there is one that fits, else by a rule. Raises UnsupportedError.

    An area that is the whole output takes what keeps every multiprocessor busy; one of many areas takes the widest tile.
    """
    m, n, k = shape
    whole = (area.height, area.width) == (m, n)
    found = [v for v in variants if fits(v, area, n, k)]
    if not whole:  # so that the last area of a row takes what the others take
        found = [v for v in found if area.width % v.columns == 0] or found
    if not found:
        raise UnsupportedError(
            f"no variant has tiles for columns {area.columns[0]} to {area.columns[1]} with {area.chains} accumulators a piece"
        )
    for name in ("kernel", "rows", "columns"):
        found = [v for v in found if name in wish and getattr(v, name) == wish[name]] or found
    best = "mma" if area.height <= FEW_ROWS else "wgmma"
    if "kernel" not in wish:
        found = [v for v in found if v.kernel == best] or found
    if "rows" not in wish:
        found = _rows(found, area.height)
    if not whole:
        return max(found, key=lambda v: (v.columns, v.rows))
    return min(found, key=lambda v: _cost(v, area, sms))


def _rows(found: list[Variant], height: int) -> list[Variant]:
    """The lowest tiles that hold all rows, or those that do not need more than twice as many as the highest ones."""
    enough = [v.rows for v in found if v.rows >= height]
    if enough:
        return [v for v in found if v.rows == min(enough)]
    highest = max(v.rows for v in found)
    return [v for v in found if 2 * v.rows >= highest]


def _cost(v: Variant, area: Area, sms: int) -> tuple[float, int, int]:
    """What the busiest multiprocessor has to do; of equal costs the larger tile."""
    tiles = -(-area.height // v.rows) * -(-area.width // v.columns)
    blocks = tiles * len(area.pieces)
    busiest = -(-blocks // max(sms, 1)) * (v.columns + LOADING) * (v.rows + DECODING) / len(area.pieces)
    return busiest, -v.columns, -v.rows


def totals(area: Area, variants: Sequence[Variant], n: int, k: int, sms: int) -> Variant | None:
    """A variant that takes all slices of a tile in turn, where the tiles alone keep the multiprocessors busy."""
    found = [v for v in variants if v.total and fits(v._replace(total=False), area, n, k)]
    filled = [v for v in found if -(-area.height // v.rows) * -(-area.width // v.columns) >= FULL * sms]
    return min(filled, key=lambda v: _cost(v, area, sms), default=None)


def cut(area: Area, v: Variant) -> Iterator[OutputTile]:
    """The area in the variant's tiles, row tiles first."""
    for column in range(*area.columns, v.columns):
        for row in range(*area.rows, v.rows):
            yield OutputTile(row, min(v.rows, area.rows[1] - row), column, area.pieces)


def raster(tiles: Iterable[OutputTile], rows: int) -> list[OutputTile]:
    """Tiles in the order that they are started in: some row tiles together, along the columns."""
    return sorted(tiles, key=lambda t: (t.row // (rows * ROW_TILES), t.column, t.row))
