"""This project's Triton kernels in the registry.

Without a CUDA GPU they run in Triton's interpreter, which knows fp16 only. Triton reads TRITON_INTERPRET when a kernel is
defined, so the kernels are imported on first use, after the choice is made.
"""

from __future__ import annotations

import os
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, register
from qlab.errors import UnsupportedError
from qlab.packing import awq, gptq
from qlab.weights import Int4Weight


def choose_interpreter() -> bool:
    """Turn Triton's interpreter on when there is no CUDA GPU and TRITON_INTERPRET is not set; whether it is on."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@lru_cache(maxsize=1)
def launchers() -> SimpleNamespace:
    """The launchers by name, and ``interpreted``. Raises UnsupportedError where Triton cannot be imported."""
    choose_interpreter()
    try:
        from qlab.triton_kernels import awq_dequantize, awq_gemm, gptq_gemm, launch
    except ImportError as e:
        raise UnsupportedError(f"Triton cannot be imported ({e}); it is published for Linux: pip install triton") from e
    return SimpleNamespace(
        awq_gemm=awq_gemm.awq_gemm,
        awq_dequantize=awq_dequantize.awq_dequantize,
        gptq_gemm=gptq_gemm.gptq_gemm,
        split_count=launch.split_count,
        check_x=launch.check_x,
        interpreted=launch.interpreted(awq_gemm.awq_gemm_kernel),
    )


class TritonKernel(Kernel):
    """What the Triton kernels share: where they run and which shapes they take."""

    def supports(self, problem: Problem, device: torch.device) -> Support:
        try:
            interpreted = launchers().interpreted
        except UnsupportedError as e:
            return Support(False, str(e))
        if interpreted and problem.dtype != torch.float16:
            return Support(False, f"{_name(problem.dtype)}: Triton's interpreter computes it wrongly; it needs a CUDA GPU")
        if not interpreted and device.type != "cuda":
            return Support(False, f"device {device.type}: needs a CUDA GPU, or TRITON_INTERPRET=1 set before Python starts")
        reason = self.refusal(problem, (8, 0) if interpreted else torch.cuda.get_device_capability(device))
        return Support(False, reason) if reason else YES

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        if capability < (8, 0):
            return "needs a GPU of compute capability 8.0 or later"
        if problem.N % 8:
            return f"N={problem.N} is not a multiple of 8"
        if problem.group_size % 32 and problem.group_size != problem.K:
            return f"group size {problem.group_size} is neither a multiple of 32 nor the whole column"
        return self.cannot_hold(problem)

    def cannot_hold(self, problem: Problem) -> str:
        """Why the storage layout cannot hold the weight; empty when it can."""
        raise NotImplementedError

    def version(self) -> str:
        try:
            import triton
        except ImportError:
            return ""
        return f"triton {triton.__version__}{' interpreter' if launchers().interpreted else ''}"


class AwqGemm(TritonKernel):
    layout = "awq"
    source = "awq"

    def __init__(self, name: str, split: bool, note: str):
        self.name, self.split, self.note = name, split, note

    def cannot_hold(self, problem: Problem) -> str:
        if problem.act_order:
            return "the AWQ layout has no group index (act-order)"
        if problem.zero_max > 15:
            return f"the AWQ layout cannot hold zero point {problem.zero_max}"
        return ""

    def pack(self, weight: Int4Weight) -> Packed:
        t = awq.pack(weight)
        return Packed({"qweight": t.qweight, "qzeros": t.qzeros, "scales": t.scales}, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        kernels = launchers()
        t = packed.tensors
        split_k = kernels.split_count(packed.problem.K) if self.split else 1
        return kernels.awq_gemm(x, t["qweight"], t["qzeros"], t["scales"], split_k=split_k)


class AwqDequantize(AwqGemm):
    def run(self, x: Tensor, packed: Packed) -> Tensor:
        t = packed.tensors
        w = launchers().awq_dequantize(t["qweight"], t["qzeros"], t["scales"])
        launchers().check_x(x, w.shape[0], w.dtype, w.device)
        return x @ w


class GptqGemm(TritonKernel):
    layout = "gptq"
    source = "gptq"

    def __init__(self, name: str, split: bool, stored: gptq.Version, note: str):
        self.name, self.split, self.stored, self.note = name, split, stored, note
        self.zero_range = (1, 16) if stored == 1 else (0, 15)

    def cannot_hold(self, problem: Problem) -> str:
        if problem.K % 8:
            return f"K={problem.K} is not a multiple of 8, the rows in one int32"
        for zero in (problem.zero_min, problem.zero_max):
            if not self.zero_range[0] <= zero <= self.zero_range[1]:
                return f"the GPTQ v{self.stored} layout cannot hold zero point {zero}"
        return ""

    def pack(self, weight: Int4Weight) -> Packed:
        t = gptq.pack(weight, version=self.stored)
        tensors = {"qweight": t.qweight, "qzeros": t.qzeros, "scales": t.scales}
        if weight.act_order:
            tensors["g_idx"] = t.g_idx
        return Packed(tensors, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        kernels = launchers()
        t = packed.tensors
        split_k = kernels.split_count(packed.problem.K) if self.split else 1
        return kernels.gptq_gemm(
            x, t["qweight"], t["qzeros"], t["scales"], t.get("g_idx"), version=self.stored, split_k=split_k
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_SEQUENTIAL = "fp32 sums, k ascending, rounded once"
_SPLIT = "fp32 sums of up to 8 slices of K, joined in fp32 in order, rounded once"

for _kernel in (
    AwqGemm("triton.awq_gemm", False, _SEQUENTIAL),
    AwqGemm("triton.awq_gemm.splitk", True, _SPLIT),
    AwqDequantize("triton.awq_dequantize", False, "decodes to memory, then torch.matmul"),
    GptqGemm("triton.gptq_gemm", False, 1, f"zero points stored minus one; {_SEQUENTIAL}"),
    GptqGemm("triton.gptq_gemm.splitk", True, 1, f"zero points stored minus one; {_SPLIT}"),
    GptqGemm("triton.gptq_gemm.v2", False, 2, f"zero points stored as they are; {_SEQUENTIAL}"),
):
    register(_kernel)
