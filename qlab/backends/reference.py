"""Plain PyTorch: the float64 oracle that every error is measured against, and float32.

Both decode the weight as the kernels do, ``RN((q - z) * s)`` in the activation dtype, so that what remains is arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, register
from qlab.errors import UnsupportedError
from qlab.weights import Int4Weight, round_once


def oracle(x: Tensor, weight: Int4Weight) -> Tensor:
    """``x @ RN((q - z) * s)`` in float64 [M, N]: products exact, the sum good to K * 2^-53 of :func:`magnitude` at worst."""
    return x.double() @ weight.dequantize(weight.dtype).double()


def magnitude(x: Tensor, weight: Int4Weight) -> Tensor:
    """``sum over k of |x[m, k]| * |w[k, n]|`` in float64 [M, N]: the scale that rounding errors of a sum are measured by."""
    return x.double().abs() @ weight.dequantize(weight.dtype).double().abs()


class Reference(Kernel):
    """Decode, multiply in one wide type, round once. Runs every problem on every device."""

    layout = "none"
    portable = True

    def __init__(self, name: str, wide: torch.dtype, note: str):
        self.name, self.wide, self.note = name, wide, note

    def supports(self, problem: Problem, device: torch.device) -> Support:
        return YES

    def pack(self, weight: Int4Weight) -> Packed:
        return Packed({"weight": weight.dequantize(weight.dtype)}, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        w = packed.tensors["weight"]
        if x.ndim != 2 or x.shape[1] != w.shape[0]:
            raise UnsupportedError(f"x must be [M, {w.shape[0]}], not {list(x.shape)}")
        if x.dtype != w.dtype:
            raise UnsupportedError(f"x is {x.dtype} and the weight {w.dtype}: cast x")
        return round_once(x.to(self.wide) @ w.to(self.wide), x.dtype)

    def version(self) -> str:
        return f"torch {torch.__version__}"


FLOAT64 = register(Reference("reference.float64", torch.float64, "float64 sums, rounded once: the oracle"))
FLOAT32 = register(Reference("reference.float32", torch.float32, "float32 sums in the order of PyTorch's matmul, rounded once"))
