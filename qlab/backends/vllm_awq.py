"""vLLM's AWQ kernels as its label ``awq`` runs them: ``awq_gemm`` for few tokens, ``awq_dequantize`` and cuBLAS for many.

Storage: qweight int32 [K, N/8], qzeros int32 [G, N/8], scales fp16 [G, N], all in AWQ's nibble order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.backends.registry import Packed, Problem, register
from qlab.backends.vllm_extension import operators
from qlab.backends.vllm_kernel import VllmKernel, aligned, awq_range, first, needs
from qlab.packing import awq
from qlab.weights import Int4Weight

SPLIT_K = 8
"""Slices of K that vLLM asks ``awq_gemm`` for, whatever the shape."""


class _Awq(VllmKernel):
    layout = "awq"
    source = "awq"

    def tensors(self, weight: Int4Weight) -> Mapping[str, Tensor]:
        packed = awq.pack(weight)
        return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}


class AwqGemm(_Awq):
    name = "vllm.awq_gemm"
    note = "w = RN((q-z)s); 8 interleaved slices of 32-row chunks, fp32 within, RN16 each, summed in fp32 (gemm_kernels.cu)"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype == torch.float16, "awq_gemm takes fp16 only"),
            needs(capability >= (7, 5), "awq_gemm needs compute capability 7.5"),
            awq_range(problem),
            needs(problem.N % 64 == 0, f"awq_gemm needs N to be a multiple of 64, not {problem.N}"),
            needs(problem.K % 32 == 0, f"awq_gemm needs K to be a multiple of 32, not {problem.K}"),
            needs(problem.group_size % 32 == 0, f"awq_gemm needs groups of a multiple of 32, not {problem.group_size}"),
            needs(
                problem.N % problem.group_size == 0,
                f"awq_gemm needs N={problem.N} to be a multiple of the group size {problem.group_size}",
            ),
        )

    def _call(self, x: Tensor, packed: Packed) -> Tensor:
        t = packed.tensors
        y: Tensor = operators().awq_gemm(aligned(x.contiguous()), t["qweight"], t["scales"], t["qzeros"], SPLIT_K)
        return y


class AwqDequantize(_Awq):
    name = "vllm.awq_dequantize"
    note = "w = RN((q-z)s) written to memory, then torch.matmul: the order of summation is cuBLAS's"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype == torch.float16, "awq_dequantize takes fp16 only"),
            needs(capability >= (7, 5), "awq_dequantize needs compute capability 7.5"),
            awq_range(problem),
            needs(problem.N % 64 == 0, f"awq_dequantize needs N to be a multiple of 64, not {problem.N}"),
            needs(problem.K % 8 == 0, f"awq_dequantize needs K to be a multiple of 8, not {problem.K}"),
        )

    def _call(self, x: Tensor, packed: Packed) -> Tensor:
        t = packed.tensors
        w: Tensor = operators().awq_dequantize(t["qweight"], t["scales"], t["qzeros"], 0, 0, 0)
        return torch.matmul(x, w)


register(AwqGemm())
register(AwqDequantize())
