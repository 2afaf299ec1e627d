"""One fused dot-add of a tensor core, bit for bit: the step that every tensor-core GEMM repeats along K.

Per output element, K is cut into chunks of ``step.terms`` products, ascending. In each chunk the accumulator and the exact
products are aligned to the largest exponent, truncated toward zero to ``step.fraction_bits`` bits below it and added exactly;
the sum is rounded toward zero to fp32, or to nearest to fp16 where the accumulator is fp16. Numbers travel as their bits, so
that NaN, -0 and subnormals survive the way.

Sources: Khattak and Mikaitis, arXiv 2512.07004; MMA-Sim, arXiv 2511.10909.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import Step

_native: Any = None
_MISSING = ""
try:
    _native = importlib.import_module("qlab._native")
except ImportError as error:
    _MISSING = f"qlab's compiled module is not there ({error}); `pip install -e .` in the repository builds it"

Engine = Literal["auto", "numpy", "native"]
Bits16 = NDArray[np.uint16]
Bits32 = NDArray[np.uint32]
Int64 = NDArray[np.int64]

MAX_TERMS, MAX_FRACTION_BITS = 64, 48  # beyond them a 64-bit sum could overflow
NAN, INFINITY, SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x80000000)


def native_reason() -> str:
    """Why the compiled engine cannot run here: one sentence, or an empty string when it can."""
    return _MISSING


def fused_dot_add(
    a: Bits16, b: Bits16, c: Bits32, step: Step, dtype: torch.dtype = torch.float16, engine: Engine = "auto"
) -> Bits32:
    """``c[r] + sum_k a[r, k] * b[r, k]`` as a tensor core with fp32 accumulators computes it, in chunks of ``step.terms``.

    ``a``, ``b``: uint16 [R, K], bits of ``dtype`` (fp16 or bf16); ``c`` and the result: uint32 [R], bits of fp32. K is a
    multiple of ``step.terms``: K of 16 with L of 8 is Ampere's m16n8k16. A NaN comes out as 0x7FFFFFFF, a zero as +0.
    ``engine`` is ``numpy``, ``native`` (compiled) or ``auto`` (native where it was built); both give the same bits.
    Raises QlabError for wrong arrays, dtypes or steps and UnsupportedError when the compiled engine was asked for and is
    missing.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise QlabError(f"dtype must be torch.float16 or torch.bfloat16, not {dtype}")
    if not 1 <= step.terms <= MAX_TERMS or not 0 <= step.fraction_bits <= MAX_FRACTION_BITS:
        raise QlabError(f"a step holds 1 to {MAX_TERMS} terms and 0 to {MAX_FRACTION_BITS} fraction bits, not {step}")
    for name, bits, kind, ndim in (("a", a, np.uint16, 2), ("b", b, np.uint16, 2), ("c", c, np.uint32, 1)):
        if bits.dtype != kind or bits.ndim != ndim:
            shape = "[R, K]" if ndim == 2 else "[R]"
            raise QlabError(f"{name} must hold bits as {np.dtype(kind)} {shape}, not {bits.dtype} {list(bits.shape)}")
    if a.shape != b.shape or c.shape != a.shape[:1]:
        raise QlabError(f"a {list(a.shape)}, b {list(b.shape)} and c {list(c.shape)} must agree in R and K")
    if a.shape[1] % step.terms:
        raise QlabError(f"K={a.shape[1]} must be a multiple of the step's {step.terms} terms")

    if engine == "numpy" or (engine == "auto" and _native is None):
        for k in range(0, a.shape[1], step.terms):
            c = _chunk(a[:, k : k + step.terms], b[:, k : k + step.terms], c, step, dtype)
        return c.copy()
    if engine not in ("auto", "native"):
        raise QlabError(f"unknown engine {engine!r}; known: auto, numpy, native")
    if _native is None:
        raise UnsupportedError(_MISSING)
    rows = (np.ascontiguousarray(a), np.ascontiguousarray(b), np.ascontiguousarray(c))
    bf16 = dtype == torch.bfloat16
    result: Bits32 = _native.fused_dot_add(*rows, step.fraction_bits, step.terms, step.zero_exponent, bf16)
    return result


class _Format(NamedTuple):
    fraction_bits: int
    exponent_bits: int


_FORMATS = {torch.float16: _Format(10, 5), torch.bfloat16: _Format(7, 8), torch.float32: _Format(23, 8)}


class _Numbers(NamedTuple):
    """Decoded floats: value = significand * 2^(exponent - fraction bits), both int64; the significand carries the sign."""

    significand: Int64
    exponent: Int64
    infinite: NDArray[np.bool_]
    nan: NDArray[np.bool_]
    negative: NDArray[np.bool_]


def _decode(bits: NDArray[np.unsignedinteger], dtype: torch.dtype) -> _Numbers:
    fraction_bits, exponent_bits = _FORMATS[dtype]
    wide = bits.astype(np.int64)
    fraction = wide & ((1 << fraction_bits) - 1)
    field = (wide >> fraction_bits) & ((1 << exponent_bits) - 1)
    negative = (wide >> (fraction_bits + exponent_bits)).astype(bool)
    special = field == (1 << exponent_bits) - 1
    magnitude = np.where(field > 0, fraction + (1 << fraction_bits), fraction)
    exponent = np.maximum(field, 1) - ((1 << (exponent_bits - 1)) - 1)
    return _Numbers(
        np.where(negative, -magnitude, magnitude), exponent, special & (fraction == 0), special & (fraction != 0), negative
    )


def half_dot_add(a: Bits16, b: Bits16, c: Bits16, step: Step) -> Bits16:
    """The same with an fp16 accumulator and fp16 inputs: c and the result are uint16 [R], each fused sum rounded to nearest.

    NaN comes out as 0x7FFF. ``step.zero_exponent_fp16`` takes the place of ``step.zero_exponent``.
    """
    narrow = replace(step, zero_exponent=step.zero_exponent_fp16)
    for k in range(0, a.shape[1], step.terms):
        x, y = a[:, k : k + step.terms], b[:, k : k + step.terms]
        c = _chunk(x, y, c, narrow, torch.float16, torch.float16).astype(np.uint16)
    return c.copy()


def _chunk(
    a: Bits16,
    b: Bits16,
    c: Bits32 | Bits16,
    step: Step,
    dtype: torch.dtype,
    accumulator: torch.dtype = torch.float32,
) -> Bits32:
    """One fused sum: a, b [R, L], c [R]."""
    x, y, start = _decode(a, dtype), _decode(b, dtype), _decode(c, accumulator)
    product = x.significand * y.significand
    terms = np.concatenate([start.significand[:, None], product], axis=1)  # [R, L + 1]
    exponent = np.concatenate([start.exponent[:, None], x.exponent + y.exponent], axis=1)
    fraction_bits = np.array([_FORMATS[accumulator].fraction_bits] + [2 * _FORMATS[dtype].fraction_bits] * a.shape[1])

    exponent = np.where(terms == 0, step.zero_exponent, exponent)
    unit = exponent.max(axis=1) - step.fraction_bits  # the last bit kept is worth 2^unit
    shift = exponent - fraction_bits - unit[:, None]
    magnitude = np.abs(terms) << np.maximum(shift, 0) >> np.minimum(np.maximum(-shift, 0), 63)
    sums: Int64 = (np.sign(terms) * magnitude).sum(axis=1)
    half = accumulator == torch.float16
    result = _round_to_nearest_half(sums, unit) if half else _round_toward_zero(sums, unit)

    zero = ((x.significand == 0) & y.infinite) | ((y.significand == 0) & x.infinite)
    infinite = np.concatenate([start.infinite[:, None], x.infinite | y.infinite], axis=1)
    negative = np.concatenate([start.negative[:, None], x.negative ^ y.negative], axis=1)
    minus, plus = (infinite & negative).any(axis=1), (infinite & ~negative).any(axis=1)
    nan = start.nan | (x.nan | y.nan | zero).any(axis=1) | (minus & plus)
    infinity, sign, not_a_number = (np.uint32(0x7C00), np.uint32(0x8000), np.uint32(0x7FFF)) if half else (INFINITY, SIGN, NAN)
    result = np.where(plus, infinity, np.where(minus, infinity | sign, result))
    return np.where(nan, not_a_number, result).astype(np.uint32)


def _round_to_nearest_half(sums: Int64, unit: Int64) -> Bits32:
    """fp16 bits of ``sums * 2^unit`` [R], to nearest even; too large gives infinity, zero gives +0."""
    magnitude = np.abs(sums)
    top = _top_bit(magnitude)
    drop = np.maximum(top - 10, -24 - unit)  # bits below fp16's last one, subnormal results included
    shift = np.clip(drop, 0, 62)  # a sum of 62 bits or fewer, shifted by 62, is less than half of the last place
    kept = magnitude << np.maximum(-drop, 0) >> shift
    rest, half = magnitude & ((1 << shift) - 1), np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 1)
    kept += (drop > 0) & ((rest > half) | ((rest == half) & (kept & 1 == 1)))
    # A carry out of the significand, and the hidden bit, run into the exponent field, as they should.
    bits = np.minimum(((drop + unit + 24) << 10) + kept, 0x7C00)
    return np.where(kept == 0, 0, np.where(sums < 0, bits | 0x8000, bits)).astype(np.uint32)


def _top_bit(magnitude: Int64) -> Int64:
    """Index of the highest set bit; -1 for zero. frexp is exact only while a number fits a double: halves are taken apart."""
    high, low = magnitude >> 32, magnitude & 0xFFFFFFFF
    return np.where(high > 0, np.frexp(high)[1] + 31, np.frexp(low)[1] - 1).astype(np.int64)


def _round_toward_zero(sums: Int64, unit: Int64) -> Bits32:
    """fp32 bits of ``sums * 2^unit`` [R], rounded toward zero; too large gives infinity, zero gives +0."""
    magnitude = np.abs(sums)
    top = _top_bit(magnitude)
    drop = np.maximum(top - 23, -149 - unit)  # bits below fp32's last one, subnormal results included
    kept = magnitude << np.maximum(-drop, 0) >> np.minimum(np.maximum(drop, 0), 63)
    # The hidden bit of a normal number carries into the exponent field, which therefore starts one lower.
    bits = ((drop + unit + 149) << 23) + kept
    bits = np.where(top + unit > 127, int(INFINITY), bits)
    bits = np.where(sums < 0, bits | int(SIGN), bits)
    return np.where(kept == 0, 0, bits).astype(np.uint32)
