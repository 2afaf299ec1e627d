"""ExLlama, vLLM's ``gptq_gemm`` (csrc/quantization/gptq/q_gemm.cu): fp16 dot products, scale in fp32, fp16 atomics.

Blocks of 128 rows each keep an fp32 accumulator; every 8 rows make two fp16 chains of fused multiply-adds. A block's sum is
rounded to fp16 and added to the zeroed output by atomics: with more than two blocks the order is not fixed. For more than 50
tokens the weight is written to memory and cuBLAS sums in fp16.
"""

from __future__ import annotations

import numpy as np

from qlab.backends.dispatch import EXLLAMA_TOKENS
from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipe import HalfDot, Opaque, Recipe, Rows, Tile, chain, rounded, unordered
from qlab.recipes.build import Build, type_name

BLOCK = 128


def recipe(problem: Problem, gpu: Gpu, build: Build) -> Recipe:
    """``integer`` weights up to 50 tokens, with the scale in the step."""
    m, k, n = problem.M, problem.K, problem.N
    whole, dtype = ((0, m), (0, n)), type_name(problem.dtype)
    if m > EXLLAMA_TOKENS:
        return Recipe.of(m, k, n, dtype, [Tile(*whole, Opaque("cuBLAS cublasHgemm in fp16"))])
    blocks = [chain(HalfDot(), np.arange(start, min(start + BLOCK, k))) for start in range(0, k, BLOCK)]
    tree = unordered([rounded(b, "fp16") for b in blocks], "fp16")
    rows: Rows = "sorted" if problem.act_order else "natural"
    return Recipe.of(m, k, n, dtype, [Tile(*whole, tree)], weights="integer", rows=rows)


KERNELS = {"vllm.gptq_gemm": recipe}
