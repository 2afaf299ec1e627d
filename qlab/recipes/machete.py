"""Machete (vLLM 0.20.2, csrc/quantization/machete): tiles and stream-K cuts as functions of the shape and the number of SMs.

The kernel computes the transposed product on Hopper's wgmma: every output element is one fp32 accumulator over ascending k,
16 at a time. CUTLASS's stream-K scheduler with its default arguments deals the output tiles, each K / 64 iterations long, to
the SMs. Some it leaves whole; the others it cuts along K into pieces of at least 8 iterations, which are joined in fp32
from the first k to the last: the first piece is stored, each next one is added to what lies there, the last one adds that to
its accumulators and writes the output.

Sources: vLLM's generate.py for the tiles; CUTLASS 4.4.2, gemm/kernel/tile_scheduler_params.h and
sm90_tile_scheduler_stream_k.hpp, for the rest. Two of their details leave no trace here: a unit of stream-K work may end in
another tile than it began in, and runs its tiles backwards; neither changes which k are summed together, nor the order.

Not modelled: the additions in memory flush subnormal fp32 numbers to zero (PTX ISA, red.add.f32), and they join the pieces
between the first and the last. With fp16 no sum is that small; with bf16 it takes sums below 2^-102.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipe import Walk
from qlab.recipes.build import Build
from qlab.recipes.rules import Area, Cut, PlainBias, pieces_text, span
from qlab.recipes.scheme import Scheme

TILE_K = 64
"""k per iteration; for 16-bit activations (machete_mm_kernel.cuh, TileShapeK)."""
LEAST = 8
"""Fewest iterations of a piece (min_iters_per_sk_unit_)."""
MOST_GROUPS = 8
"""Groups of stream-K units at most (max_sk_groups_)."""


class Schedule(NamedTuple):
    """The compiled kernel that a shape takes: an output tile of ``tokens`` rows by ``columns`` columns of y.

    ``cluster`` thread blocks, side by side along the columns, share their iterations.
    """

    columns: int
    tokens: int
    cluster: int


Condition = Callable[[int, int, int], bool]

SCHEDULES: tuple[tuple[Condition, Schedule], ...] = (
    (lambda m, n, k: m > 256 and k <= 16384 and n <= 4096, Schedule(128, 128, 2)),
    (lambda m, n, k: m > 256, Schedule(128, 256, 2)),
    (lambda m, n, k: m > 128 and k <= 4096 and n <= 4096, Schedule(128, 64, 2)),
    (lambda m, n, k: m > 128 and k <= 8192 and n <= 8192, Schedule(128, 128, 2)),
    (lambda m, n, k: m > 128, Schedule(128, 256, 2)),
    # 4069 is what vLLM compares with; K or N of 4096 is therefore already beyond it.
    (lambda m, n, k: m > 64 and k <= 4069 and n <= 4069, Schedule(128, 32, 2)),
    (lambda m, n, k: m > 64 and k <= 4069 and n <= 8192, Schedule(128, 64, 2)),
    (lambda m, n, k: m > 64 and k >= 8192 and n >= 12288, Schedule(256, 128, 2)),
    (lambda m, n, k: m > 64, Schedule(128, 128, 2)),
    (lambda m, n, k: m > 32 and k <= 6144 and n <= 6144, Schedule(128, 16, 1)),
    (lambda m, n, k: m > 32 and k >= 16384 and n >= 12288, Schedule(256, 64, 2)),
    (lambda m, n, k: m > 32, Schedule(128, 64, 2)),
    (lambda m, n, k: m > 16 and k <= 12288 and n <= 8192, Schedule(128, 32, 2)),
    (lambda m, n, k: m > 16, Schedule(256, 32, 2)),
    (lambda m, n, k: n >= 26624, Schedule(256, 16, 1)),
    (lambda m, n, k: True, Schedule(128, 16, 1)),
)
"""The first whose condition holds for (M, N, K) is taken; the same for fp16, bf16, AWQ and GPTQ (generate.py)."""


def schedule(m: int, n: int, k: int) -> Schedule:
    """The kernel that vLLM takes for x [m, k] and a weight [k, n]."""
    return next(s for holds, s in SCHEDULES if holds(m, n, k))


Pieces = tuple[tuple[int, int], ...]
"""Ranges of k, ascending and without gaps; each is one chain, and they are joined in this order."""


@dataclass(frozen=True)
class OutputTile:
    """Rows ``rows[0]:rows[1]`` and columns ``columns[0]:columns[1]`` of y with the pieces of their sums."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    pieces: Pieces


def partition(m: int, n: int, k: int, sms: int) -> Iterator[OutputTile]:
    """Every output tile of one call on a GPU with ``sms`` SMs, in no particular order.

    CUTLASS counts tiles and units in thread blocks. Both are whole clusters, whose blocks share their k, so here they are
    counted in clusters; one that reaches beyond the last column is cut off.
    """
    s = schedule(m, n, k)
    width = s.columns * s.cluster
    across, down = -(-n // width), -(-m // s.tokens)
    ranges: dict[Pieces, Pieces] = {}  # many tiles are cut alike
    for at, pieces in enumerate(tile_pieces(across, down, -(-k // TILE_K), sms // s.cluster, s.cluster)):
        # Along the shorter side first; CUTLASS compares blocks, not clusters, and leaves swizzling off.
        if down > across * s.cluster:
            row, column = divmod(at, across)
        else:
            column, row = divmod(at, down)
        rows = (row * s.tokens, min((row + 1) * s.tokens, m))
        columns = (column * width, min((column + 1) * width, n))
        if pieces not in ranges:
            ranges[pieces] = tuple((a * TILE_K, min(b * TILE_K, k)) for a, b in pieces)
        yield OutputTile(rows, columns, ranges[pieces])


def tile_pieces(across: int, down: int, iterations: int, wave: int, cluster: int = 1) -> list[Pieces]:
    """The pieces, in iterations, of each of ``across * down`` clusters of output tiles, in the scheduler's order.

    ``wave`` clusters run at a time (select_decomposition_mode).
    """
    tiles = across * down
    whole: Pieces = ((0, iterations),)
    cut = streamed(tiles, iterations, wave)
    units = min(wave, cut * iterations // LEAST)
    if not units:
        return [whole] * tiles
    if cut < units and units % cut == 0:
        # As many units for each tile: plain split-K. Only where all tiles fit one wave, so that all of them are cut.
        return [_split(iterations, units // cut)] * tiles
    groups = unit_groups(cut, units, iterations, most=across if down > across * cluster else down)
    found = [whole] * tiles  # those after the first `cut` stay whole
    for group in range(groups):
        mine = range(group, cut, groups)
        for tile, pieces in zip(mine, _stream(len(mine), iterations, units // groups), strict=True):
            found[tile] = pieces
    return found


def streamed(tiles: int, iterations: int, wave: int) -> int:
    """How many tiles, the first ones, are dealt along K (get_num_sk_tiles): none if the last wave is full or half full."""
    full, tail = divmod(tiles, wave)
    if not tail or iterations <= LEAST or 2 * tail >= wave:
        return 0
    return tiles - max(full - 1, 0) * wave


def unit_groups(tiles: int, units: int, iterations: int, most: int) -> int:
    """Into how many groups the units are dealt, each with every so-many-th tile (calculate_groups).

    The largest number, at most ``most`` and 8, that divides units and tiles and leaves a unit 8 iterations; failing that one
    that divides the units.
    """
    fallback = 1
    for groups in range(min(most, MOST_GROUPS), 1, -1):
        if units % groups or tiles // groups * iterations // (units // groups) < LEAST:
            continue
        if tiles % groups == 0:
            return groups
        fallback = max(fallback, groups)
    return fallback


def _split(iterations: int, parts: int) -> Pieces:
    """Equal pieces; the first ones take the remainder."""
    share, more = divmod(iterations, parts)
    cuts = [i * share + min(i, more) for i in range(parts + 1)]
    return tuple(pairwise(cuts))


def _stream(tiles: int, iterations: int, units: int) -> list[Pieces]:
    """Pieces of ``tiles`` tiles laid end to end and dealt to ``units`` units of nearly equal length.

    A cut fewer than 8 iterations from a tile's end moves to that end, so that no piece is shorter.
    """
    cuts: list[set[int]] = [{0, iterations} for _ in range(tiles)]
    for start, _ in _split(tiles * iterations, units):
        tile, at = divmod(start, iterations)
        if LEAST <= at <= iterations - LEAST:
            cuts[tile].add(at)
    return [tuple(pairwise(sorted(c))) for c in cuts]


@dataclass(frozen=True)
class StreamK(Cut):
    """CUTLASS's scheduler with the tiles that vLLM takes for x [m, k] and a weight [k, n]."""

    m: int
    k: int
    n: int
    uses_sms = True

    def areas(self, sms: int) -> Iterator[Area]:
        walks: dict[Pieces, tuple[Walk, ...]] = {}
        for t in partition(self.m, self.n, self.k, sms):
            if t.pieces not in walks:
                walks[t.pieces] = tuple(span(*piece) for piece in t.pieces)
            yield Area(t.rows, t.columns, walks[t.pieces])

    def text(self, sms: int) -> str:
        return f"stream-K over {sms} SMs: {pieces_text(self, sms)}"


def scheme(problem: Problem, gpu: Gpu, build: Build, fused: bool) -> Scheme:
    """Machete's scheme; ``fused`` is AWQ's decoding. A bias is added to the output, by PyTorch."""
    return replace(
        Scheme.on(gpu, StreamK(problem.M, problem.K, problem.N)),
        weights="fused" if fused else "rounded",
        rows="sorted" if problem.act_order else "natural",
        bias=PlainBias("added" if problem.bias else "none"),
    )


KERNELS = {f"vllm.machete.{kind}": partial(scheme, fused=kind == "awq") for kind in ("awq", "gptq")}
