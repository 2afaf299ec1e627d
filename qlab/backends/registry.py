"""One registry of kernels, which feeds the command, the tests and the benchmarks.

A new kernel is one file in this folder that calls :func:`register`; nothing else needs an edit.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.weights import Int4Weight


@dataclass(frozen=True)
class Problem:
    """Everything that decides whether a kernel can run: shape, grouping, dtype, range of the zero points."""

    M: int
    K: int
    N: int
    group_size: int
    """K for whole-column scales."""
    dtype: torch.dtype
    symmetric: bool
    act_order: bool
    zero_min: int = 8
    zero_max: int = 8
    bias: bool = False
    """Whether a bias is added inside the call."""

    @classmethod
    def of(cls, weight: Int4Weight, m: int) -> Problem:
        z = weight.zeros
        return cls(
            m,
            weight.K,
            weight.N,
            weight.group_size,
            weight.dtype,
            weight.symmetric,
            weight.act_order,
            int(z.min()),
            int(z.max()),
        )


class Support(NamedTuple):
    """Whether a kernel runs a problem on a device; the reason is empty when it does and one sentence when it does not."""

    ok: bool
    reason: str = ""


YES = Support(True)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in one kernel's storage: named tensors, ready for any number of calls."""

    tensors: Mapping[str, Tensor]
    problem: Problem
    """With M = 0: a packed weight serves every M."""


class Kernel(ABC):
    """One INT4 GEMM: ``y[M, N] = x[M, K] @ dequantize(weight)`` in x's dtype."""

    name: str
    """Unique, family first: ``vllm.marlin.awq``."""
    layout: str
    """Storage layout it reads: a module of qlab.packing, or ``none``."""
    source: str = ""
    """Checkpoint family it serves, ``awq`` or ``gptq``; empty when it takes either."""
    portable: bool = False
    """True when it stands for no GPU and so runs whatever GPU is asked for (the references)."""
    repeatable: bool = True
    """False where the order of its sums is not fixed (atomics)."""
    note: str = ""
    """One line: what it computes and in which order."""

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        """Why the kernel cannot run ``problem`` on a GPU of that compute capability, wherever this is; empty when it can."""
        return ""

    @abstractmethod
    def supports(self, problem: Problem, device: torch.device) -> Support:
        """Whether it can run ``problem`` on ``device``, with the reason if not."""

    @abstractmethod
    def pack(self, weight: Int4Weight) -> Packed:
        """``weight`` in this kernel's storage, on the weight's device. Raises PackingError."""

    @abstractmethod
    def run(self, x: Tensor, packed: Packed) -> Tensor:
        """y [M, N] for x [M, K] of the weight's dtype; x row-major, last stride 1."""

    def decoded(self, weight: Int4Weight) -> Tensor:
        """The weight as this kernel sees it [K, N] in its dtype: what a one-hot row of x must return, bit for bit.

        ``RN((q - z) * s)`` unless a kernel says otherwise.
        """
        return weight.dequantize(weight.dtype)

    def version(self) -> str:
        """Build that runs: library version and sha256 where there is one."""
        return ""


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Add a kernel. Raises QlabError when the name is taken."""
    if kernel.name in _KERNELS:
        raise QlabError(f"kernel {kernel.name!r} is registered twice")
    _KERNELS[kernel.name] = kernel
    return kernel


@lru_cache(maxsize=1)
def _import_all() -> None:
    import qlab.backends as package

    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"qlab.backends.{module}")


def kernels() -> tuple[Kernel, ...]:
    """Every registered kernel, by name."""
    _import_all()
    return tuple(_KERNELS[name] for name in sorted(_KERNELS))


def kernel(name: str) -> Kernel:
    """The kernel of that name. Raises QlabError naming the known ones."""
    _import_all()
    try:
        return _KERNELS[name]
    except KeyError:
        raise QlabError(f"unknown kernel {name!r}; known: {', '.join(sorted(_KERNELS))}") from None
