"""qlab's hardware-invariant GEMM (csrc/hardware_invariant.cuh): IEEE fp32 fused multiply-adds in an order that K alone decides.

K is cut into at most 16 slices of whole blocks of 128 rows. In a slice four lanes share k: lane c takes 2c and 2c + 1 of every
eight, each product by one fma from +0. Lanes join pairwise, slices from the first to the last, in fp32; the total is rounded
once. An fma has one result on every machine that keeps to IEEE 754, so no GPU, M, N or group size shows.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipes.build import Build
from qlab.recipes.rules import Ranges
from qlab.recipes.scheme import Scheme

BLOCK = 128
"""Rows of a block of the storage layout."""
MOST_SLICES = 16
LANES = 4


def slice_blocks(k: int) -> int:
    """Blocks of a slice: the fewest with which at most MOST_SLICES slices cover K."""
    return ceil(ceil(k / BLOCK) / MOST_SLICES)


def slices(k: int) -> tuple[tuple[int, int], ...]:
    """The rows of each slice; the last one ends with K."""
    rows = slice_blocks(k) * BLOCK
    return tuple((start, min(start + rows, k)) for start in range(0, k, rows))


def scheme(problem: Problem, gpu: Gpu, build: Build) -> Scheme:
    """Weights rounded once, whole columns too; rows sorted by group under act-order."""
    return replace(
        Scheme.on(gpu, Ranges(problem.M, problem.N, slices(problem.K))),
        rows="sorted" if problem.act_order else "natural",
        unit="fma",
        lanes=LANES,
    )


KERNELS = {"cuda.hardware_invariant": scheme}
