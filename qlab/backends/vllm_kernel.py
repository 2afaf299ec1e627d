"""What vLLM's kernels share: when they can run, which build they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.backends.registry import YES, Kernel, Packed, Problem, Support
from qlab.backends.vllm_extension import Missing, extension
from qlab.errors import PackingError, UnsupportedError
from qlab.weights import Int4Weight

MOST_ELEMENTS = 2**31
"""Of x, weight or y: most of these kernels compute addresses in 32 bits and would leave a larger matrix."""


class VllmKernel(Kernel):
    """A kernel of vLLM's compiled extension; it packs and runs on a CUDA GPU only."""

    @abstractmethod
    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        """Why the operator cannot run ``problem`` on a GPU of that compute capability; empty when it can."""

    @abstractmethod
    def tensors(self, weight: Int4Weight) -> Mapping[str, Tensor]:
        """The operator's tensors for a weight on a GPU that it does not refuse."""

    @abstractmethod
    def _call(self, x: Tensor, packed: Packed) -> Tensor:
        """The operator's y [M, N] for x that :func:`check_x` has passed, M at least 1."""

    def supports(self, problem: Problem, device: torch.device) -> Support:
        if device.type != "cuda":
            return Support(False, "needs a CUDA GPU")
        capability = torch.cuda.get_device_capability(device)
        reason = self.refusal(problem, capability) or too_large(problem) or self.missing()
        return Support(False, reason) if reason else YES

    def pack(self, weight: Int4Weight) -> Packed:
        problem = Problem.of(weight, 0)
        support = self.supports(problem, weight.device)
        if not support.ok:
            where = f"weight {weight.name!r}: " if weight.name else ""
            raise PackingError(f"{where}{self.name} cannot hold it: {support.reason}")
        with torch.cuda.device_of(weight.codes):
            return Packed(self.tensors(weight), problem)

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        """y [M, N]; rows of x may lie any distance apart. Raises UnsupportedError for an x that does not fit the weight."""
        check_x(x, packed)
        if not len(x):  # some operators fail on an empty grid
            return x.new_empty((0, packed.problem.N))
        with torch.cuda.device_of(x):  # not every operator makes its tensors' device the current one
            return self._call(x, packed)

    def missing(self) -> str:
        """Why this kernel's code is not here; empty when it is."""
        found = extension()
        return found.reason if isinstance(found, Missing) else ""

    def version(self) -> str:
        found = extension()
        return "" if isinstance(found, Missing) else str(found)


def check_x(x: Tensor, packed: Packed) -> None:
    """Raise UnsupportedError unless x is [M, K] of the weight's dtype on its device, with rows of consecutive elements.

    The operators check little of this; given less they read beyond x or take one number format for another.
    """
    k, dtype = packed.problem.K, packed.problem.dtype
    device = next(iter(packed.tensors.values())).device
    if x.ndim != 2 or x.shape[1] != k:
        raise UnsupportedError(f"x must be [M, {k}], not {list(x.shape)}")
    if x.dtype != dtype:
        raise UnsupportedError(f"x is {x.dtype} and the weight was packed for {dtype}: cast x")
    if x.device != device:
        raise UnsupportedError(f"x is on {x.device} and the weight on {device}: move x")
    if x.stride(1) != 1:
        raise UnsupportedError(f"x has a last stride of {x.stride(1)}; it must be 1: call x.contiguous()")


def too_large(problem: Problem) -> str:
    """Why a shape is beyond the addresses of vLLM's kernels; empty when it is not."""
    sizes = {"M*K": problem.M * problem.K, "K*N": problem.K * problem.N, "M*N": problem.M * problem.N}
    what, size = max(sizes.items(), key=lambda item: item[1])
    return needs(size <= MOST_ELEMENTS, f"vLLM's kernels count elements in 32 bits, and {what} = {size} is more than 2^31")


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, at an address that the operators' 16-byte loads can read."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def first(*reasons: str) -> str:
    """The first reason that is not empty."""
    return next((r for r in reasons if r), "")


def needs(holds: bool, reason: str) -> str:
    """``reason`` unless the condition holds."""
    return "" if holds else reason


def awq_range(problem: Problem) -> str:
    """Why AWQ's storage cannot hold a problem: it has 4-bit zero points and no group index."""
    return first(
        needs(not problem.act_order, "AWQ has no group index, so no act-order"),
        needs(problem.zero_max <= 15, "AWQ holds zero points 0 to 15, not 16"),
    )


def sort_groups(group_index: Tensor) -> Tensor:
    """int32 [K], the order of rows that brings groups together: the same unstable sort that vLLM calls."""
    return torch.argsort(group_index).to(torch.int32)
