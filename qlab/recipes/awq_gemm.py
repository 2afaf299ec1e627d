"""vLLM's ``awq_gemm`` (csrc/quantization/awq/gemm_kernels.cu): eight interleaved slices, fp16 partial sums.

Slice y takes the chunks of 32 rows y, y + 8, y + 16, ... in one fp32 accumulator, two tensor-core instructions a chunk, and
stores it in fp16. ``sum(0)`` adds the eight in fp32 in PyTorch's order for a strided reduction (ATen/native/cuda/Reduce.cuh:
four accumulators a thread, joined in turn) and rounds once. Nothing depends on the number of SMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlab.backends.registry import Problem
from qlab.hardware import Gpu
from qlab.recipe import Run, Walk
from qlab.recipes.build import Build
from qlab.recipes.rules import CHUNK, Area, Cut
from qlab.recipes.scheme import Partial, Scheme

SLICES = 8


def slice_walk(k: int, index: int) -> Walk:
    """The k of slice ``index`` in the order in which it walks over them."""
    whole, rest = divmod(k, CHUNK)
    count = len(range(index, whole, SLICES))
    last = (Run(whole * CHUNK, rest),) if rest and whole % SLICES == index else ()
    return (*((Run(index * CHUNK, CHUNK, count, SLICES * CHUNK),) if count else ()), *last)


@dataclass(frozen=True)
class Interleaved(Cut):
    """Eight slices of chunks of 32 rows in turn, for every output [m, n]. A slice without rows stores zero."""

    m: int
    k: int
    n: int

    def areas(self, sms: int) -> Iterator[Area]:
        yield Area((0, self.m), (0, self.n), tuple(slice_walk(self.k, i) for i in range(SLICES)))

    def text(self, sms: int) -> str:
        return f"{SLICES} interleaved slices"


def scheme(problem: Problem, gpu: Gpu, build: Build) -> Scheme:
    """Eight fp16 partial sums, added in fp32."""
    on = Scheme.on(gpu, Interleaved(problem.M, problem.K, problem.N))
    return replace(on, partial=Partial("pieces", "fp16"), order="torch.sum")


def dequantize_scheme(problem: Problem, gpu: Gpu, build: Build) -> Scheme:
    """``awq_dequantize`` writes RN((q - z) * s) to memory; the sum is cuBLAS's."""
    return Scheme.opaque(gpu, problem, "cuBLAS GEMM of torch.matmul")


KERNELS = {"vllm.awq_gemm": scheme, "vllm.awq_dequantize": dequantize_scheme}
