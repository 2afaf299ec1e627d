"""The float64 model of a fused sum agrees with qlab's, in whole numbers, and each of its conditions is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qlab.hardware import AMPERE, HOPPER, VOLTA, Step
from qlab.replay.step import fused_dot_add
from tests.replay.float64_model import fused_sum

F16, BF16 = torch.float16, torch.bfloat16
STEPS = {"volta": VOLTA, "ampere": AMPERE, "hopper": HOPPER}
ROWS = 20_000
INF = 0x7F800000


def numbers(rng: np.random.Generator, shape: tuple[int, ...], exponents: tuple[int, int], dtype: torch.dtype) -> np.ndarray:
    """Bits with stored exponents in a range; 0 are subnormals and zeros."""
    fraction_bits = 10 if dtype == F16 else 7
    fraction = rng.integers(0, 1 << fraction_bits, shape)
    b = rng.integers(exponents[0], exponents[1] + 1, shape) << fraction_bits | fraction
    b[rng.random(shape) < 0.05] = 0
    return (b | rng.integers(0, 2, shape) << 15).astype(np.uint16)


def wide(step: Step, dtype: torch.dtype, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponents over the whole finite range, half of them near each other; accumulators near the products; some cancel."""
    rng = np.random.default_rng(seed)
    most = 30 if dtype == F16 else 254
    shape = (ROWS, step.terms)
    a, b = (numbers(rng, shape, (0, most), dtype) for _ in range(2))
    middle = 15 if dtype == F16 else 127
    a[::2], b[::2] = (numbers(rng, (ROWS // 2, step.terms), (middle - 3, middle + 3), dtype) for _ in range(2))
    pairs = rng.random(ROWS) < 0.3
    a[pairs, 1], b[pairs, 1] = a[pairs, 0] ^ 0x8000, b[pairs, 0]
    c = rng.integers(0, 1 << 32, ROWS).astype(np.uint32)
    near = (127 + rng.integers(-4, 8, ROWS)) << 23 | rng.integers(0, 1 << 23, ROWS) | rng.integers(0, 2, ROWS) << 31
    c[::2] = near[::2]
    c[(c & INF) == INF] &= 0xBFFFFFFF
    c[rng.random(ROWS) < 0.1] = 0
    return a, b, c


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_the_model_is_exact(name: str, dtype: torch.dtype) -> None:
    a, b, c = wide(STEPS[name], dtype, 1)
    want = fused_dot_add(a, b, c, STEPS[name], dtype, "numpy")
    assert np.array_equal(fused_sum(a, b, c, STEPS[name], dtype), want)
    assert len(np.unique(want)) > ROWS // 2


def share(step: Step, dtype: torch.dtype, condition: str) -> float:
    """Share of results that differ without one condition."""
    a, b, c = wide(step, dtype, 2)
    want = fused_dot_add(a, b, c, step, dtype, "numpy")
    assert np.array_equal(fused_sum(a, b, c, step, dtype), want)
    return float((fused_sum(a, b, c, step, dtype, **{condition: False}) != want).mean())


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_exponents_come_from_the_stored_ones(name: str, dtype: torch.dtype) -> None:
    """A product in [2, 4) has a larger exponent of its own than its factors' sum: a bit too many would be cut off."""
    assert share(STEPS[name], dtype, "decoded_exponents") > 0.005


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_the_magic_constant_has_the_terms_sign(name: str, dtype: torch.dtype) -> None:
    """A positive constant floors negative terms, and to half units at that."""
    assert share(STEPS[name], dtype, "signed_magic") > 0.02


@pytest.mark.parametrize("name", STEPS)
def test_overflow_gives_infinity(name: str) -> None:
    """IEEE's rounding toward zero would give the largest finite number; fp16 products cannot overflow fp32, bf16 ones do."""
    assert share(STEPS[name], BF16, "overflow") > 0.02
    a, b = np.full((1, 4), 0x7F00, np.uint16), np.full((1, 4), 0x4000, np.uint16)  # 2^127 * 2, four times
    c = np.zeros(1, np.uint32)
    assert fused_sum(a, b, c, VOLTA, BF16).tolist() == [INF]
    assert fused_sum(a, b, c, VOLTA, BF16, overflow=False).tolist() == [INF - 1]
    b[0, :2] ^= 0x8000  # before the sum nothing overflows
    assert fused_sum(a, b, c, VOLTA, BF16).tolist() == [0]


def test_one_case_for_each_condition() -> None:
    """1.5 * 1.5 - 2^-23 by Volta's rule, which keeps 23 bits."""
    factors = (1.5, -(2.0**-12), 0, 0), (1.5, 2.0**-11, 0, 0)
    a, b = (torch.tensor([v]).half().view(torch.int16).numpy().view(np.uint16) for v in factors)

    def total(c: float, **conditions: bool) -> float:
        return float(fused_sum(a, b, np.array([c], np.float32).view(np.uint32), VOLTA, F16, **conditions).view(np.float32)[0])

    # 1.5 * 1.5 has the exponent 0 of its factors: units of 2^-23, and the sum is truncated to 24 bits.
    assert total(0) == 2.25 - 2.0**-22
    assert total(0, decoded_exponents=False) == 2.25
    # With 2.25 in the accumulator the exponent is 1: units of 2^-22, and -2^-23 is truncated to 0.
    assert total(-2.25) == 0
    assert total(-2.25, signed_magic=False) == -(2.0**-23)  # below the constant's binade a unit is half as large
