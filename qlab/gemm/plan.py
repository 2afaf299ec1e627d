"""From a scheme to launches: which piece of K of which output tile each thread block takes, and in which order sums are joined.

A piece is one output tile over a contiguous range of K, summed by one thread block. The kernels (csrc/int4_mma.cuh,
int4_wgmma.cuh) execute any list of pieces, so that a plan serves Marlin's stripes for any number of multiprocessors as well as
slices of K. Tiles may be cut along rows and columns at will: no output reads another's sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.gemm.balance import dealt, equal_shares
from qlab.gemm.tiles import Area, OutputTile, Variant, available, choose, cut, raster, totals
from qlab.hardware import Gpu
from qlab.packing import fragments
from qlab.recipes.rules import CHUNK, PlainBias
from qlab.recipes.scheme import NATURAL, UNROUNDED, Scheme

Int32 = NDArray[np.int32]
MOST_PIECES = (1 << 15) - 1
"""Of one tile, as the last number of a piece has room for."""
CLUSTERS = (9, 0)
"""The first compute capability with clusters of thread blocks, which read each other's shared memory."""
MOST_CLUSTER = 8
"""Thread blocks of a cluster, on every such GPU."""
CLUSTER = 2
"""Thread blocks of the clusters that are taken unless another number is wished for: larger ones leave multiprocessors idle."""
TOTAL_ROWS = 64
"""Rows above which one thread block may take all slices of a tile in turn."""


class Join(IntEnum):
    """Who joins the pieces of a tile in the workspace (int4_fragments.cuh)."""

    LAST = 0
    """The thread block that comes last."""
    SHARED = 1
    """All of the tile's, each some of the sums; every thread block has one piece."""
    FIRST = 2
    """The one with the first rows of K, for which it is the last piece. All thread blocks run at once."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch."""

    variant: Variant
    pieces: Int32
    """[P, 8]: row, rows, column, k begin, k end, tile, first, rank * 65536 + count (int4_fragments.cuh)."""
    starts: Int32
    """[C + 1]: thread block b takes the pieces from starts[b] to starts[b + 1]."""
    counters: int
    """Tiles that several pieces share: one counter each, zero before and after."""
    partials: int
    """Sums that pieces leave in the workspace, each of a whole tile of the variant."""
    cut: int = 0
    """Rows of K after which a thread block adds its chain to a running total and begins anew; 0: never."""
    cluster: int = 1
    """Thread blocks of a cluster, which hold the pieces of one tile in the order of joining, without workspace; 1: none."""
    join: Join = Join.LAST
    slice_rows: int = 0
    """Rows of K of a slice where thread block b has slice b % slices of the column tile b // slices and nothing else, so that
    the kernel need not read it; 0: in the arrays alone."""

    @property
    def blocks(self) -> int:
        return len(self.starts) - 1

    @property
    def slices(self) -> int:
        """Pieces of a tile where all have as many."""
        return int(self.pieces[0, 7]) & 0xFFFF

    @property
    def workspace(self) -> int:
        """fp32 numbers."""
        return self.partials * self.variant.rows * self.variant.columns


@dataclass(frozen=True, eq=False)
class Plan:
    """Launches that compute one problem, one after another on one stream."""

    launches: tuple[Launch, ...]
    integer: bool
    """Whether weights are q - z and the rounded sum is multiplied by the column's scale."""


def refusal(scheme: Scheme, problem: Problem, gpu: Gpu) -> str:
    """Why the kernels cannot execute a scheme on ``gpu``, whatever their tiles: one sentence, empty where they can."""
    s, step = scheme, gpu.step
    if s.unit != "tensor core" or s.accumulator != "fp32":
        return f"only tensor cores with fp32 accumulators are planned, not {s.unit} with {s.accumulator}"
    if (s.fraction_bits, s.terms) != (step.fraction_bits, step.terms):
        given, has = (s.fraction_bits, s.terms), (step.fraction_bits, step.terms)
        return f"its fused sums have F, L = {given}, and {gpu.key}'s tensor cores have {has}"
    if (s.weights, s.scale) not in (("rounded", "weight"), ("integer", "output")):
        return f"weights are rounded with their scale or integers with it on the sum, not {s.weights} with it on the {s.scale}"
    if s.weights == "integer" and problem.group_size != problem.K:
        return f"integers need one scale a column, and this weight has groups of {problem.group_size}"
    if problem.act_order and s.rows != "sorted":
        return "under act-order rows are stored sorted by group, and the scheme takes them in their own order"
    if s.k_width != NATURAL:
        return f"kWidth {s.k_width} permutes the k of a dot, and the kernels take them in order"
    if s.order not in ("ascending", "descending") or s.type != "fp32" or s.partial != UNROUNDED:
        return f"pieces are joined in fp32 up or down without a rounding between, not {s.order} in {s.type}: {s.partial}"
    if s.bias != PlainBias():
        return "no bias is added inside the kernels"
    return fragments.refusal(problem.K, problem.N, problem.group_size)


def make_plan(
    scheme: Scheme, problem: Problem, gpu: Gpu, variants: Sequence[Variant], wish: Mapping[str, Any] | None = None
) -> Plan:
    """The launches for x [M, K], M at least 1, on ``gpu``.

    ``wish`` names a variant's kernel, rows, columns or total (0 or 1), which is followed where such tiles fit, and the size of
    clusters that join a tile; 0 keeps to the workspace. Raises UnsupportedError with the reason where a scheme cannot be
    planned.
    """
    if why := refusal(scheme, problem, gpu):
        raise UnsupportedError(f"the INT4 kernels cannot execute this scheme: {why}")
    m, k, n = problem.M, problem.K, problem.N
    usable, wish = available(variants, gpu.capability), wish or {}
    areas = list(_areas(scheme, k))
    whole = len(areas) == 1
    if whole and (launch := _in_turn(scheme, areas[0], usable, n, k, gpu.sms, wish)):
        return Plan((launch,), scheme.weights == "integer")
    chosen: dict[tuple[Any, ...], Variant] = {}
    by_variant: dict[Variant, list[Area]] = {}
    for area in areas:
        key = (area.height, area.width, area.columns[1] == n, area.chains, _odd(area.pieces))
        if key not in chosen:
            chosen[key] = choose(area, usable, (m, n, k), gpu.sms, wish)
        by_variant.setdefault(chosen[key], []).append(area)
    descending = scheme.order == "descending"
    clusters = int(wish.get("cluster", CLUSTER)) if gpu.capability >= CLUSTERS else 0
    blocks = scheme.cut.blocks(scheme.sms)
    launches = [_launch(v, found, blocks, clusters, descending, gpu.sms) for v, found in by_variant.items()]
    return Plan(tuple(launches), scheme.weights == "integer")


def _areas(scheme: Scheme, k: int) -> Iterator[Area]:
    """The scheme's areas, cut at the bands of its chains. Raises UnsupportedError where pieces are not as kernels take them."""
    bands = scheme.warps.bands(scheme.sms)
    for area in scheme.cut.areas(scheme.sms):
        pieces = []
        for walk in area.pieces:
            if len(walk) != 1 or walk[0].count != 1:
                raise UnsupportedError("the INT4 kernels take contiguous ranges of K, and a piece of this scheme is not one")
            pieces.append((walk[0].start, walk[0].start + walk[0].length))
        for start, stop, chains in bands or ((area.rows[0], area.rows[1], 1),):
            rows = max(area.rows[0], start), min(area.rows[1], stop)
            if rows[0] < rows[1]:
                _check(area.columns[0], pieces, chains, k)
                yield Area(rows, area.columns, tuple(pieces), chains)


def _check(column: int, pieces: Sequence[tuple[int, int]], chains: int, k: int) -> None:
    """Raise UnsupportedError for a column or pieces that the layout and the turns of the chains do not allow."""
    if column % fragments.COLUMNS:
        raise UnsupportedError(f"the INT4 kernels' tiles begin at multiples of {fragments.COLUMNS} columns, not at {column}")
    if len(pieces) > MOST_PIECES:
        raise UnsupportedError(f"a tile has {len(pieces)} pieces, and the INT4 kernels join at most {MOST_PIECES}")
    if any(start % (CHUNK * chains) or (stop % CHUNK and stop != k) or start >= stop for start, stop in pieces):
        raise UnsupportedError(
            f"the INT4 kernels take pieces of whole turns of {CHUNK * chains} rows of K, and a piece of this scheme is not"
        )


def _odd(pieces: Sequence[tuple[int, int]]) -> bool:
    """Whether a piece ends inside 64 rows, which wgmma's kernels take at a time."""
    return any(start % 64 or stop % 64 for start, stop in pieces)


def _in_turn(
    scheme: Scheme, area: Area, variants: Sequence[Variant], n: int, k: int, sms: int, wish: Mapping[str, Any]
) -> Launch | None:
    """One thread block for each tile, which takes equal slices in turn and keeps the total: the bits of separate pieces.

    Where it is wished for, or where nothing is said and the tiles alone keep the multiprocessors busy.
    """
    length = area.pieces[0][1]
    equal = all(piece == (i * length, min((i + 1) * length, k)) for i, piece in enumerate(area.pieces))
    wished = wish.get("total")
    if len(area.pieces) == 1 or not equal or length % 128 or scheme.order != "ascending" or wished == 0:
        return None
    if wished is None and (area.height <= TOTAL_ROWS or "kernel" in wish):
        return None
    sizes = [name for name in ("rows", "columns") if name in wish]
    fit = [v for v in variants if all(getattr(v, name) == wish[name] for name in sizes)]
    variant = totals(area, fit, n, k, 0 if wished else sms)
    if variant is None:
        return None
    one = Area(area.rows, area.columns, ((0, k),), area.chains)
    return _launch(variant, [one], 0, 0, False, sms, length)


def _launch(
    v: Variant, areas: Sequence[Area], blocks: int, clusters: int, descending: bool, sms: int, cut_rows: int = 0
) -> Launch:
    """``blocks``: thread blocks that share the areas' pieces, each area's parts apart; 0: a thread block for each piece."""
    tiles = [list(cut(area, v)) for area in areas]
    if blocks:
        dealt_out = [run for part in _parts(tiles) for run in _shared_out(part, v.rows, blocks)]
    else:
        ordered = raster((t for area in tiles for t in area), v.rows)
        dealt_out = [[(t, i)] for t in ordered for i in range(len(t.pieces))]
    return _arrays(v, dealt_out, clusters, descending, sms, cut_rows)


Work = tuple[OutputTile, int]
"""A tile and the number of one of its pieces."""


def _parts(tiles: Sequence[Sequence[OutputTile]]) -> Iterator[list[OutputTile]]:
    """The first tile of every area, then the second of every area, and so on."""
    for i in range(max(map(len, tiles))):
        yield [area[i] for area in tiles if i < len(area)]


def _shared_out(tiles: Sequence[OutputTile], rows: int, blocks: int) -> list[list[Work]]:
    """Equal shares of tiles that are one piece, then the pieces of the others, end to end."""
    whole = set(equal_shares([len(t.pieces) == 1 for t in tiles], blocks))
    first = raster((tiles[i] for i in sorted(whole)), rows)
    rest = [(t, i) for place, t in enumerate(tiles) if place not in whole for i in range(len(t.pieces))]
    work = [*((t, 0) for t in first), *rest]
    lengths = [t.pieces[i][1] - t.pieces[i][0] for t, i in rest]
    return [[work[i] for i in block] for block in dealt(len(first), lengths, blocks)]


def _arrays(
    v: Variant, dealt_out: Sequence[Sequence[Work]], clusters: int, descending: bool, sms: int, cut_rows: int
) -> Launch:
    """The arrays that the kernels read."""
    counts = {t[:3]: len(t.pieces) for block in dealt_out for t, _ in block}
    sizes = set(counts.values())
    alone = all(len(b) == 1 for b in dealt_out)
    cluster = sizes.pop() if len(sizes) == 1 and alone else 1
    if cluster != clusters or cluster > MOST_CLUSTER:
        cluster = 1
    if cluster > 1:  # a tile's thread blocks are neighbours, from its first piece to its last
        dealt_out = [
            block for i in range(0, len(dealt_out), cluster) for block in dealt_out[i : i + cluster][:: -1 if descending else 1]
        ]
    joined = {t: count for t, count in counts.items() if count > 1} if cluster == 1 else {}
    number = {t: i for i, t in enumerate((*joined, *(t for t in counts if t not in joined)))}
    first = dict(zip(joined, np.cumsum([0, *joined.values()])[:-1].tolist(), strict=True))
    rows = []
    for t, i in (work for block in dealt_out for work in block):
        rank = len(t.pieces) - 1 - i if descending else i
        rows.append((*t[:3], *t.pieces[i], number[t[:3]], first.get(t[:3], 0), rank << 16 | len(t.pieces)))
    starts = np.cumsum([0, *map(len, dealt_out)]).astype(np.int32)
    join = _join(v, dealt_out, alone, descending, sms) if joined else Join.LAST
    pieces = np.array(rows, np.int32)
    closed = _slice_rows(v, pieces) if alone else 0
    return Launch(v, pieces, starts, len(joined), sum(joined.values()), cut_rows, cluster, join, closed)


def _join(v: Variant, dealt_out: Sequence[Sequence[Work]], alone: bool, descending: bool, sms: int) -> Join:
    """Who joins; ``alone``: whether every thread block has one piece. The first rows of K must have rank 0 or 1 to be kept."""
    if v.kernel != "wgmma":
        return Join.LAST
    if alone:
        return Join.SHARED
    heads = [(t, n + 1 == len(block)) for block in dealt_out for n, (t, i) in enumerate(block) if i == 0 and len(t.pieces) > 1]
    can = len(dealt_out) <= sms * v.per_sm and all(last and (not descending or len(t.pieces) == 2) for t, last in heads)
    return Join.FIRST if can else Join.LAST


def _slice_rows(v: Variant, pieces: Int32) -> int:
    """Rows of K of a slice, if the pieces of one-piece thread blocks are those that piece_of (int4_fragments.cuh) computes."""
    m, count = int(pieces[0, 1]), int(pieces[0, 7]) & 0xFFFF
    length, k = int(pieces[0, 4]), int(pieces[:, 4].max())
    tile, rank = np.divmod(np.arange(len(pieces)), count)
    ends = np.minimum((rank + 1) * length, k)
    closed = np.stack(
        [0 * tile, 0 * tile + m, tile * v.columns, rank * length, ends, tile, tile * count, rank << 16 | count], axis=1
    )
    used = [0, 1, 2, 3, 4, 5, 7] + ([6] if pieces[:, 6].any() else [])
    return length if np.array_equal(closed[:, used], pieces[:, used]) else 0
