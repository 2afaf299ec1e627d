"""Operands and little programs for the tests of the compiled engine."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from qlab.hardware import Step
from qlab.replay import native
from qlab.replay.program import Kind, Program

F16, BF16 = torch.float16, torch.bfloat16
DTYPES = {"fp16": F16, "bf16": BF16}
NO_BITS, NO_GROUPS = np.zeros(0, np.uint16), np.zeros(0, np.int32)
M, N, K = 3, 70, 96  # a row of blocks that is not full
Bits = NDArray[np.uint16]


def as_bits(values: NDArray[np.floating] | list[float], dtype: torch.dtype) -> Bits:
    return torch.tensor(np.asarray(values, np.float64)).to(dtype).view(torch.int16).numpy().view(np.uint16)


def as_floats(bits: Bits, dtype: torch.dtype) -> NDArray[np.float64]:
    return torch.from_numpy(bits.view(np.int16)).view(dtype).double().numpy()


def program(
    ops: list[tuple[int, ...]], steps: list[tuple[int, ...]], order: NDArray[np.int32], m: int = M, n: int = N
) -> Program:
    """One region that covers everything."""
    padded = [(*op, *[0] * (4 - len(op))) for op in ops]
    return Program(
        np.asarray(order, np.int32),
        np.array(steps, np.int32).reshape(-1, 6),
        np.array(padded, np.int32).reshape(-1, 4),
        np.array([(0, m, 0, n, 0, len(ops))], np.int32),
    )


def step_row(step: Step, half: bool = False) -> tuple[int, ...]:
    zero = step.zero_exponent_fp16 if half else step.zero_exponent
    return Kind.TENSOR_CORE, step.fraction_bits, step.terms, zero, int(half), step.terms


def sums(
    p: Program, x: Bits, w: Bits, dtype: torch.dtype, isa: str, scales: Bits | None = None, bias: Bits = NO_BITS
) -> NDArray[np.float32]:
    """What the program leaves for each element, not rounded to the dtype of x."""
    y = np.zeros((x.shape[0], w.shape[1]), np.uint32)
    scales = np.zeros((0, w.shape[1]), np.uint16) if scales is None else scales
    group = (np.arange(w.shape[0]) * len(scales) // w.shape[0]).astype(np.int32) if len(scales) else NO_GROUPS
    arrays = (p.order, p.steps, p.ops, p.regions)
    native.execute(x, w, scales, group, bias, *arrays, dtype == BF16, y, threads=1, isa=isa)  # type: ignore[arg-type]
    return y.view(np.float32)


def random_operands(kind: str, dtype: torch.dtype, seed: int) -> tuple[Bits, Bits]:
    """x [M, K] and w [K, N]."""
    rng = np.random.default_rng(seed)
    field, one = np.uint16(0x7C00 if dtype == F16 else 0x7F80), np.uint16(0x3C00 if dtype == F16 else 0x3F80)
    shapes = ((M, K), (K, N))
    if kind == "ordinary":
        x, w = (as_bits(rng.standard_normal(s) * 2.0 ** rng.integers(-6, 6, s), dtype) for s in shapes)
        for a in (x, w):
            a[rng.random(a.shape) < 0.05] &= ~field  # subnormals
            a[rng.random(a.shape) < 0.1] &= 0x8000
        w[:, 5] &= 0x8000  # a column and steps of zeros
        w[32:64, 7] = 0
        w[1::2, 11:20] = w[::2, 11:20]  # every second product cancels the one before it
        x[:, 1::2] = np.where(rng.random((M, K // 2)) < 0.5, x[:, ::2] ^ 0x8000, x[:, 1::2])
        return x, w
    if kind == "full significands":  # an accumulator below 2, then a full step: 33 bits; then most of it is taken away
        most = one | (~field & 0x7FFF)
        x, w = (np.full(s, most, np.uint16) for s in shapes)
        x -= rng.integers(0, 64 if dtype == F16 else 8, x.shape).astype(np.uint16)
        for start in (0, 32, 64):
            x[:, start : start + 16] &= 0x8000
            x[:, start], w[start] = (one, most) if start == 0 else as_bits([-8.0, 8.0], dtype)
        x[1] ^= 0x8000
        x[2, ::16] ^= 0x8000
        w[:, ::5] ^= 0x8000
        return x, w
    if kind == "zeros beside large":  # a zero product has no exponent that counts, however large the other operand is
        x, w = (as_bits(rng.standard_normal(s) * 2.0**-12, dtype) for s in shapes)
        x[:, ::2], w[::2] = 0, as_bits([3e4], dtype)
        x[1, ::2], w[::2, 35:] = as_bits([-5e4], dtype), 0
        return x, w
    if kind == "small":  # fp16: sums around its subnormals; bf16: products around 2^-90, where a high e_zero cuts
        lower = 2.0**-11 if dtype == F16 else 2.0**-45
        x, w = (as_bits(rng.standard_normal(s) * lower, dtype) for s in shapes)
        x[0, rng.random(K) < 0.9] = 0
        return x, w
    x, w = (rng.integers(0, 1 << 16, s).astype(np.uint16) for s in shapes)
    for a in (x, w):
        a[(a & field) == field] &= ~np.uint16(0x4000)
        a[rng.random(a.shape) < 0.1] &= ~field
        a[rng.random(a.shape) < 0.1] &= 0x8000
    if dtype == BF16:  # not every sum shall overflow
        x[:2] &= 0xBFFF
        w[:, ::2] &= 0xBFFF
    if kind == "one wide step":  # in range before and behind it
        ordinary = random_operands("ordinary", dtype, seed)
        for stretch in (slice(0, 32), slice(48, K)):
            x[:, stretch], w[stretch] = ordinary[0][:, stretch], ordinary[1][stretch]
        x[0, :32] = x[0, 48:] = 0  # sums far below all others, which steps of zeros must leave as they are
        x[0, 32:48] &= 0x80FF
        w[32:48, 64:] = as_bits(as_floats(ordinary[1][32:48, 64:], dtype) * 64, dtype)
    if kind == "specials":
        for a in (x, w):
            a[rng.random(a.shape) < 0.002] |= field  # NaN, but for an empty fraction
            a[rng.random(a.shape) < 0.002] = field
    return x, w


KINDS = ("ordinary", "full significands", "zeros beside large", "small", "any exponent", "one wide step", "specials")


def pairs(x: Bits, w: Bits, order: NDArray[np.int32]) -> tuple[Bits, Bits]:
    """Operands of every output element: a and b [M * N, len(order)]."""
    m, n, t = x.shape[0], w.shape[1], len(order)
    a = np.broadcast_to(x[:, None, order], (m, n, t)).reshape(m * n, t)
    return a, np.broadcast_to(w.T[None][:, :, order], (m, n, t)).reshape(m * n, t)


def same(got: NDArray[np.float32], want: NDArray[np.float32]) -> bool:
    """Bits, where any NaN must be the canonical one."""
    return bool(np.array_equal(got.view(np.uint32), want.view(np.uint32)))
