"""Marlin (vLLM 0.20.2, csrc/quantization/marlin): tiles and stripes as functions of the shape and the number of SMs.

A call is cut into launches: as many rows as make whole blocks of 64, then the rest. Each launch takes its own tile (thread_k x
thread_n), and lays the k tiles of its output tiles end to end over the SMs: first whole output tiles, then stripes that may cut
an output tile into pieces. Inside a piece each of ``thread_k / 32`` warp rows keeps its own accumulator. Pieces are joined from
the last k to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import Gpu
from qlab.recipe import Node, Tile, Walk
from qlab.recipes.build import Build, type_name
from qlab.recipes.rules import CHUNK, Area, Bias, Cut, PlainBias, Span, Warps, output, pieces_text, span
from qlab.recipes.scheme import Partial, Scheme

Reduction = Literal["fp32", "fp16", "atomic"]
"""How pieces are joined: in fp32; rounded to the activations' dtype on the way between blocks; by atomics where allowed."""


class Config(NamedTuple):
    """A thread block's tile: ``thread_k`` rows of the weight by ``thread_n`` columns."""

    thread_k: int
    thread_n: int


NARROW = Config(128, 64)
SMALL = (Config(128, 128), Config(64, 128), NARROW)
"""In order of preference, for launches of up to 16 rows."""
LARGE = (Config(64, 256), Config(64, 128), NARROW)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: rows ``start:stop`` of the call, ``tile_rows`` of them per output tile."""

    start: int
    stop: int
    tile_rows: int
    config: Config

    @property
    def rows(self) -> int:
        return self.stop - self.start


def launches(m: int, n: int, k: int, sms: int) -> Iterator[Launch]:
    """The launches of one call (marlin.cu, marlin_mm).

    Every 4-bit tile fits the shared memory of each GPU that runs Marlin, so only the divisibility of K and N selects.
    """
    blocks, start = 4, 0  # of 16 rows
    most_parallel = 128 if n <= 4096 else 16
    while start < m:
        parallel = min((m - start) // (16 * blocks), most_parallel)
        rows = parallel * 16 * blocks if parallel else m - start
        row_blocks = min(-(-rows // 16), blocks)
        fits = [c for c in (LARGE if row_blocks > 1 else SMALL) if k % c.thread_k == 0 and n % c.thread_n == 0]
        if not fits:
            if blocks == 1:
                raise UnsupportedError(f"Marlin has no tile for K={k}, N={n}")
            blocks -= 1
            continue
        config = fits[0]
        few = n // config.thread_n * -(-rows // (16 * row_blocks)) * 4 <= sms
        if few and k % NARROW.thread_k == 0 and n % NARROW.thread_n == 0:
            config = NARROW
        yield Launch(start, start + rows, 8 if rows <= 8 else 16 * row_blocks, config)
        start += rows


class Piece(NamedTuple):
    """k tiles ``start:stop`` of one output tile, summed by one thread block."""

    start: int
    stop: int


def pieces(launch: Launch, n: int, k: int, group_size: int, sms: int) -> Iterator[tuple[int, int, tuple[Piece, ...]]]:
    """(row tile, column tile, pieces in ascending k) of every output tile of a launch (marlin_template.h).

    ``group_size`` is 0 where the scale is applied to the sum: only groups of at least thread_k round the stripes up.
    """
    parallel = launch.rows // launch.tile_rows if launch.rows > launch.tile_rows else 1
    k_tiles, column_tiles = k // launch.config.thread_k, n // launch.config.thread_n
    tiles = parallel * column_tiles
    striped = tiles
    if tiles > sms:
        striped = tiles % sms
        if striped * 3 <= sms:
            striped += sms
    stripe = -(-k_tiles * striped // sms)
    if group_size >= launch.config.thread_k:
        per_group = group_size // launch.config.thread_k
        stripe = per_group * -(-stripe // per_group)
    for tile in range(tiles):
        row, column = divmod(tile, column_tiles)
        j = tile - (tiles - striped)
        if j < 0:
            yield row, column, (Piece(0, k_tiles),)
            continue
        first = j * k_tiles
        cuts = [c - first for c in range(-(-first // stripe) * stripe, first + k_tiles, stripe) if c > first]
        yield row, column, tuple(Piece(a, b) for a, b in zip((0, *cuts), (*cuts, k_tiles), strict=True))


@dataclass(frozen=True)
class Stripes(Cut):
    """Marlin's output tiles and stripes for x [m, k] and a weight [k, n]."""

    m: int
    k: int
    n: int
    group_size: int
    """As `pieces` takes it: 0 where the scale is applied to the sum."""
    uses_sms = True

    def areas(self, sms: int) -> Iterator[Area]:
        for launch in launches(self.m, self.n, self.k, sms):
            config, walks = launch.config, dict[tuple[Piece, ...], tuple[Walk, ...]]()
            atomics = self.n * -(-launch.rows // 64) <= 2048
            for row, column, cut in pieces(launch, self.n, self.k, self.group_size, sms):
                if cut not in walks:
                    walks[cut] = tuple(span(p.start * config.thread_k, p.stop * config.thread_k) for p in cut)
                top, left = launch.start + row * launch.tile_rows, column * config.thread_n
                rows = top, min(top + launch.tile_rows, launch.stop)
                yield Area(rows, (left, left + config.thread_n), walks[cut], atomics)

    def text(self, sms: int) -> str:
        return f"stripes over {sms} SMs: {pieces_text(self, sms)}"


@dataclass(frozen=True)
class WarpRows(Warps):
    """``thread_k / 32`` accumulators, by the tile that each launch takes for x [m, k] and a weight [k, n]."""

    m: int
    k: int
    n: int
    uses_sms = True

    def bands(self, sms: int) -> tuple[tuple[int, int, int], ...]:
        return tuple((x.start, x.stop, x.config.thread_k // CHUNK) for x in launches(self.m, self.n, self.k, sms))

    def text(self, sms: int) -> str:
        return f"{' or '.join(map(str, sorted({count for *_, count in self.bands(sms)})))} warp rows"


@dataclass(frozen=True)
class FusedBias(Bias):
    """A scale and the bias behind it in one fused multiply-add; without a scale on the output the bias is added.

    marlin_template.h, write_result: ptxas fuses the two except in the first store of each thread, rows 0 to 7 of columns 0 to 7
    of each 64.
    """

    def tiles(self, rows: Span, columns: Span, tree: Node, scale: bool) -> Iterator[Tile]:
        if not scale:
            yield Tile(rows, columns, tree, output(False, "added"))
            return
        (top, bottom), (left, right) = rows, columns
        middle = min(top + 8, bottom)
        for slab in range(left, right, 64):
            edge, end = min(slab + 8, right), min(slab + 64, right)
            yield Tile((top, middle), (slab, edge), tree, output(True, "added"))
            if edge < end:
                yield Tile((top, middle), (edge, end), tree, output(True, "fused"))
        if middle < bottom:
            yield Tile((middle, bottom), (left, right), tree, output(True, "fused"))

    def text(self) -> str:
        return "RN(y*s + bias) fused, but for each thread's first store"


def scheme(problem: Problem, gpu: Gpu, build: Build, reduction: Reduction = "fp32") -> Scheme:
    """Marlin's scheme for AWQ and GPTQ weights alike: both decode to RN((q - z) * s), or to q - z without groups.

    Without groups the scale multiplies the rounded sum. A bias behind it is fused, but not in bf16 before sm_90.
    """
    if problem.bias and reduction == "atomic":
        raise UnsupportedError("a bias that one of several atomic additions carries is not modelled")
    m, k, n, dtype = problem.M, problem.K, problem.N, type_name(problem.dtype)
    whole_column = problem.group_size == k
    fused = problem.bias and whole_column and (dtype == "fp16" or gpu.capability >= (9, 0))
    return replace(
        Scheme.on(gpu, Stripes(m, k, n, 0 if whole_column else problem.group_size)),
        weights="integer" if whole_column else "rounded",
        rows="sorted" if problem.act_order else "natural",
        scale="output" if whole_column else "weight",
        # Turing has no fp32 path for grouped fp16 weights (use_fp16_accum in marlin_template.h).
        accumulator="fp16" if gpu.capability < (8, 0) and not whole_column else "fp32",
        warps=WarpRows(m, k, n),
        partial={"fp32": Partial(), "fp16": Partial("total", dtype), "atomic": Partial("pieces", dtype)}[reduction],
        order="atomics where allowed" if reduction == "atomic" else "descending",
        type=dtype if reduction == "atomic" else "fp32",
        bias=FusedBias() if fused else PlainBias("added" if problem.bias else "none"),
    )


KERNELS = {
    f"vllm.marlin.{kind}{'' if reduction == 'fp32' else f'.{reduction}'}": partial(scheme, reduction=reduction)
    for kind in ("awq", "gptq")
    for reduction in ("fp32", "fp16", "atomic")
}
