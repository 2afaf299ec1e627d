"""vLLM's Marlin on AWQ weights (uint4 with zero points) and GPTQ weights (uint4b8), in its three ways to join blocks.

vLLM serves ``use_fp32_reduce=True``, the kernels without a suffix. ``.fp16`` hands partial sums between thread blocks in the
activations' dtype; ``.atomic`` adds them by atomics, in no fixed order, where the operator finds a launch's output small
enough: N * ceil(m / 64) <= 2048, m the rows of that launch. The last M % 64 rows are a launch of their own, so with N <= 2048
they may be added by atomics where the rows above them are not.

Storage: qlab.packing.marlin; weights are repacked by vLLM's own ``gptq_marlin_repack``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.backends.registry import Packed, Problem, register
from qlab.backends.vllm_extension import UINT4, UINT4B8, operators
from qlab.backends.vllm_kernel import VllmKernel, aligned, awq_range, first, needs, sort_groups
from qlab.packing import act_order, marlin, nibbles
from qlab.weights import ACTIVATION_DTYPES, Int4Weight

GROUP_SIZES = (32, 64, 128)
"""Group sizes that were compiled, besides the whole column."""

_WORKSPACES: dict[tuple[int, int], Tensor] = {}


def shape_refusal(problem: Problem) -> str:
    """Why Marlin cannot run a shape or grouping; the condition by which vLLM's labels fall back, too."""
    return first(
        needs(problem.N % 64 == 0, f"Marlin needs N to be a multiple of 64, not {problem.N}"),
        needs(problem.K % 128 == 0, f"Marlin needs K to be a multiple of 128, not {problem.K}"),
        needs(
            problem.group_size in (*GROUP_SIZES, problem.K),
            f"Marlin needs groups of 32, 64, 128 or the whole column, not {problem.group_size}",
        ),
    )


class Marlin(VllmKernel):
    """``marlin_gemm`` on weights of ``awq`` or ``gptq``, with one way to join blocks: ``fp32``, ``fp16`` or ``atomic``."""

    layout = "marlin"

    def __init__(self, kind: str, reduction: str) -> None:
        self.name = f"vllm.marlin.{kind}" + ("" if reduction == "fp32" else f".{reduction}")
        self.source, self.reduction = kind, reduction
        self.repeatable = reduction != "atomic"
        how = {
            "fp32": "blocks joined in fp32 from the last rows up, as vLLM serves it",
            "fp16": "blocks joined in turn, rounded to the activations' dtype between them",
            "atomic": "blocks joined by atomics where the output is small",
        }
        self.note = f"w = RN((q-z)s), whole-column scales after the sum; {how[reduction]}"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        half = problem.dtype == torch.float16
        return first(
            needs(problem.dtype in ACTIVATION_DTYPES, "Marlin takes fp16 and bf16"),
            needs(capability >= (7, 5), "Marlin needs compute capability 7.5"),
            needs(half or capability >= (8, 0), "Marlin needs compute capability 8.0 for bf16"),
            needs(
                half or self.reduction != "atomic" or capability >= (9, 0),
                "bf16 atomics need compute capability 9.0",
            ),
            awq_range(problem) if self.source == "awq" else "",
            needs(self.source == "awq" or problem.symmetric, "Marlin's GPTQ type has the zero point 8 only"),
            shape_refusal(problem),
        )

    def tensors(self, weight: Int4Weight) -> Mapping[str, Tensor]:
        none = act_order.none(weight.device)
        order = sort_groups(weight.group_index) if weight.act_order else none
        groups = weight.group_index[order.long()].contiguous() if weight.act_order else none
        rows = nibbles.join_rows(weight.codes)
        return {
            "qweight": operators().gptq_marlin_repack(rows, order, weight.K, weight.N, 4, False),
            "scales": marlin.permute_scales(weight.scales),
            "qzeros": marlin.pack_zeros(weight.zeros) if self.source == "awq" else none,
            "groups": groups,
            "order": order,
        }

    def _call(self, x: Tensor, packed: Packed) -> Tensor:
        return self.gemm(x, packed)

    def gemm(self, x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
        """The operator's y [M, N], with ``bias`` [N] of x's dtype added inside the call; vLLM hands it over permuted."""
        t, p = packed.tensors, packed.problem
        y: Tensor = operators().marlin_gemm(
            readable(x),
            None,
            t["qweight"],
            None if bias is None else marlin.permute_bias(bias),
            t["scales"],
            None,
            None,
            t["qzeros"],
            t["groups"],
            t["order"],
            workspace(x.device),
            UINT4 if self.source == "awq" else UINT4B8,
            x.shape[0],
            p.N,
            p.K,
            True,
            self.reduction == "atomic",
            self.reduction != "fp16",
            False,
        )
        return y


def readable(x: Tensor) -> Tensor:
    """x where Marlin can read it in place, rows apart by a multiple of 8 elements; otherwise a copy."""
    in_place = x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0
    return aligned(x if in_place else x.clone(memory_format=torch.contiguous_format))


def workspace(device: torch.device) -> Tensor:
    """Marlin's locks, int32 zeros [SM count]: one per stream, for two calls that share locks and overlap never finish.

    The kernel leaves them zero. While a CUDA graph is captured a stream without locks gets its own from the graph's memory;
    one with locks puts them into the graph, which must then not be replayed beside calls on that stream.
    """
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    found = _WORKSPACES.get(key)
    if found is None:
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        found = torch.zeros(sms, dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing():
            _WORKSPACES[key] = found
    return found


for _kind in ("awq", "gptq"):
    for _reduction in ("fp32", "fp16", "atomic"):
        register(Marlin(_kind, _reduction))
