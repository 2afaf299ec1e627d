"""The compiled CPU engine, every instruction set that this processor has: chains against the numpy engine and MMA-Sim, the rest
of a program against rational arithmetic written here.
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

from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import AMPERE, HOPPER, VOLTA, Step
from qlab.replay import native
from qlab.replay import step as replay_step
from qlab.replay.program import Kind, Op, Program
from qlab.replay.step import fused_dot_add, half_dot_add

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "native engine is here")

F16, BF16 = torch.float16, torch.bfloat16
DTYPES = {"fp16": F16, "bf16": BF16}
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
    p: Program, x: Bits, w: Bits, dtype: torch.dtype, isa: str, scales: Bits | None = None, bias: Bits = NO_BITS, threads: int = 1
) -> NDArray[np.float32]:
    """What the program leaves for each element, not rounded to the dtype of x."""
    y = np.zeros((x.shape[0], w.shape[1]), np.uint32)
    scales = np.zeros((0, w.shape[1]), np.uint16) if scales is None else scales
    group = (np.arange(w.shape[0]) * len(scales) // w.shape[0]).astype(np.int32) if len(scales) else NO_GROUPS
    arrays = (p.order, p.steps, p.ops, p.regions)
    native.execute(x, w, scales, group, bias, *arrays, dtype == BF16, y, threads=threads, isa=isa)  # type: ignore[arg-type]
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
            x[:, start], w[start] = (one if start == 0 else as_bits([-8.0], dtype)), most if start == 0 else as_bits([8.0], dtype)
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
        x[0, :32] = x[0, 48:] = 0  # one sum far below all others, which steps of zeros must leave as it is
        x[0, 32:48] &= 0x80FF
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


@pytest.mark.parametrize("step", [HOPPER, replace(HOPPER, fraction_bits=26), replace(HOPPER, terms=4)], ids=str)
@pytest.mark.parametrize(
    ("products", "want"),
    [
        ([-(2.0**-26)], 0),  # rounds to zero, which has no sign
        ([2.0**-25], 0),  # a tie, to even
        ([2.0**-25, 2.0**-46], 1),  # a zero accumulator's exponent, -21, keeps 2^-46 (F = 25)
        ([2.0**-25, 2.0**-48], 0),  # and cuts what lies below 2^-47
        ([2.0**-24, 0, 0, 0, 2.0**-25], 2),  # fp16's smallest subnormal, then a tie
        ([2.0**-24, 0, 0, 0, 2.0**-25, -(2.0**-41)], 2),  # its exponent is -14: what lies below 2^-40 is cut
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
    assert [j for j in half_dot_add(xb, wb.T, np.zeros(1, np.uint16), step).tolist()] in ([want], [0x8000])
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
            bias[11:15] = as_bits([1, -1, -1, 1] * np.array(2.0**-20), t)
            leaves = {
                i: sums(program([op], [step_row(AMPERE)], np.arange(k), 1, n), x, w, t, "portable")[0]
                for i, op in enumerate(ops)
                if op[0] == Op.CHAIN
            }
            want = interpret(p, leaves, as_floats(scales, t)[0].tolist(), as_floats(bias, t).tolist())
            got = sums(p, x, w, t, isa, scales, bias)
            assert got.view(np.uint32)[0].tolist() == float_bits(want).tolist(), (join, to)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_bits_of_the_dtype(dtype: str) -> None:
    """Every number of the dtype, through a chain of one product by 1 and a rounding."""
    t, one = DTYPES[dtype], as_bits([[1.0]], DTYPES[dtype])
    w = np.arange(1 << 16, dtype=np.uint16)[None]
    step = (Kind.TENSOR_CORE, 24, 1, -132, 0, 1)
    p = program([(Op.CHAIN, 0, 0, 1), (Op.ROUND, 1 if t == F16 else 2)], [step], np.zeros(1), 1, 1 << 16)
    y = native.run(p, one, w, np.zeros((0, 1 << 16), np.uint16), NO_GROUPS, NO_BITS, bf16=t == BF16)[0]
    field, fraction = (0x7C00, 0x3FF) if t == F16 else (0x7F80, 0x7F)
    want = np.where(((w[0] & field) == field) & ((w[0] & fraction) != 0), 0x7FFF, w[0])
    want[want == 0x8000] = 0  # a tensor core's zero is +0
    assert np.array_equal(y, want)


def many_regions() -> tuple[Program, dict[str, np.ndarray]]:
    """Regions of all sizes, with holes, and two programs; operands by their names."""
    x = np.concatenate([random_operands("ordinary", F16, s)[0] for s in range(24)])  # [72, K]
    w = np.concatenate([random_operands("ordinary", F16, s)[1] for s in range(4)], axis=1)  # [K, 280]
    scales = as_bits(np.random.default_rng(8).standard_normal((3, 280)), F16)
    ops = [
        *[(Op.CHAIN, 0, 0, 48), (Op.CHAIN, 0, 48, 96), (Op.ADD, 0), (Op.ROUND, 1), (Op.SCALE, 1), (Op.BIAS, 1)],
        *[(Op.CHAIN, 1, 0, 96), (Op.CHAIN, 2, 48, 96), (Op.ADD, 1)],
    ]
    steps = [step_row(HOPPER), step_row(AMPERE), (Kind.HALF_DOT, 0, 8, 0, 0, 8)]
    p = program(ops, steps, np.random.default_rng(9).permutation(K), 72, 280)
    regions = [(0, 50, 0, 130, 0, 6), (50, 70, 0, 64, 6, 9), (0, 1, 130, 280, 6, 9), (1, 70, 131, 133, 0, 6), (70, 70, 0, 280, 0, 6)]
    group = (np.arange(K) // 32).astype(np.int32)
    arrays = {"x": x, "w": w, "scales": scales, "group": group, "bias": scales[1].copy()}
    return replace(p, regions=np.array(regions, np.int32)), arrays


def test_neither_threads_nor_tiles_change_a_bit() -> None:
    p, arrays = many_regions()
    first = native.run(p, **arrays, threads=1)
    for threads in (0, 2, 7):
        assert np.array_equal(native.run(p, **arrays, threads=threads), first)
    covered = np.zeros(first.shape, bool)
    for m0, m1, n0, n1, start, stop in p.regions.tolist():
        covered[m0:m1, n0:n1] = True
        alone = replace(p, regions=np.array([[0, m1 - m0, 0, n1 - n0, start, stop]], np.int32))
        part = {name: a[..., n0:n1] if name in ("w", "scales", "bias") else a for name, a in arrays.items()}
        assert np.array_equal(native.run(alone, **part | {"x": arrays["x"][m0:m1]}), first[m0:m1, n0:n1])
    y = np.full(first.shape, 0x1234, np.uint16)
    native.execute(**arrays, order=p.order, steps=p.steps, ops=p.ops, regions=p.regions, bf16=False, y=y)
    assert np.array_equal(y[covered], first[covered])
    assert (y[~covered] == 0x1234).all()


def test_a_chain_over_nothing_is_zero_and_an_output_may_be_empty() -> None:
    p = program([(Op.CHAIN, 0, 0, 0)], [step_row(HOPPER)], np.zeros(0, np.int32), 2, 3)
    arguments = (np.zeros((0, 3), np.uint16), NO_GROUPS, NO_BITS)
    assert not native.run(p, np.ones((2, 4), np.uint16), np.ones((4, 3), np.uint16), *arguments).any()
    nothing = replace(p, regions=np.zeros((0, 6), np.int32))
    assert native.run(nothing, np.ones((0, 4), np.uint16), np.ones((4, 3), np.uint16), *arguments).shape == (0, 3)


def test_malformed_programs_are_refused_in_a_sentence() -> None:
    chain, tensor_core = (Op.CHAIN, 0, 0, 16), step_row(HOPPER)
    good = program([chain], [tensor_core], np.arange(16), 2, 3)
    bits = {"x": np.zeros((2, 16), np.uint16), "w": np.zeros((16, 3), np.uint16), "scales": np.zeros((0, 3), np.uint16)}
    arguments = {**bits, "group": NO_GROUPS, "bias": NO_BITS}

    def ops(*rows: tuple[int, ...]) -> Program:
        return program(list(rows), [tensor_core], np.arange(16), 2, 3)

    def steps(*row: int) -> Program:
        return program([chain], [row], np.arange(16), 2, 3)

    def region(*row: int) -> Program:
        return replace(good, regions=np.array([row], np.int32))

    refused: list[tuple[Program, dict[str, np.ndarray], str]] = [
        (ops((6,)), {}, r"ops\[0\] has opcode 6; 0 to 5 are known"),
        (ops((-1,)), {}, r"ops\[0\] has opcode -1"),
        (ops(chain, (Op.ROUND, 3)), {}, r"ops\[1\] has type 3"),
        (ops((Op.CHAIN, 1, 0, 16)), {}, r"ops\[0\] names step 1 of 1"),
        (ops((Op.CHAIN, 0, 0, 17)), {}, r"ops\[0\] takes order\[0:17\] of 16"),
        (ops((Op.CHAIN, 0, -16, 0)), {}, r"takes order\[-16:0\]"),
        (ops((Op.CHAIN, 0, 16, 0)), {}, r"takes order\[16:0\]"),
        (ops((Op.CHAIN, 0, 0, 8)), {}, r"takes order\[0:8\], not a multiple of its step's 16 terms"),
        (ops(), {}, r"regions\[0\] leaves 0 values on the stack"),
        (ops(chain, chain), {}, r"regions\[0\] leaves 2 values"),
        (ops(chain, (Op.ADD, 0)), {}, r"ops\[1\] finds too few values"),
        (ops((Op.ROUND, 0)), {}, r"ops\[0\] finds too few values"),
        (ops(*[chain] * 9, *[(Op.ADD, 0)] * 8), {}, r"ops\[8\] needs more than 8 values"),
        (ops(chain, (Op.SCALE, 1)), {}, r"ops\[1\] scales, and there are no scales"),
        (ops(chain, (Op.BIAS, 1)), {}, r"ops\[1\] adds a bias, and there is none"),
        (ops(chain, (Op.SCALE_BIAS, 1)), {"scales": np.zeros((1, 3), np.uint16)}, "adds a bias"),
        (steps(3, 25, 16, -133, 0, 16), {}, r"steps\[0\] has kind 3"),
        (steps(0, 49, 16, -133, 0, 16), {}, "F = 49"),
        (steps(0, 25, 0, -133, 0, 0), {}, "0 terms"),
        (steps(0, 25, 65, -133, 0, 65), {}, "65 terms"),
        (steps(0, 25, 16, 5000, 0, 16), {}, "e_zero = 5000"),
        (steps(0, 25, 16, -133, 2, 16), {}, "accumulator 2"),
        (steps(2, 0, 8, 0, 0, 7), {}, "odd number"),
        (steps(2, 0, 8, 0, 0, 8), {}, "no scales or no groups"),
        (steps(2, 0, 8, 0, 0, 8), {"scales": np.zeros((1, 3), np.uint16)}, "no scales or no groups"),
        (good, {"scales": np.zeros((1, 3), np.uint16), "group": np.full(16, 1, np.int32)}, r"group\[0\] is 1"),
        (replace(good, order=np.full(16, 16, np.int32)), {}, r"order\[0\] is k = 16, outside 0 to K = 16"),
        (replace(good, order=np.full(16, -1, np.int32)), {}, r"order\[0\] is k = -1"),
        (region(0, 3, 0, 3, 0, 1), {}, r"regions\[0\] is outside of the output \[2, 3\]"),
        (region(0, 2, 0, 4, 0, 1), {}, "outside of the output"),
        (region(-1, 2, 0, 3, 0, 1), {}, "outside of the output"),
        (region(2, 1, 0, 3, 0, 1), {}, "outside of the output"),
        (region(0, 2, 0, 3, 0, 2), {}, r"regions\[0\] takes ops outside of 0 to 1"),
        (replace(good, steps=np.zeros((1, 5), np.int32)), {}, "must be"),
        (replace(good, order=np.zeros((1, 16), np.int32)), {}, "must be"),
        (good, {"w": np.zeros((15, 3), np.uint16)}, r"x must be \[M, K\]"),
        (good, {"scales": np.zeros((1, 4), np.uint16)}, "scales must be"),
        (good, {"group": np.zeros(15, np.int32)}, "group must be"),
        (good, {"bias": np.zeros(2, np.uint16)}, "bias must be"),
        (good, {"x": np.zeros((2, 16), np.float16)}, "x must be uint16, not float16"),
        (good, {"group": np.zeros(16, np.int64)}, "group must be int32, not int64"),
    ]
    assert native.run(good, **arguments).shape == (2, 3)
    for bad, changed, sentence in refused:
        with pytest.raises(QlabError, match=sentence):
            native.run(bad, **(arguments | changed))
    with pytest.raises(QlabError, match="isa 'mmx' is not among those of this processor: auto, "):
        native.run(good, **arguments, isa="mmx")  # type: ignore[arg-type]
    a = (good.order, good.steps, good.ops, good.regions, False)
    with pytest.raises(QlabError, match="y must be contiguous and writeable"):
        native.execute(**arguments, **dict(zip(("order", "steps", "ops", "regions", "bf16"), a, strict=True)), y=np.zeros((2, 6), np.uint16)[:, ::2])


def test_isas_end_with_the_portable_one() -> None:
    assert native.isas()[-1] == "portable"
    assert set(native.isas()) <= {"avx512", "avx2", "portable"}


def test_a_missing_or_old_module_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    p, arrays = many_regions()
    monkeypatch.setattr(replay_step, "_native", object())
    assert "builds it again" in native.reason()
    assert native.isas() == ()
    with pytest.raises(UnsupportedError, match="older than its sources"):
        native.run(p, **arrays)
    monkeypatch.setattr(replay_step, "_MISSING", "not built")
    assert native.reason() == "not built"
