"""qlab's own Triton kernels (kernels/): fp32 sums over ascending k, whole or in up to eight contiguous slices of K.

One ``tl.dot`` of 32 or 64 rows becomes instructions of 16 k each, one after the other, and the loop's accumulator runs through
all of them: mma.sync m16n8k16; with more than 16 rows of x wgmma m64n64k16 on sm_90 and tcgen05.mma on sm_100, which read both
operands from shared memory. Those of mma.sync have kWidth 2. So every instruction takes 16 consecutive k, the first eight in
its first half. Weights are multiplied out before, rounded once. Nothing depends on M, N, the group size, act-order (rows stay
where they are, each gathers its scale) or the number of SMs.

Read from TTGIR and PTX. On an H100 the code for sm_80 and sm_90 of every version below gave these bits, and that for sm_80 with
each m16n8k16 cut into two m16n8k8 those of fused sums of eight.
"""

from __future__ import annotations

from functools import partial

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import Gpu
from qlab.recipes.awq_gemm import dequantize_scheme
from qlab.recipes.build import Build
from qlab.recipes.rules import Ranges
from qlab.recipes.scheme import Scheme

VERSIONS = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
"""Of Triton; which layout the operands get is the compiler's choice."""
TARGETS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
"""Compute capabilities; before 8.0 Triton does not use tensor cores."""
STEPS = (64, 32)
"""Rows of one ``tl.dot`` (launch.BLOCK_K_SIZES): the first that divides the group; 64 for a whole column."""
MOST_SLICES = 8
SLICE = 128
"""Rows that a slice of split-K takes at least (launch.split_count)."""


def target(build: Build, gpu: Gpu, *more: tuple[int, int]) -> tuple[int, int]:
    """Compute capability of the code that runs. Raises UnsupportedError unless it is among TARGETS and ``more``, and read."""
    if build.triton not in VERSIONS:
        raise UnsupportedError(f"Triton {build.triton} may order k otherwise than {', '.join(VERSIONS)}, whose code was read")
    capability = build.capability(gpu)
    if capability not in (*more, *TARGETS):
        named, *known = (f"{a}.{b}" for a, b in (capability, *more, *TARGETS))
        raise UnsupportedError(f"Triton's code for compute capability {named} was not read, only {', '.join(known)}")
    return capability


def slices(k: int, group_size: int) -> list[tuple[int, int]]:
    """The rows of each slice of split-K: whole steps, but for the end of K (launch.block_k, split_count and slices)."""
    step = STEPS[0] if group_size == k else next(s for s in STEPS if group_size % s == 0)
    count = max(1, min(MOST_SLICES, k // SLICE))
    rows = -(-k // (count * step)) * step
    return [(start, min(start + rows, k)) for start in range(0, k, rows)]


def scheme(problem: Problem, gpu: Gpu, build: Build, *, split: bool = False) -> Scheme:
    """One chain, or one for each slice, joined in fp32 from the first to the last (join_partials)."""
    target(build, gpu)
    if problem.K % gpu.step.terms:
        raise UnsupportedError(f"K={problem.K} ends inside a fused sum of {gpu.step.terms} terms, which a chain cannot express")
    m, k, n = problem.M, problem.K, problem.N
    return Scheme.on(gpu, Ranges(m, n, tuple(slices(k, problem.group_size))) if split else Ranges.whole(m, k, n))


KERNELS = {
    "triton.awq_gemm": scheme,
    "triton.awq_gemm.splitk": partial(scheme, split=True),
    "triton.awq_dequantize": dequantize_scheme,
    "triton.gptq_gemm": scheme,
    "triton.gptq_gemm.splitk": partial(scheme, split=True),
    "triton.gptq_gemm.v2": scheme,
}
