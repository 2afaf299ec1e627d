"""One fused sum of a tensor core in float64 with rounding toward zero: an oracle that shares no arithmetic with qlab.

A magic constant of 2^52 units, added and taken off again, leaves whole units of a term. That is exact for fp16 and bf16 at any
exponents under three conditions, each of which can be switched off here to show what it is there for. Finite numbers only.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from qlab.hardware import Step

Double = NDArray[np.float64]
LAYOUT = {torch.float16: (10, 15), torch.bfloat16: (7, 127)}


def fused_sum(
    a: NDArray[np.uint16],
    b: NDArray[np.uint16],
    c: NDArray[np.uint32],
    step: Step,
    dtype: torch.dtype,
    *,
    decoded_exponents: bool = True,
    signed_magic: bool = True,
    overflow: bool = True,
) -> NDArray[np.uint32]:
    """fp32 bits of ``c[r] + sum_k a[r, k] * b[r, k]``, one fused sum of any number of terms.

    ``decoded_exponents``: the largest exponent is taken from the stored exponents, not from the float64 product.
    ``signed_magic``: the magic constant has the term's sign. ``overflow``: what exceeds fp32 becomes infinite.
    """
    x, y = (torch.from_numpy(v.view(np.int16)).view(dtype).double().numpy() for v in (a, b))
    terms = np.concatenate([c.view(np.float32).astype(np.float64)[:, None], x * y], axis=1)
    fraction_bits, offset = LAYOUT[dtype]
    stored = [np.maximum(v.astype(np.int64) >> fraction_bits & (2 * offset + 1), 1) - offset for v in (a, b)]
    of_c = np.maximum(c.astype(np.int64) >> 23 & 0xFF, 1) - 127
    products = stored[0] + stored[1] if decoded_exponents else np.frexp(x * y)[1] - 1
    exponents = np.where(terms == 0, step.zero_exponent, np.concatenate([of_c[:, None], products], axis=1))
    magic = np.ldexp(1.0, 52 + exponents.max(axis=1, keepdims=True) - step.fraction_bits)
    magic = np.copysign(magic, terms) if signed_magic else magic
    kept = add_toward_zero(add_toward_zero(terms, magic), -magic)
    return to_fp32(kept.sum(axis=1), overflow)  # whole units, fewer than 2^53 of them: exact in any order


def add_toward_zero(x: Double, y: Double) -> Double:
    s = x + y
    part = s - x
    error = (x - (s - part)) + (y - part)
    return np.where((error != 0) & ((error > 0) != (s > 0)), np.nextafter(s, 0), s)


def to_fp32(x: Double, overflow: bool) -> NDArray[np.uint32]:
    """Truncated; zero is +0."""
    with np.errstate(over="ignore"):
        y = x.astype(np.float32)
    y = np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)
    if overflow:
        y = np.where(np.abs(x) >= 2.0**128, np.copysign(np.float32(np.inf), x), y)
    return (y + np.float32(0)).astype(np.float32).view(np.uint32)
