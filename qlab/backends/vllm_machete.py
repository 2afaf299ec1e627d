"""vLLM's Machete, what its labels ``awq_marlin`` and ``gptq_marlin`` really run on Hopper.

Storage: weights by vLLM's own ``machete_prepack_B`` (CUTLASS-internal), scales [G, N] as they are, for AWQ the zero points
already multiplied: ``zs = RN(-s * z)``. Machete dequantises AWQ in one fused multiply-add, ``RN(q * s + zs)``: other weights
than ``RN((q - z) * s)``, which every other kernel has.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qlab.backends.registry import Packed, Problem, register
from qlab.backends.vllm_extension import UINT4, UINT4B8, operators
from qlab.backends.vllm_kernel import VllmKernel, aligned, awq_range, first, needs, sort_groups
from qlab.packing import nibbles
from qlab.weights import ACTIVATION_DTYPES, Int4Weight

GROUP_SIZES = (64, 128)
"""Group sizes that vLLM allows, besides the whole column."""


def shape_refusal(problem: Problem) -> str:
    """Why Machete cannot run a shape or grouping; empty when it can."""
    return first(
        needs(problem.K % 64 == 0, f"Machete needs K to be a multiple of 64, not {problem.K}"),
        needs(problem.N % 128 == 0, f"Machete needs N to be a multiple of 128, not {problem.N}"),
        needs(
            problem.group_size in (*GROUP_SIZES, problem.K),
            f"Machete needs groups of 64, 128 or the whole column, not {problem.group_size}",
        ),
    )


class Machete(VllmKernel):
    """``machete_mm`` on one kind of weight, ``awq`` or ``gptq``."""

    layout = "none"

    def __init__(self, kind: str) -> None:
        self.name, self.source = f"vllm.machete.{kind}", kind
        weight = "RN(q*s + RN(-s*z))" if kind == "awq" else "RN((q-8)s)"
        self.note = f"w = {weight}; wgmma over k64 tiles ascending, fp32, stream-K (machete_mainloop.cuh)"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype in ACTIVATION_DTYPES, "Machete takes fp16 and bf16"),
            needs(capability == (9, 0), "Machete needs a Hopper GPU (compute capability 9.0)"),
            awq_range(problem) if self.source == "awq" else "",
            needs(self.source == "awq" or problem.symmetric, "Machete's GPTQ type has the zero point 8 only"),
            shape_refusal(problem),
        )

    def tensors(self, weight: Int4Weight) -> Mapping[str, Tensor]:
        dtype, codes = weight.dtype, weight.codes
        tensors = {"scales": weight.scales.contiguous()}
        if weight.act_order:
            order = sort_groups(weight.group_index)
            codes = codes[order.long()]
            tensors["order"] = order
        if self.source == "awq":
            tensors["scaled_zeros"] = scaled_zeros(weight)
        column_major = nibbles.join_rows(codes).t().contiguous().t()
        tensors["qweight"] = operators().machete_prepack_B(column_major, dtype, self._type, dtype)
        return tensors

    def _call(self, x: Tensor, packed: Packed) -> Tensor:
        t, p = packed.tensors, packed.problem
        if "order" in t:
            x = x.index_select(1, t["order"])
        group_size = -1 if p.group_size == p.K else p.group_size
        y: Tensor = operators().machete_mm(
            aligned(x.contiguous()),
            t["qweight"],
            self._type,
            None,
            t["scales"],
            t.get("scaled_zeros"),
            group_size,
            None,
            None,
            None,
        )
        return y

    def decoded(self, weight: Int4Weight) -> Tensor:
        """For AWQ ``RN(q * s + RN(-s * z))``, one rounding in a fused multiply-add; for GPTQ ``RN((q - 8) * s)``."""
        if self.source != "awq":
            return super().decoded(weight)
        g = weight.group_index.long()
        scales, zeros = weight.scales.float()[g], scaled_zeros(weight).float()[g]
        # Exact in float32: both terms are multiples of the scale's last place and their sum has at most 16 bits.
        return (weight.codes.float() * scales + zeros).to(weight.dtype)

    @property
    def _type(self) -> int:
        return UINT4 if self.source == "awq" else UINT4B8


def scaled_zeros(weight: Int4Weight) -> Tensor:
    """``RN(-s * z)`` [G, N] in the weight's dtype, what Machete stores in place of AWQ's zero points."""
    return (-1.0 * weight.scales * weight.zeros.to(weight.dtype)).contiguous()


register(Machete("awq"))
register(Machete("gptq"))
