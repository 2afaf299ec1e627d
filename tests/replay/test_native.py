"""The compiled CPU engine, every instruction set that this processor has: chains against the numpy engine and MMA-Sim, the
operations on their sums against rational arithmetic written here.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qlab.hardware import AMPERE, HOPPER, VOLTA, Step
from qlab.replay import native
from qlab.replay.program import Kind, Op, Program
from qlab.replay.step import fused_dot_add, half_dot_add
from tests.replay.native_operands import (
    BF16,
    DTYPES,
    F16,
    KINDS,
    K,
    M,
    N,
    as_bits,
    as_floats,
    pairs,
    program,
    random_operands,
    same,
    step_row,
    sums,
)

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "native engine is here")

STEPS = {
    "volta": VOLTA,
    "ampere": AMPERE,
    "hopper": HOPPER,
    "hopper as two": replace(HOPPER, terms=8),
    "ampere by 16": replace(AMPERE, terms=16),
    "ampere F-1": replace(AMPERE, fraction_bits=23),
    "volta F-1": replace(VOLTA, fraction_bits=22),
    "volta L/2": replace(VOLTA, terms=2),
    "hopper F+1": replace(HOPPER, fraction_bits=26),
    "hopper by 32": replace(HOPPER, terms=32),
    "high zero": replace(HOPPER, zero_exponent=-60, zero_exponent_fp16=-10),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STEPS)
def test_tensor_core_chains(name: str, dtype: str) -> None:
    step, t = STEPS[name], DTYPES[dtype]
    for kind in KINDS:
        order = np.arange(K, dtype=np.int32)
        if kind in ("ordinary", "any exponent", "specials"):
            order[32:] = 32 + np.random.default_rng(1).permutation(64)
        p = program([(Op.CHAIN, 0, 0, K)], [step_row(step)], order)
        x, w = random_operands(kind, t, seed=len(kind))
        a, b = pairs(x, w, order)
        want = fused_dot_add(a, b, np.zeros(M * N, np.uint32), step, t, "numpy").reshape(M, N)
        finite = float(np.isfinite(want.view(np.float32)).mean())
        assert finite < 1 if kind == "specials" else finite > (0.3 if kind in ("any exponent", "one wide step") else 0.99), kind
        for isa in native.isas():
            assert same(sums(p, x, w, t, isa), want.view(np.float32)), (kind, isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["volta", "ampere", "hopper", "hopper as two", "ampere F-1", "hopper F+1", "high zero"])
def test_tensor_core_chains_with_fp16_accumulators(name: str, dtype: str) -> None:
    step, t = STEPS[name], DTYPES[dtype]
    order = np.random.default_rng(2).permutation(K).astype(np.int32)
    p = program([(Op.CHAIN, 0, 0, K)], [step_row(step, half=True)], order)
    for kind in KINDS:
        x, w = random_operands(kind, t, seed=len(kind))
        if t == F16 and kind in ("ordinary", "full significands"):
            small = as_floats(w, t) * (2.0**-7 if kind == "ordinary" else 2.0**-8)
            w = as_bits(small, t)  # sums around fp16's largest number and its subnormals
            x[0] = as_bits(as_floats(x[0], t) * 2.0**-8, t)
        got = [sums(p, x, w, t, isa) for isa in native.isas()]
        assert all(same(g, got[0]) for g in got), kind
        if t == F16:  # the numpy engine takes fp16 operands
            a, b = pairs(x, w, order)
            want = half_dot_add(a, b, np.zeros(M * N, np.uint16), step).reshape(M, N)
            want[want == 0x8000] = 0  # a zero result is +0
            want_floats = as_floats(want, F16).astype(np.float32)
            want_floats[want == 0x7FFF] = np.uint32(0x7FFFFFFF).view(np.float32)
            assert same(got[0], want_floats), kind


@pytest.mark.parametrize("step", [HOPPER, replace(HOPPER, terms=4), replace(HOPPER, fraction_bits=26)], ids=str)
@pytest.mark.parametrize(
    ("products", "want"),
    [
        ([-(2.0**-26)], 0),  # rounds to zero, which has no sign
        ([2.0**-25], 0),  # a tie, to even
        ([2.0**-25, 2.0**-46], 1),  # a zero accumulator's exponent, -21, keeps 2^-46 (F = 25)
        ([2.0**-25, 2.0**-47], 0),  # and no more
        ([2.0**-24, 0, 0, 0, 2.0**-25], 2),  # fp16's smallest subnormal, then a tie
        ([2.0**-24, 0, 0, 0, 2.0**-25, -(2.0**-40)], 2),  # its exponent is -14: 2^-39 is kept (F = 25)
        ([2.0**-24, 0, 0, 0, 2.0**-25, -(2.0**-39)], 1),
        ([*[3e4] * 4, *[-1.0] * 4], 0x7C00),  # infinity stays
        ([*[-3e4] * 4, *[1.0] * 4], 0xFC00),
    ],
)
def test_fp16_accumulators_at_their_ends(products: list[float], want: int, step: Step) -> None:
    x = np.zeros((1, 32))
    w = np.zeros((32, 1))
    step_of = [j // 4 * step.terms + j % 4 for j in range(len(products))]
    for j, q in zip(step_of, products, strict=True):
        x[0, j], w[j] = np.sign(q) * 2.0 ** (math.frexp(q)[1] // 2) if q else 0, abs(q) / 2.0 ** (math.frexp(q)[1] // 2)
    xb, wb = as_bits(x, F16), as_bits(w, F16)
    p = program([(Op.CHAIN, 0, 0, 32)], [step_row(step, half=True)], np.arange(32), 1, 1)
    slow = int(half_dot_add(xb, wb.T, np.zeros(1, np.uint16), step)[0])
    if step.fraction_bits != 25:  # one bit more is kept
        want = slow
    assert slow in (want, 0x8000)
    for isa in native.isas():
        assert as_bits(sums(p, xb, wb, F16, isa).astype(np.float64), F16).tolist() == [[want]], isa


@pytest.mark.skipif(not importlib.util.find_spec("mmasim"), reason="mmasim is not installed")
@pytest.mark.parametrize(
    ("arch", "shape", "step"),
    [
        ("Volta", "m8n8k4.{d}.f16.f16.{d}", VOLTA),
        ("Ampere", "m16n8k16.{d}.f16.f16.{d}", AMPERE),
        ("Hopper", "m16n8k16.{d}.f16.f16.{d}", HOPPER),
        ("Hopper", "m16n8k8.{d}.f16.f16.{d}", replace(HOPPER, terms=8)),
        ("Ampere", "m16n8k16.f32.bf16.bf16.f32", AMPERE),
        ("Hopper", "m16n8k16.f32.bf16.bf16.f32", HOPPER),
    ],
)
def test_agrees_with_mma_sim(arch: str, shape: str, step: Step) -> None:
    """Finite operands: MMA-Sim computes in doubles, where an infinite term makes a NaN of a different sum."""
    from mmasim.nv_ptx import MMA

    t = BF16 if "bf16" in shape else F16
    for half in (False, True) if "{d}" in shape else (False,):
        mma = MMA(arch, shape.format(d="f16" if half else "f32"))
        k = mma.k
        order = np.arange(K // k * k, dtype=np.int32)
        p = program([(Op.CHAIN, 0, 0, len(order))], [step_row(step, half)], order)
        for seed in range(2):
            x, w = random_operands("ordinary", t, seed)
            if half:
                w = as_bits(as_floats(w, t) * 2.0**-9, t)
            a, b = (torch.from_numpy(v.copy().view(np.int16)).view(t) for v in pairs(x, w, order))
            want = torch.zeros(M * N, dtype=torch.float16 if half else torch.float32)
            for i in range(0, len(order), k):
                want = mma.dpa(a[:, i : i + k], b[:, i : i + k], want)
            assert torch.isfinite(want).float().mean() > 0.5
            keep = torch.isfinite(want).reshape(M, N).numpy()
            for isa in native.isas():
                assert same(sums(p, x, w, t, isa)[keep], want.float().reshape(M, N).numpy()[keep]), isa


# Rational arithmetic: what each operation means, from the definition of rounding.

FORMATS = {0: (24, -126, 127), 1: (11, -14, 15), 2: (8, -126, 127)}  # significant bits, exponents


def nearest(q: Fraction, to: int, negative: bool) -> float:
    """To nearest even; ``negative`` is the sign of a zero."""
    precision, lowest, largest = FORMATS[to]
    if q == 0:
        return -0.0 if negative else 0.0
    exponent = abs(q).numerator.bit_length() - q.denominator.bit_length()
    exponent -= abs(q) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    rounded = round(q / unit) * unit  # Python rounds a Fraction to even
    if abs(rounded) >= Fraction(2) ** (largest + 1):
        return math.copysign(math.inf, q)
    return float(rounded) if rounded else math.copysign(0.0, q)


def fma(a: float, b: float, c: float, to: int) -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    minus = math.copysign(1, a) * math.copysign(1, b) < 0 and math.copysign(1, c) < 0
    return nearest(Fraction(a) * Fraction(b) + Fraction(c), to, minus and 0 in (a, b) and c == 0)


def add(a: float, b: float, to: int) -> float:
    return fma(a, 1.0, b, to)


def product(a: float, b: float, to: int) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    return nearest(Fraction(a) * Fraction(b), to, math.copysign(1, a) * math.copysign(1, b) < 0)


def float_bits(values: list[float] | NDArray[np.float64]) -> NDArray[np.uint32]:
    with np.errstate(invalid="ignore"):
        bits = np.asarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(np.asarray(values)), np.uint32(0x7FFFFFFF), bits)


def other_chain(kind: int, half: bool, x: list[float], w: list[float], scale: list[float]) -> float:
    total = 0.0
    if kind == Kind.FMA:
        for a, b in zip(x, w, strict=True):
            total = fma(a, b, total, int(half))
        return total
    for i in range(0, len(x), 8):
        part = [0.0, 0.0]
        for j in range(8):
            part[j % 2] = fma(x[i + j], w[i + j], part[j % 2], 1)
        total = fma(add(part[0], part[1], 0), scale[i], total, 0)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "half"), [(Kind.FMA, False), (Kind.FMA, True), (Kind.HALF_DOT, False)], ids=str)
def test_other_chains(kind: Kind, half: bool, dtype: str) -> None:
    t, n, k = DTYPES[dtype], 67, 24
    order = np.random.default_rng(3).permutation(k).astype(np.int32)
    p = program([(Op.CHAIN, 0, 0, k)], [(kind, 0, 8, 0, int(half), 8)], order, 2, n)
    for operands in ("ordinary", "ties", "any exponent", "specials"):
        rng = np.random.default_rng(4)
        x, w = random_operands("ordinary" if operands == "ties" else operands, t, 5)
        x, w = x[1:3, :k].copy(), w[:k, :n].copy()
        if operands == "ties":  # few bits, all of about one size
            x, w = as_bits(rng.integers(-33, 34, x.shape) / 2.0, t), as_bits(rng.integers(-65, 66, w.shape) / 64.0, t)
        scales = as_bits(rng.standard_normal((3, n)), t)
        values, weights, scale = as_floats(x, t), as_floats(w, t), as_floats(scales, t)
        group = np.arange(k) * 3 // k
        want = [
            other_chain(kind, half, values[m, order].tolist(), weights[order, j].tolist(), scale[group[order], j].tolist())
            for m in range(2)
            for j in range(n)
        ]
        for isa in native.isas():
            got = sums(p, x, w, t, isa, scales)
            assert got.view(np.uint32).ravel().tolist() == float_bits(want).tolist(), (operands, isa)


def test_fp16_fma_rounds_once() -> None:
    """Products of almost 2: added to 1, with a tie's exponent, they leave what decides it below fp32's last bit."""
    a = np.arange(1024, 2048)
    close = np.argwhere(np.abs(np.outer(a, a) - (1 << 21)) < 128)[::12]
    rows, columns = 1 + close[:, 0] / 1024, 1 + close[:, 1] / 1024
    x = as_bits(np.stack([np.ones(len(rows)), rows * 2.0**-12], axis=1), F16)
    first = np.repeat([1.0, 1.0 + 2.0**-10, -1.0], len(columns))
    w = as_bits(np.stack([first, np.tile(columns, 3)]), F16)
    w[1, ::2] ^= 0x8000
    p = program([(Op.CHAIN, 0, 0, 2)], [(Kind.FMA, 0, 1, 0, 1, 1)], np.arange(2), len(x), w.shape[1])
    factors = as_floats(w, F16)
    want = [[fma(u, v, f, 1) for f, v in factors.T.tolist()] for u in as_floats(x, F16)[:, 1].tolist()]
    for isa in native.isas():
        assert sums(p, x, w, F16, isa).tolist() == want, isa


@pytest.mark.parametrize(("dtype", "half"), [("fp16", True), ("bf16", False), ("bf16", True)])
def test_fma_keeps_the_sign_of_zero(dtype: str, half: bool) -> None:
    t = DTYPES[dtype]
    small = 2.0**-20 if t == F16 else 2.0**-100
    x, w = as_bits([[-small, -0.0]], t), as_bits([[small], [1.0]], t)
    p = program([(Op.CHAIN, 0, 0, 2)], [(Kind.FMA, 0, 1, 0, int(half), 1)], np.arange(2), 1, 1)
    for isa in native.isas():
        assert sums(p, x, w, t, isa).view(np.uint32).tolist() == [[0x80000000]], isa


def interpret(p: Program, leaves: dict[int, NDArray[np.float32]], scale: list[float], bias: list[float]) -> list[float]:
    """The program's operations for every element of one row; ``leaves`` holds each chain's values by its op."""
    outputs = []
    for n in range(len(scale)):
        stack: list[float] = []
        for i, (op, to, *_) in enumerate(p.ops.tolist()):
            match op:
                case Op.CHAIN:
                    stack.append(float(leaves[i][n]))
                case Op.ADD:
                    stack[-2:] = [add(stack[-2], stack[-1], to)]
                case Op.ROUND:
                    stack[-1] = add(stack[-1], -0.0, to)
                case Op.SCALE:
                    stack[-1] = product(stack[-1], scale[n], to)
                case Op.BIAS:
                    stack[-1] = add(stack[-1], bias[n], to)
                case Op.SCALE_BIAS:
                    stack[-1] = fma(stack[-1], scale[n], bias[n], to)
        outputs.append(stack[0])
    return outputs


TAILS: dict[str, list[tuple[int, int]]] = {
    "join": [],
    "round": [(Op.ROUND, -1)],
    "round, scale": [(Op.ROUND, -1), (Op.SCALE, -1)],
    "scale unrounded": [(Op.SCALE, -1)],
    "round, bias": [(Op.ROUND, -1), (Op.BIAS, -1)],
    "bias unrounded": [(Op.BIAS, -1)],
    "round, scale and bias": [(Op.ROUND, -1), (Op.SCALE_BIAS, -1)],
    "scale and bias unrounded": [(Op.SCALE_BIAS, -1)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", TAILS)
def test_operations_round_once(tail: str, dtype: str) -> None:
    """Two chains and a chain, joined in each type, then every way out; values of all sizes, ties, infinities and NaN."""
    t, n, k, isa = DTYPES[dtype], 130, 24, native.isas()[0]
    rng = np.random.default_rng(7)
    for join in (0, 1, 2):
        for to in (0, 1, 2):
            ops = [(Op.CHAIN, 0, 0, 8), (Op.CHAIN, 0, 8, 16), (Op.ADD, join), (Op.CHAIN, 0, 16, 24), (Op.ADD, join)]
            p = program([*ops, *((op, to) for op, _ in TAILS[tail])], [step_row(AMPERE)], np.arange(k), 1, n)
            x = as_bits(rng.standard_normal((1, k)), t)
            w = as_bits(rng.standard_normal((k, n)) * 2.0 ** rng.integers(-12, 9, (1, n)), t)
            few = slice(n // 2, n)  # few bits, so that ties are frequent
            w[:, few] = as_bits(np.where(np.arange(k)[:, None] % 8 == 0, rng.integers(-40, 41, (k, n // 2)), 0.0), t)
            x[0, [0, 8, 16]] = as_bits([1.0, 2.0**-8 if t == BF16 else 2.0**-11, 2.0**-12], t)
            scales = as_bits(rng.integers(1, 64, (1, n)) * 2.0 ** rng.integers(-20, 12, (1, n)), t)
            bias = as_bits(rng.integers(-64, 64, n) * 2.0 ** rng.integers(-20, 8, n), t)
            w[0, 3], w[9, 4], w[0, 5], w[8, 5] = as_bits([math.inf, math.nan, math.inf, -math.inf], t)
            bias[6], scales[0, 7], scales[0, 8] = as_bits([-math.inf, math.inf, 0.0], t)
            w[:, 9:11], bias[9], bias[10] = 0, 0x8000, 0
            # Ties of the dtype, and a last chain or a bias, far below fp32's last bit, that decides them.
            w[:, 11:15], x[0, 1] = 0, as_bits([1.0], t)[0]
            w[0, 11:15], w[1, 11:15] = as_bits([2048.0 if t == F16 else 256.0], t), as_bits([1.0, 3.0, 1.0, 3.0], t)
            w[16, 11:15] = as_bits([1, 1, -1, -1] * np.array(2.0**-12), t)
            bias[11:15] = as_bits([1, -1, -1, 1] * np.array(2.0**-20 if t == F16 else 2.0**-60), t)
            leaves = {
                i: sums(program([op], [step_row(AMPERE)], np.arange(k), 1, n), x, w, t, "portable")[0]
                for i, op in enumerate(ops)
                if op[0] == Op.CHAIN
            }
            want = interpret(p, leaves, as_floats(scales, t)[0].tolist(), as_floats(bias, t).tolist())
            got = sums(p, x, w, t, isa, scales, bias)
            assert got.view(np.uint32)[0].tolist() == float_bits(want).tolist(), (join, to)
