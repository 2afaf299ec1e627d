"""The hardware-invariant INT4 GEMM in the registry: fp32 fused multiply-adds in one order, the same bits on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, register
from qlab.backends.vllm_kernel import first, needs
from qlab.gemm import hardware_invariant, launch
from qlab.packing import fragments
from qlab.weights import ACTIVATION_DTYPES, Int4Weight


class HardwareInvariant(Kernel):
    """One order of fp32 fused multiply-adds, whatever the GPU, the number of rows and who shares the batch."""

    name = "cuda.hardware_invariant"
    layout = "fragments"
    note = "w = RN((q-z)s), fp32 fused multiply-adds in an order that K alone decides, rounded once: no tensor core"

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype in ACTIVATION_DTYPES, "takes fp16 and bf16"),
            needs(capability >= (8, 0), "needs a GPU of compute capability 8.0 or later"),
            fragments.refusal(problem.K, problem.N, problem.group_size),
        )

    def supports(self, problem: Problem, device: torch.device) -> Support:
        if device.type != "cuda":
            return Support(False, "needs a CUDA GPU; its bits are replayed on any machine")
        reason = hardware_invariant.reason() or self.refusal(problem, torch.cuda.get_device_capability(device))
        return Support(False, reason) if reason else YES

    def pack(self, weight: Int4Weight) -> Packed:
        t = fragments.pack(weight)
        return Packed({"blocks": launch.written(t.blocks), "perm": t.perm}, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        return hardware_invariant.run(x, packed.tensors, packed.problem)


register(HardwareInvariant())
