"""vLLM's ``awq_gemm`` (csrc/quantization/awq/gemm_kernels.cu): eight interleaved slices, fp16 partial sums.

Slice y takes the chunks of 32 rows y, y + 8, y + 16, ... in one fp32 accumulator, two tensor-core instructions a chunk, and
stores it in fp16. ``sum(0)`` adds the eight in fp32 in PyTorch's order for a strided reduction (ATen/native/cuda/Reduce.cuh:
four accumulators a thread, joined in turn) and rounds once. Nothing depends on the number of SMs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipe import Node, Opaque, Recipe, TensorCore, Tile, chain, join, rounded, zero
from qlab.recipes.build import Build, type_name

SLICES = 8
CHUNK = 32
ACCUMULATORS = 4
"""Accumulators of a thread in PyTorch's reduction (vt0)."""


def torch_sum(partials: Sequence[Node]) -> Node:
    """PyTorch's ``sum(0)`` over a few fp16 matrices: i, i + 4, ... in turn, then the four sums in turn, in fp32.

    Its accumulators start at +0, which shows where every partial sum is -0. One +0 anywhere does what four at the start do.
    """
    lanes = [join(partials[i::ACCUMULATORS]) for i in range(min(ACCUMULATORS, len(partials)))]
    return join([join(lanes), zero(partials[0])])


def slice_order(k: int, index: int) -> np.ndarray:
    """The k of slice ``index`` in the order in which it walks over them: int [.]."""
    chunks = np.arange(index, k // CHUNK, SLICES)
    return (chunks[:, None] * CHUNK + np.arange(CHUNK)).ravel()


def recipe(problem: Problem, gpu: Gpu, build: Build) -> Recipe:
    """A slice without rows stores zero, which adds nothing."""
    step = TensorCore.of(gpu.step)
    tree = torch_sum([rounded(chain(step, slice_order(problem.K, i)), "fp16") for i in range(SLICES)])
    tile = Tile((0, problem.M), (0, problem.N), tree)
    return Recipe.of(problem.M, problem.K, problem.N, type_name(problem.dtype), [tile])


def dequantize_recipe(problem: Problem, gpu: Gpu, build: Build) -> Recipe:
    """``awq_dequantize`` writes RN((q - z) * s) to memory; the sum is cuBLAS's."""
    tile = Tile((0, problem.M), (0, problem.N), Opaque("cuBLAS GEMM of torch.matmul"))
    return Recipe.of(problem.M, problem.K, problem.N, type_name(problem.dtype), [tile])


KERNELS = {"vllm.awq_gemm": recipe, "vllm.awq_dequantize": dequantize_recipe}
