"""Plain PyTorch: the float64 oracle that every error is measured against, and float32.

Both decode the weight as the kernels do, ``RN((q - z) * s)`` in the activation dtype, so that what remains is arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, register
from qlab.errors import UnsupportedError
from qlab.weights import Int4Weight


def oracle(x: Tensor, weight: Int4Weight) -> Tensor:
    """``x @ RN((q - z) * s)`` in float64 [M, N]: products exact, the sum good to about 2^-52 of :func:`magnitude`."""
    return x.double() @ weight.dequantize(weight.dtype).double()


def magnitude(x: Tensor, weight: Int4Weight) -> Tensor:
    """``sum over k of |x[m, k]| * |w[k, n]|`` in float64 [M, N]: the scale that rounding errors of a sum are measured by."""
    return x.double().abs() @ weight.dequantize(weight.dtype).double().abs()


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 or float32 ``value`` rounded to nearest even to fp16, bf16 or float32, in one rounding.

    PyTorch converts float64 to fp16 by way of float32, which rounds twice. Going there by rounding to odd instead, toward
    zero with the last bit set where that was inexact, leaves the second rounding nothing to get wrong: float32 has more
    than two bits beyond either type.
    """
    if value.dtype != torch.float64 or dtype in (torch.float32, torch.float64):
        return value.to(dtype)
    nearest = value.float()
    back = nearest.double()
    bits = nearest.view(torch.int32)
    # A float's bits grow with its magnitude, so one less is the next value toward zero.
    toward_zero = bits - (back.abs() > value.abs()).int()
    odd = torch.where((back == value) | value.isnan(), bits, toward_zero | 1)
    return odd.view(torch.float32).to(dtype)


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
