"""vLLM 0.20.2's Triton kernel for AWQ (awq_triton.py): eight interleaved slices, fp16 accumulators, a permuted k.

Slice z takes the chunks of 32 rows z, z + 8, z + 16, ... as awq_gemm does, one ``tl.dot`` each: two m16n8k16 in turn, through
which the accumulator runs in fp16, rounded after each fused sum. The operands have kWidth 4, so that the first takes every
second pair of k, 0 1 4 5 8 9 12 13 in its first half and the same of 16 to 31 in its second, and the other the pairs between.
``sum(0)`` is PyTorch's. The weight is decoded in integers and fp16: RN((q - z) * s). Rows beyond K are zeros and add nothing.

Before sm_80 Triton has no tensor cores: a chain of fp16 fma over ascending k. Versions and targets are those of
qlab/recipes/triton.py; recordings of the kernel on an H100 and an H200 agree.
"""

from __future__ import annotations

from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipe import Fma, Recipe, Step, TensorCore, Tile, chain
from qlab.recipes.awq_gemm import CHUNK, SLICES, slice_order, torch_sum
from qlab.recipes.build import Build, type_name
from qlab.recipes.triton import dot_order, target

K_WIDTH = 4
TURING = (7, 5)


def recipe(problem: Problem, gpu: Gpu, build: Build) -> Recipe:
    """A slice without rows stores zero. Nothing depends on M, N, the group size or the number of SMs."""
    orders = [slice_order(problem.K, i) for i in range(SLICES)]
    step: Step = Fma("fp16")
    if target(build, gpu, TURING) != TURING:
        step = TensorCore.of(gpu.step, "fp16")
        orders = [o.reshape(-1, CHUNK)[:, dot_order(CHUNK, K_WIDTH)].ravel() for o in orders]
    tree = torch_sum([chain(step, o) for o in orders])
    tile = Tile((0, problem.M), (0, problem.N), tree)
    return Recipe.of(problem.M, problem.K, problem.N, type_name(problem.dtype), [tile])


KERNELS = {"vllm.awq_triton": recipe}
