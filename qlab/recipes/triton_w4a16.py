"""qlab's Triton INT4 GEMM of its own storage (kernels/w4a16.py): one fp32 chain over each of a few contiguous slices of K.

The slices are joined in fp32 from the first to the last; how many there are the table says (tuned.py). Weights are multiplied
out before and rounded once, whole columns too, and under act-order rows are sorted by group.

One ``tl.dot`` of 128 rows becomes eight instructions of 16 k through which the loop's accumulator runs. The weight is the left
operand. On sm_90 it is wgmma m64nNk16 with that operand in registers, kWidth 2: 16 consecutive k to an instruction. For
mma.sync the compiler gives both operands kWidth 4 where values were joined on the way to a dot: it deals the k of each 32 to
two instructions as :func:`qlab.recipes.rules.dot_order` says. From Triton 3.8 on the joins of decoded codes no longer count,
those of a symmetric weight's scales do: with zero points kWidth is 2.
"""

from __future__ import annotations

from dataclasses import replace

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import Gpu
from qlab.recipe import Rows
from qlab.recipes import tuned
from qlab.recipes.awq_gemm import dequantize_scheme
from qlab.recipes.build import Build
from qlab.recipes.rules import Ranges
from qlab.recipes.scheme import NATURAL, Scheme
from qlab.recipes.triton import target

KERNEL = "triton.w4a16"
WGMMA = (9, 0)
UNREAD = ((10, 0),)
"""Compute capabilities whose code is another dot's (tcgen05) and was not read."""
K_WIDTH = 4
"""Of both operands of mma.sync where the compiler sees a join."""
EVERY_JOIN = ("3.5.1", "3.6.0", "3.7.1")
"""Versions of Triton that see one in every weight; later ones in symmetric weights alone."""


def scheme(problem: Problem, gpu: Gpu, build: Build) -> Scheme:
    """Slices by the table; nothing else depends on M and N."""
    capability = target(build, gpu)
    if capability in UNREAD:
        raise UnsupportedError(f"the code of {KERNEL} for compute capability {capability[0]}.{capability[1]} was not read")
    m, k, n = problem.M, problem.K, problem.N
    if k % gpu.step.terms:
        raise UnsupportedError(f"K={k} ends inside a fused sum of {gpu.step.terms} terms, which a chain cannot express")
    ranges = tuned.ranges(k, tuned.choice(KERNEL, gpu.key, m, k, n).slices)
    rows: Rows = "sorted" if problem.act_order else "natural"
    joined = capability != WGMMA and (problem.symmetric or build.triton in EVERY_JOIN)
    return replace(Scheme.on(gpu, Ranges(m, n, ranges)), rows=rows, k_width=K_WIDTH if joined else NATURAL)


KERNELS = {KERNEL: scheme, f"{KERNEL}.dequantize": dequantize_scheme}
