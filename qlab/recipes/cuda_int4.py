"""qlab's CUDA INT4 kernels (csrc/int4_mma.cuh, csrc/int4_wgmma.cuh): Marlin's recipe, and two of their own.

Both of those have one chain over each of a few contiguous slices of K, joined in fp32 from the first to the last, weights that
were multiplied out before and rounded once, whole columns too, and rows sorted by group under act-order. ``cuda.split`` takes
as many slices as are fastest for M, K and N on the GPU (tuned.py), ``cuda.batch_invariant`` a number that K and N alone decide.
Tiles, and which of the two kernels runs, change no bit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipes import marlin, tuned
from qlab.recipes.build import Build
from qlab.recipes.rules import Ranges
from qlab.recipes.scheme import Scheme


def sliced(problem: Problem, gpu: Gpu, build: Build, *, kernel: str) -> Scheme:
    """The scheme of ``kernel``, whose table says how many slices K has."""
    m, k, n = problem.M, problem.K, problem.N
    slices = tuned.ranges(k, tuned.choice(kernel, gpu.key, m, k, n).slices)
    return replace(Scheme.on(gpu, Ranges(m, n, slices)), rows="sorted" if problem.act_order else "natural")


KERNELS = {
    "cuda.marlin": marlin.scheme,
    "cuda.split": partial(sliced, kernel="cuda.split"),
    "cuda.batch_invariant": partial(sliced, kernel="cuda.batch_invariant"),
}
