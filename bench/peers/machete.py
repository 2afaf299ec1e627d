"""vLLM's Machete under every schedule that it was compiled with; the registry's ``vllm.machete.*`` take its own choice."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.peer import Swept
from qlab.backends.registry import Packed, Problem, Support, kernel
from qlab.backends.vllm_extension import UINT4, UINT4B8, operators
from qlab.backends.vllm_kernel import aligned
from qlab.weights import Int4Weight


class MacheteBest(Swept):
    """``machete_mm`` on one kind of weight, ``awq`` or ``gptq``, by the schedule that is fastest."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.name, self.source = f"vllm.machete.{kind}.best", kind
        self.type = UINT4 if kind == "awq" else UINT4B8
        self.note = "the fastest of Machete's compiled schedules, found by timing all of them"

    def supports(self, problem: Problem, device: torch.device) -> Support:
        return kernel(f"vllm.machete.{self.source}").supports(problem, device)

    def pack(self, weight: Int4Weight) -> Packed:
        return kernel(f"vllm.machete.{self.source}").pack(weight)

    def variants(self, packed: Packed) -> tuple[str, ...]:
        dtype = packed.problem.dtype
        zeros = dtype if self.source == "awq" else None
        found = operators().machete_supported_schedules(dtype, self.type, dtype, zeros, None, None, None)
        return tuple(sorted(found))

    def run_variant(self, x: Tensor, packed: Packed, variant: str) -> Tensor:
        t, p = packed.tensors, packed.problem
        if "order" in t:
            x = x.index_select(1, t["order"])
        group = -1 if p.group_size == p.K else p.group_size
        zeros = t.get("scaled_zeros")
        x = aligned(x.contiguous())
        y: Tensor = operators().machete_mm(x, t["qweight"], self.type, None, t["scales"], zeros, group, None, None, variant)
        return y

    def version(self) -> str:
        return kernel(f"vllm.machete.{self.source}").version()


PEERS = (MacheteBest("awq"), MacheteBest("gptq"))
