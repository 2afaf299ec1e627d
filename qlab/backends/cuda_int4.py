"""qlab's CUDA INT4 kernels in the registry: Marlin's recipe, the fastest of our own, and one recipe for every M.

All three read the ``fragments`` layout and execute plans that are made from their recipes (qlab/gemm/plan.py, qlab/recipes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, register
from qlab.backends.vllm_kernel import first, needs
from qlab.backends.vllm_marlin import shape_refusal
from qlab.errors import PackingError
from qlab.gemm import launch
from qlab.gemm.planner import Planner
from qlab.packing import fragments
from qlab.weights import ACTIVATION_DTYPES, Int4Weight


class CudaInt4(Kernel):
    """One recipe on the CUDA INT4 kernels."""

    layout = "fragments"

    def __init__(self, name: str, note: str) -> None:
        self.name, self.note, self.planner = name, note, Planner(name)

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return first(
            needs(problem.dtype in ACTIVATION_DTYPES, "takes fp16 and bf16"),
            needs(capability >= (8, 0), "needs a GPU of compute capability 8.0 or later"),
            self.shape_refusal(problem),
            fragments.refusal(problem.K, problem.N, problem.group_size),
        )

    def shape_refusal(self, problem: Problem) -> str:
        """Why the recipe itself does not reach a shape; empty where it does."""
        return ""

    def supports(self, problem: Problem, device: torch.device) -> Support:
        if device.type != "cuda":
            return Support(False, "needs a CUDA GPU")
        reason = launch.reason() or self.refusal(problem, torch.cuda.get_device_capability(device))
        return Support(False, reason) if reason else YES

    def pack(self, weight: Int4Weight) -> Packed:
        problem = Problem.of(weight, 0)
        if why := self.shape_refusal(problem):
            where = f"weight {weight.name!r}: " if weight.name else ""
            raise PackingError(f"{where}{self.name} cannot run it: {why}")
        t = fragments.pack(weight)
        return Packed({"blocks": launch.written(t.blocks), "column_scales": t.column_scales, "perm": t.perm}, problem)

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        return launch.run(x, packed.tensors, packed.problem, self.planner)

    def version(self) -> str:
        return launch.version()


class CudaMarlin(CudaInt4):
    """Marlin's bits; it takes the shapes that Marlin takes."""

    def shape_refusal(self, problem: Problem) -> str:
        return shape_refusal(problem)


_JOINED = "fp32 sums of slices of K, joined in fp32 in order, rounded once"

for _make, _name, _note in (
    (CudaMarlin, "cuda.marlin", "Marlin's sums and joins, so that its bits are vllm.marlin's"),
    (CudaInt4, "cuda.split", f"as many slices as are fastest; {_JOINED}"),
    (CudaInt4, "cuda.batch_invariant", f"the same slices for every M; {_JOINED}"),
):
    register(_make(_name, _note))
