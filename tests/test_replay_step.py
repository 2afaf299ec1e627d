"""The tensor core's fused dot-add: both engines against each other, exact fractions, published probes and recorded silicon."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import AMPERE, HOPPER, VOLTA, Step
from qlab.replay import step as replay_step
from qlab.replay.step import Engine, fused_dot_add, half_dot_add, native_reason

ROOT = Path(__file__).resolve().parents[1]
SILICON = ROOT.parent / "shared" / "silicon"
F16, BF16 = torch.float16, torch.bfloat16
STEPS = {"volta": VOLTA, "ampere": AMPERE, "hopper": HOPPER, "hopper as two": replace(HOPPER, terms=8)}
NAN, INF, NEGATIVE_INF = 0x7FFFFFFF, 0x7F800000, 0xFF800000

needs_native = pytest.mark.skipif(bool(native_reason()), reason=native_reason() or "native engine is here")
ENGINES = ["numpy", pytest.param("native", marks=needs_native)]


def bits(values: list[float], dtype: torch.dtype) -> NDArray[np.uint16]:
    return torch.tensor([values], dtype=torch.float64).to(dtype).view(torch.int16).numpy().view(np.uint16)


def fp32(value: float) -> NDArray[np.uint32]:
    return np.array([value], np.float32).view(np.uint32)


def random_bits(rows: int, k: int, dtype: torch.dtype, seed: int, specials: bool) -> tuple[np.ndarray, ...]:
    """Every exponent alike: subnormals, zeros of both signs and, with ``specials``, infinities and NaN."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 1 << 16, (2, rows, k)).astype(np.uint16)
    c = rng.integers(0, 1 << 32, rows).astype(np.uint32)
    field = np.uint16(0x7C00 if dtype == F16 else 0x7F80)
    for x in (a, b):
        x[(x & field) == field] &= ~np.uint16(0x4000)
        x[rng.random(x.shape) < 0.1] &= ~field  # subnormals
        x[rng.random(x.shape) < 0.1] &= 0x8000
        if specials:
            x[rng.random(x.shape) < 0.005] |= field  # NaN, but for an empty fraction
            x[rng.random(x.shape) < 0.005] = field
    c[(c & INF) == INF] &= ~np.uint32(0x40000000)
    c[rng.random(rows) < 0.1] &= 0x807FFFFF
    c[rng.random(rows) < 0.1] &= 0x80000000
    if specials:
        c[rng.random(rows) < 0.05] = NEGATIVE_INF
    return a, b, c


def as_fraction(pattern: int, fraction_bits: int, exponent_bits: int) -> tuple[Fraction, int]:
    """Value and unnormalised exponent of a finite number."""
    sign = -1 if pattern >> (fraction_bits + exponent_bits) else 1
    field = (pattern >> fraction_bits) % (1 << exponent_bits)
    exponent = max(field, 1) - (1 << (exponent_bits - 1)) + 1
    magnitude = Fraction(pattern % (1 << fraction_bits), 1 << fraction_bits) + (field > 0)
    return sign * magnitude * Fraction(2) ** exponent, exponent


def slow(a: np.ndarray, b: np.ndarray, c: int, step: Step, dtype: torch.dtype) -> int:
    """One row by rational arithmetic, straight from the published rule; finite inputs only."""
    layout = (10, 5) if dtype == F16 else (7, 8)
    for start in range(0, len(a), step.terms):
        terms = [as_fraction(c, 23, 8)]
        for x, y in zip(a[start : start + step.terms].tolist(), b[start : start + step.terms].tolist(), strict=True):
            (va, ea), (vb, eb) = as_fraction(x, *layout), as_fraction(y, *layout)
            terms.append((va * vb, ea + eb))
        largest = max(e if v else step.zero_exponent for v, e in terms)
        unit = Fraction(2) ** (largest - step.fraction_bits)
        total = sum((int(v / unit) * unit for v, _ in terms), Fraction(0))  # int() truncates toward zero
        exponent = -126
        while abs(total) >= Fraction(2) ** (exponent + 1):
            exponent += 1
        rounded = int(total / Fraction(2) ** (exponent - 23)) * Fraction(2) ** (exponent - 23)
        if exponent > 127:  # and it stays there, as no term is NaN or infinite
            return INF if total > 0 else NEGATIVE_INF
        c = int(np.float32(float(rounded) + 0.0).view(np.uint32)) if rounded else 0
    return c


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_agrees_with_rational_arithmetic(name: str, dtype: torch.dtype, engine: Engine) -> None:
    step = STEPS[name]
    a, b, c = random_bits(150, 16, dtype, 1, specials=False)
    # Small accumulators and cancelling pairs, so that what lies below the accumulator decides.
    c[::3] = (c[::3] & 0x80FFFFFF) | 0x3F000000 if dtype == F16 else c[::3] & 0x83FFFFFF
    a[1::3, 1], b[1::3, 1] = a[1::3, 0] ^ 0x8000, b[1::3, 0]
    got = fused_dot_add(a, b, c, step, dtype, engine)
    want = [slow(a[i], b[i], int(c[i]), step, dtype) for i in range(len(c))]
    assert got.tolist() == want


@needs_native
@pytest.mark.parametrize("specials", [False, True], ids=["finite", "specials"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_engines_agree_bit_for_bit(name: str, dtype: torch.dtype, specials: bool) -> None:
    a, b, c = random_bits(20_000, 32, dtype, 2, specials)
    native = fused_dot_add(a, b, c, STEPS[name], dtype, "native")
    assert np.array_equal(native, fused_dot_add(a, b, c, STEPS[name], dtype, "numpy"))
    assert np.array_equal(native, fused_dot_add(a, b, c, STEPS[name], dtype))
    share = float((native == NAN).mean())
    assert (0.05 < share < 0.99) if specials else share == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_probe_fraction_bits(engine: Engine) -> None:
    """1 - 1 + 2^-25 in one chunk tells 24 kept bits from 25."""
    a = bits([1, -1, 2.0**-12, *[0] * 13], F16)
    b = bits([1, 1, 2.0**-13, *[0] * 13], F16)
    assert fused_dot_add(a, b, fp32(0), AMPERE, F16, engine).view(np.float32)[0] == 0
    assert fused_dot_add(a, b, fp32(0), HOPPER, F16, engine).view(np.float32)[0] == 2.0**-25


@pytest.mark.parametrize("engine", ENGINES)
def test_probe_terms(engine: Engine) -> None:
    """2^20 at k 0, -2^20 at k 1, 2^-14 at k 8 tells chunks of 8 from one of 16."""
    a = bits([2.0**10, -(2.0**10), *[0] * 6, 2.0**-14, *[0] * 7], F16)
    b = bits([2.0**10, 2.0**10, *[0] * 6, 1, *[0] * 7], F16)
    got = {n: float(fused_dot_add(a, b, fp32(0), s, F16, engine).view(np.float32)[0]) for n, s in STEPS.items()}
    assert (got["ampere"], got["hopper"], got["hopper as two"]) == (2.0**-14, 0, 2.0**-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_probe_three_generations(engine: Engine) -> None:
    """An accumulator that cancels the leading product leaves 0, -0.5 or -0.75 of the exact -0.875."""
    a = bits([-(2.0**13), -0.5, -0.25, -0.125, *[0] * 12], F16)
    b = bits([2.0**10, 1, 1, 1, *[0] * 12], F16)
    got = [float(fused_dot_add(a, b, fp32(2.0**23), s, F16, engine).view(np.float32)[0]) for s in (VOLTA, AMPERE, HOPPER)]
    assert got == [0, -0.5, -0.75]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_zero_product_does_not_raise_the_largest_exponent(engine: Engine) -> None:
    a, b = bits([0, 2.0**-14, *[0] * 14], F16), bits([2.0**15, 2.0**-14, *[0] * 14], F16)
    assert fused_dot_add(a, b, fp32(0), HOPPER, F16, engine).view(np.float32)[0] == 2.0**-28


@pytest.mark.parametrize("engine", ENGINES)
def test_a_zero_term_holds_the_largest_exponent_up(engine: Engine) -> None:
    """On Hopper nothing below 2^(-133 - 25) is kept: two products that add to 2^-149 reach it only in units of 2^-158."""
    rest = [0.0] * 14
    a, b = bits([7 * 2.0**-79, 2.0**-79, *rest], BF16), bits([73 * 2.0**-79, 2.0**-79, *rest], BF16)
    assert fused_dot_add(a, b, fp32(0), HOPPER, BF16, engine).tolist() == [1]
    a, b = bits([33 * 2.0**-80, 2.0**-80, *rest], BF16), bits([31 * 2.0**-79, 2.0**-79, *rest], BF16)
    assert fused_dot_add(a, b, fp32(0), HOPPER, BF16, engine).tolist() == [0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_special_values(dtype: torch.dtype, engine: Engine) -> None:
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(dtype).max
    cases: list[tuple[float, float, float, int]] = [
        (inf, 1, 0, INF),
        (-inf, 1, 0, NEGATIVE_INF),
        (inf, 0, 0, NAN),
        (0, -inf, 0, NAN),
        (inf, 1, -inf, NAN),
        (inf, 1, inf, INF),
        (1, 1, -inf, NEGATIVE_INF),
        (nan, 0, 0, NAN),
        (1, 1, nan, NAN),
        (inf, 1, nan, NAN),
        (-0.0, 1, -0.0, 0),
        (1, -1, 1, 0),
        (largest, largest, 3.4028234663852886e38, 0x7F7FFFFF if dtype == F16 else INF),
    ]
    if dtype == BF16:
        cases += [
            (2.0**127, 2, 0, INF),  # 2^128 does not fit
            (-(2.0**127), 2, 2.0**127, 0xFF000000),  # but it is not infinite before the sum
            (2.0**-126, 2.0**-23, 0, 1),  # the smallest fp32 subnormal
            (-(2.0**-126), 2.0**-24, 0, 0),  # half of it is truncated, and zero has no sign
        ]
    for x, y, start, want in cases:
        got = fused_dot_add(bits([x] + [0] * 15, dtype), bits([y] + [0] * 15, dtype), fp32(start), HOPPER, dtype, engine)
        assert hex(int(got[0])) == hex(want), (x, y, start)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_recorded_silicon(gpu: str, dtype: str, engine: Engine) -> None:
    mismatches = _mismatches(gpu, dtype, AMPERE if gpu == "a100" else HOPPER, engine)
    assert mismatches == 0


@pytest.mark.parametrize(
    ("fault", "mismatches"),
    [(replace(AMPERE, fraction_bits=23), 817), (replace(AMPERE, fraction_bits=25), 374), (replace(AMPERE, terms=4), 632)],
    ids=["F-1", "F+1", "L/2"],
)
def test_recorded_silicon_catches_a_wrong_step(fault: Step, mismatches: int) -> None:
    assert _mismatches("a100", "fp16", fault, "auto") == mismatches


def _mismatches(gpu: str, dtype: str, step: Step, engine: Engine) -> int:
    path = SILICON / f"{gpu}_{dtype}.npz"
    if not path.is_file():
        pytest.skip(f"recorded vectors {path.name} are not beside this checkout (shared/silicon)")
    with np.load(path) as z:
        d = fused_dot_add(z["a"], z["b"], z["c"], step, F16 if dtype == "fp16" else BF16, engine)
        assert len(d) == 2500
        return int((d != z["d"]).sum())


@needs_native
def test_rows_need_not_be_contiguous() -> None:
    a, b, c = random_bits(64, 32, F16, 3, specials=False)
    want = fused_dot_add(a[::2, :16].copy(), b[::2, 16:].copy(), c[::2].copy(), HOPPER, F16, "native")
    assert np.array_equal(fused_dot_add(a[::2, :16], b[::2, 16:], c[::2], HOPPER, F16, "native"), want)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_rows_and_no_products(engine: Engine) -> None:
    a, b, c = random_bits(4, 16, F16, 4, specials=False)
    assert fused_dot_add(a[:0], b[:0], c[:0], HOPPER, F16, engine).shape == (0,)
    assert np.array_equal(fused_dot_add(a[:, :0], b[:, :0], c, HOPPER, F16, engine), c)


def test_refusals() -> None:
    a, b, c = random_bits(4, 16, F16, 5, specials=False)
    refused: list[tuple[tuple[object, ...], str]] = [
        ((a, b, c, HOPPER, torch.float32), "dtype must be torch.float16 or torch.bfloat16, not torch.float32"),
        ((a, b, c, replace(HOPPER, terms=65), F16), "1 to 64 terms"),
        ((a, b, c, replace(HOPPER, fraction_bits=49), F16), "0 to 48 fraction bits"),
        ((a.astype(np.int16), b, c, HOPPER, F16), r"a must hold bits as uint16 \[R, K\], not int16 \[4, 16\]"),
        ((a, b[0], c, HOPPER, F16), r"b must hold bits as uint16 \[R, K\], not uint16 \[16\]"),
        ((a, b, c.view(np.float32), HOPPER, F16), r"c must hold bits as uint32 \[R\], not float32 \[4\]"),
        ((a, b, c[:3], HOPPER, F16), r"a \[4, 16\], b \[4, 16\] and c \[3\] must agree in R and K"),
        ((a[:, :8], b[:, :8], c, HOPPER, F16), "K=8 must be a multiple of the step's 16 terms"),
        ((a, b, c, HOPPER, F16, "cuda"), "unknown engine 'cuda'; known: auto, numpy, native"),
    ]
    for arguments, sentence in refused:
        with pytest.raises(QlabError, match=sentence):
            fused_dot_add(*arguments)  # type: ignore[arg-type]


def test_missing_module_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.modules['qlab._native'] = None\nfrom qlab.replay.step import native_reason; print(native_reason())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "compiled module is not there" in ran.stdout
    assert "pip install -e ." in ran.stdout

    monkeypatch.setattr(replay_step, "_native", None)
    monkeypatch.setattr(replay_step, "_MISSING", "not built")
    a, b, c = random_bits(4, 16, F16, 6, specials=False)
    assert np.array_equal(fused_dot_add(a, b, c, HOPPER), fused_dot_add(a, b, c, HOPPER, engine="numpy"))
    with pytest.raises(UnsupportedError, match="not built"):
        fused_dot_add(a, b, c, HOPPER, engine="native")


@pytest.mark.parametrize("step", [AMPERE, HOPPER], ids=["ampere", "hopper"])
@pytest.mark.parametrize("power", range(-14, 15))
def test_a_sum_in_fp16_that_cancels_or_rounds_to_zero_is_plus_zero(step, power):
    """As recorded on an H200: no sum leaves -0, whether its terms cancel exactly or it is too small for fp16."""
    one, minus = (np.array([v], np.float16).view(np.uint16)[0] for v in (1.0, -1.0))
    big = np.array([2.0**power], np.float16).view(np.uint16)[0]
    a = np.zeros((2, step.terms), np.uint16)
    b = np.full_like(a, one)
    a[0, :2] = big, big ^ np.uint16(0x8000)  # cancels exactly
    a[1, 0], b[1, 0] = np.uint16(0x8001), np.uint16(0x0400)  # -2^-24 * 2^-14
    assert half_dot_add(a, b, np.zeros(2, np.uint16), step).tolist() == [0, 0]
    a[0, 1] = minus if power else np.uint16(0)  # and what does not cancel is the float64 sum, exactly
    want = np.float16(2.0**power - (1.0 if power else 0.0)) if -10 <= power <= 10 else None
    if want is not None:
        assert half_dot_add(a[:1], b[:1], np.zeros(1, np.uint16), step).view(np.float16)[0] == want
