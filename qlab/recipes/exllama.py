"""ExLlama, vLLM's ``gptq_gemm`` (csrc/quantization/gptq/q_gemm.cu): fp16 dot products, scale in fp32, fp16 atomics.

Blocks of 128 rows each keep an fp32 accumulator; every 8 rows make two fp16 chains of fused multiply-adds. A block's sum is
rounded to fp16 and added to the zeroed output by atomics: with more than two blocks the order is not fixed. For more than 50
tokens the weight is written to memory and cuBLAS sums in fp16.
"""

from __future__ import annotations

from dataclasses import replace

from qlab.backends.dispatch import EXLLAMA_TOKENS
from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipes.build import Build
from qlab.recipes.rules import Ranges
from qlab.recipes.scheme import Partial, Scheme

BLOCK = 128


def scheme(problem: Problem, gpu: Gpu, build: Build) -> Scheme:
    """``integer`` weights up to 50 tokens, with the scale in the step."""
    m, k, n = problem.M, problem.K, problem.N
    if m > EXLLAMA_TOKENS:
        return Scheme.opaque(gpu, problem, "cuBLAS cublasHgemm in fp16")
    blocks = tuple((start, min(start + BLOCK, k)) for start in range(0, k, BLOCK))
    return replace(
        Scheme.on(gpu, Ranges(m, n, blocks, f"blocks of {BLOCK}")),
        weights="integer",
        rows="sorted" if problem.act_order else "natural",
        scale="step",
        unit="half dot",
        partial=Partial("pieces", "fp16"),
        order="atomics",
        type="fp16",
    )


KERNELS = {"vllm.gptq_gemm": scheme}
