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

import numpy as np
import torch

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import Gpu
from qlab.recipe import Node, Output, Recipe, TensorCore, Tile, Type, Unordered, chain, join, rounded, unordered
from qlab.recipes.build import Build, type_name

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


def block_sum(piece: Piece, config: Config, step: TensorCore) -> Node:
    """One block's sum: a chain per warp row over its 32 k of every k tile, joined ``acc0 + (acc1 + (acc3 + acc2))``."""
    tiles = np.arange(piece.start, piece.stop)[:, None] * config.thread_k
    rows = [chain(step, (tiles + 32 * r + np.arange(32)).ravel()) for r in range(config.thread_k // 32)]
    total: Node = rows[-1]
    for part in reversed(rows[:-1]):
        total = join((part, total))
    return total


def recipe(problem: Problem, gpu: Gpu, build: Build, reduction: Reduction = "fp32") -> Recipe:
    """Marlin's recipe for AWQ and GPTQ weights alike: both decode to RN((q - z) * s), or to q - z without groups."""
    if problem.bias and reduction == "atomic":
        raise UnsupportedError("a bias that one of several atomic additions carries is not modelled")
    dtype = type_name(problem.dtype)
    whole_column = problem.group_size == problem.K
    # Turing has no fp32 path for grouped fp16 weights (use_fp16_accum in marlin_template.h).
    turing = gpu.capability < (8, 0) and not whole_column
    step = TensorCore.of(gpu.step, "fp16" if turing else "fp32")
    tiles: list[Tile] = []
    for launch in launches(problem.M, problem.N, problem.K, gpu.sms):
        atomic = reduction == "atomic" and problem.N * -(-launch.rows // 64) <= 2048
        trees: dict[tuple[Piece, ...], Node] = {}
        group_size = 0 if whole_column else problem.group_size
        for row, column, cut in pieces(launch, problem.N, problem.K, group_size, gpu.sms):
            if cut not in trees:
                sums = [block_sum(p, launch.config, step) for p in cut]
                trees[cut] = _across_blocks(sums, dtype, reduction, atomic, whole_column)
            top, left = launch.start + row * launch.tile_rows, column * launch.config.thread_n
            rows = (top, min(top + launch.tile_rows, launch.stop))
            tiles += _written(Tile(rows, (left, left + launch.config.thread_n), trees[cut]), problem, gpu)
    return Recipe.of(
        problem.M,
        problem.K,
        problem.N,
        dtype,
        tiles,
        weights="integer" if whole_column else "rounded",
        rows="sorted" if problem.act_order else "natural",
    )


def _across_blocks(sums: list[Node], dtype: Type, reduction: Reduction, atomic: bool, scaled: bool) -> Node:
    """Pieces of one output tile, given in ascending k: handed on from the last k to the first."""
    if atomic and len(sums) > 1:
        return unordered([rounded(s, dtype) for s in sums], dtype, scaled=scaled)
    total = sums[-1]
    for part in reversed(sums[:-1]):
        total = join((part, rounded(total, dtype) if reduction == "fp16" else total))
    return total


def _written(tile: Tile, problem: Problem, gpu: Gpu) -> Iterator[Tile]:
    """The output tile under its output rule (marlin_template.h, write_result).

    Without groups the scale multiplies the rounded sum. With a bias behind it, ptxas fuses multiplication and addition, except
    in the first store of each thread, rows 0 to 7 of columns 0 to 7 of each 64; not at all in bf16 before sm_90.
    """
    scale = problem.group_size == problem.K and not (isinstance(tile.tree, Unordered) and tile.tree.scaled)
    if not problem.bias:
        yield replace(tile, output=Output(scale=scale))
        return
    fused = scale and (problem.dtype == torch.float16 or gpu.capability >= (9, 0))
    if not fused:
        yield replace(tile, output=Output(scale, "added"))
        return
    (top, bottom), (left, right) = tile.rows, tile.columns
    middle = min(top + 8, bottom)
    for slab in range(left, right, 64):
        yield Tile((top, middle), (slab, slab + 8), tile.tree, Output(True, "added"))
        yield Tile((top, middle), (slab + 8, slab + 64), tile.tree, Output(True, "fused"))
    if middle < bottom:
        yield Tile((middle, bottom), (left, right), tile.tree, Output(True, "fused"))


KERNELS = {
    f"vllm.marlin.{kind}{'' if reduction == 'fp32' else f'.{reduction}'}": partial(recipe, reduction=reduction)
    for kind in ("awq", "gptq")
    for reduction in ("fp32", "fp16", "atomic")
}
