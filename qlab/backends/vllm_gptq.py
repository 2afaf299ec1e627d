"""vLLM's ``gptq_gemm`` (ExLlama), which its label ``gptq`` runs.

Up to 50 tokens one kernel multiplies in fp16 and joins blocks of 128 rows by fp16 atomics; above, the operator writes the
weight to memory and calls cublasHgemm. Storage: qweight int32 [K/8, N] shuffled by vLLM's own ``gptq_shuffle``, rows sorted by
group under act-order; qzeros int32 [G, N/8] and scales fp16 [G, N] in group order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.backends.registry import Packed, Problem, register
from qlab.backends.vllm_extension import operators
from qlab.backends.vllm_kernel import VllmKernel, aligned, first, needs, sort_groups
from qlab.packing import act_order, gptq
from qlab.weights import Int4Weight

BLOCK_K = 128
"""Rows of one thread block; a group's end is looked for within one only every 32 rows."""


class GptqGemm(VllmKernel):
    name = "vllm.gptq_gemm"
    layout = "exllama"
    source = "gptq"
    repeatable = False
    note = "up to 50 tokens fp16 chains of 4, scale after the dot, fp16 atomics per 128 rows; above, RN((q-z)s) and cublasHgemm"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        g = problem.group_size
        return first(
            needs(problem.dtype == torch.float16, "gptq_gemm takes fp16 only"),
            needs(capability >= (6, 0), "gptq_gemm needs compute capability 6.0"),
            needs(problem.N % 8 == 0, f"gptq_gemm needs N to be a multiple of 8, not {problem.N}"),
            needs(problem.K % 32 == 0, f"gptq_gemm needs K to be a multiple of 32, not {problem.K}"),
            needs(
                g == problem.K or (g % 32 == 0 and BLOCK_K % g == 0) or g % BLOCK_K == 0,
                f"gptq_gemm needs groups of 32, 64, a multiple of 128 or the whole column, not {g}",
            ),
            needs(
                problem.zero_min >= 1 or problem.zero_max <= 15,
                "GPTQ v1 holds zero points 1 to 16 and v2 0 to 15; this weight has both 0 and 16",
            ),
        )

    def tensors(self, weight: Int4Weight) -> Mapping[str, Tensor]:
        packed = gptq.pack(weight, version=_version(Problem.of(weight, 0)))
        order = sort_groups(weight.group_index) if weight.act_order else act_order.none(weight.device)
        operators().gptq_shuffle(packed.qweight, order, 4)  # in place
        return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales, "order": order}

    def _call(self, x: Tensor, packed: Packed) -> Tensor:
        t, v2 = packed.tensors, _version(packed.problem) == 2
        y: Tensor = operators().gptq_gemm(
            aligned(x.contiguous()), t["qweight"], t["qzeros"], t["scales"], t["order"], True, v2, 4
        )
        return y


def _version(problem: Problem) -> gptq.Version:
    """GPTQ's storage of zero points: v1 where it can hold them, as vLLM's default checkpoints do."""
    return 1 if problem.zero_min >= 1 else 2


register(GptqGemm())
