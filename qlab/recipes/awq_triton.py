"""vLLM 0.20.2's Triton kernel for AWQ (awq_triton.py): eight interleaved slices, fp16 accumulators, a permuted k.

Slice z takes the chunks of 32 rows z, z + 8, z + 16, ... as awq_gemm does, one ``tl.dot`` each: two m16n8k16 in turn, through
which the accumulator runs in fp16, rounded after each fused sum. The operands have kWidth 4, so that the first takes every
second pair of k, 0 1 4 5 8 9 12 13 in its first half and the same of 16 to 31 in its second, and the other the pairs between.
``sum(0)`` is PyTorch's. The weight is decoded in integers and fp16: RN((q - z) * s). Rows beyond K are zeros and add nothing.

Before sm_80 Triton has no tensor cores: a chain of fp16 fma over ascending k. Versions and targets are those of
qlab/recipes/triton.py; recordings of the kernel on an H100 and an H200 agree.
"""

from __future__ import annotations

from dataclasses import replace

from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipes import awq_gemm
from qlab.recipes.build import Build
from qlab.recipes.scheme import Scheme
from qlab.recipes.triton import target

K_WIDTH = 4
TURING = (7, 5)


def scheme(problem: Problem, gpu: Gpu, build: Build) -> Scheme:
    """awq_gemm's slices and sum over them. Nothing depends on M, N, the group size or the number of SMs."""
    fp16 = replace(awq_gemm.scheme(problem, gpu, build), accumulator="fp16")
    return replace(fp16, unit="fma") if target(build, gpu, TURING) == TURING else replace(fp16, k_width=K_WIDTH)


KERNELS = {"vllm.awq_triton": scheme}
