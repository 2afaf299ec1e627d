"""Distances against slow exact arithmetic, digests and classes against bits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab import compare

FORMATS = {torch.float16: (11, -14), torch.bfloat16: (8, -126)}
"""Bits of the significand, and exponent of the smallest normal number."""


def spacing(value: Fraction, dtype: torch.dtype) -> Fraction:
    """Distance of neighbours of ``dtype`` around ``value``, from the format's definition."""
    bits, lowest = FORMATS[dtype]
    exponent = lowest
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    return Fraction(2) ** (exponent - bits + 1)


def neighbours(value: float, dtype: torch.dtype) -> list[float]:
    """The next value toward zero, ``value`` rounded to ``dtype``, and the next one outward."""
    bits = torch.tensor(value, dtype=dtype).view(torch.int16)
    return [float(v) for v in torch.stack([bits - 1, bits, bits + 1]).view(dtype)]


def bits_of(pattern: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([pattern], dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("exponent", [-200, -140, -133, -127, -126, -30, -25, -24, -15, -14, -1, 0, 1, 9, 14])
def test_ulp_around_powers_of_two(dtype, exponent):
    power = 2.0**exponent
    values = [power, -power, math.nextafter(power, 0), math.nextafter(power, math.inf), 1.5 * power]
    got = compare.ulp(torch.tensor(values, dtype=torch.float64), dtype)
    for value, u in zip(values, got.tolist(), strict=True):
        assert Fraction(u) == spacing(Fraction(value), dtype), value


@pytest.mark.parametrize("dtype", FORMATS)
def test_ulp_is_the_distance_of_neighbours(dtype):
    for value in (1.0, 0.999, 1000.0, 2.0**-14, 3 * 2.0**-24):
        low, middle, high = neighbours(value, dtype)
        u = float(compare.ulp(torch.tensor([middle], dtype=torch.float64), dtype))
        assert high - middle == u
        assert middle - low in (u, u / 2)  # half below a power of two


@pytest.mark.parametrize("dtype", FORMATS)
def test_ulp_at_zero_is_the_smallest_subnormal(dtype):
    smallest = float(torch.tensor([1], dtype=torch.int16).view(dtype))
    assert compare.ulp(torch.tensor([0.0, -0.0], dtype=torch.float64), dtype).tolist() == [smallest, smallest]
    y = torch.tensor([3], dtype=torch.int16).view(dtype)
    assert compare.ulp_errors(y, torch.zeros(1, dtype=torch.float64)).tolist() == [3.0]


def test_ulp_beyond_the_range_of_float32():
    assert float(compare.ulp(torch.tensor([2.0**200], dtype=torch.float64), torch.bfloat16)) == 2.0**193


patterns = st.integers(0, 0xFFFF)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(FORMATS)), patterns, st.floats(allow_nan=False, allow_infinity=False, width=64))
def test_ulp_errors_against_fractions(dtype, pattern, exact):
    y = bits_of(pattern, dtype)
    got = float(compare.ulp_errors(y, torch.tensor([exact], dtype=torch.float64)))
    if not bool(torch.isfinite(y)):
        assert got == math.inf
        return
    distance = abs(Fraction(float(y)) - Fraction(exact))
    true = distance / spacing(Fraction(exact), dtype)
    if true > Fraction(2) ** 1000:
        return
    assert got == pytest.approx(float(true), rel=1e-15)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FORMATS)), st.floats(-60000, 60000))
def test_an_exact_value_rounded_once_is_within_half_an_ulp(dtype, exact):
    from qlab.weights import round_once

    value = torch.tensor([exact], dtype=torch.float64)
    assert float(compare.ulp_errors(round_once(value, dtype), value)) <= 0.5


def test_infinite_and_nan_outputs_are_infinitely_wrong():
    y = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]], dtype=torch.float16)
    exact = torch.tensor([[1.0, 2.0, 3.0, 1.0]], dtype=torch.float64)
    assert compare.ulp_errors(y, exact).tolist() == [[math.inf] * 3 + [0.0]]
    for i in range(3):
        e = compare.error(y[:, i : i + 1], exact[:, i : i + 1], exact[:, i : i + 1])
        assert (e.ulp_median, e.ulp_max, e.backward) == (math.inf, math.inf, math.inf)
        assert not e.relative_l2 < math.inf


def test_error_against_fractions():
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn((5, 32), generator=g).half(), torch.randn((32, 7), generator=g).half()
    y = (x.float() @ w.float()).half()
    y[2, 3] += 1
    rows = [[[(Fraction(float(x[m, k])), Fraction(float(w[k, n]))) for k in range(32)] for n in range(7)] for m in range(5)]
    exact = [[sum(a * b for a, b in terms) for terms in row] for row in rows]
    size = [[sum(abs(a * b) for a, b in terms) for terms in row] for row in rows]
    off = [[abs(Fraction(float(y[m, n])) - exact[m][n]) for n in range(7)] for m in range(5)]
    cells = [(m, n) for m in range(5) for n in range(7)]
    ulps = sorted(float(off[m][n] / spacing(exact[m][n], torch.float16)) for m, n in cells)
    got = compare.error(y, x.double() @ w.double(), x.double().abs() @ w.double().abs())
    squared = sum(off[m][n] ** 2 for m, n in cells) / sum(exact[m][n] ** 2 for m, n in cells)
    assert got.relative_l2 == pytest.approx(math.sqrt(squared), rel=1e-9)
    assert got.ulp_max == pytest.approx(ulps[-1], rel=1e-9)
    assert got.ulp_median == pytest.approx(ulps[len(ulps) // 2], rel=1e-9)
    assert got.backward == pytest.approx(float(max(off[m][n] / size[m][n] for m, n in cells)), rel=1e-9)


def test_backward_error_is_blind_to_cancellation_and_ulp_is_not():
    exact = torch.tensor([[2.0**-12]], dtype=torch.float64)
    y = torch.tensor([[2.0**-12 + 2.0**-14]], dtype=torch.float16)
    e = compare.error(y, exact, torch.tensor([[1000.0]], dtype=torch.float64))
    assert e.ulp_max > 100
    assert e.backward == 2.0**-14 / 1000


def test_nothing_went_in_and_nothing_came_out():
    zero = torch.zeros((1, 2), dtype=torch.float64)
    e = compare.error(torch.zeros((1, 2), dtype=torch.float16), zero, zero)
    assert (e.relative_l2, e.ulp_max, e.backward) == (0, 0, 0)
    e = compare.error(torch.ones((1, 2), dtype=torch.float16), zero, zero)
    assert (e.relative_l2, e.backward) == (math.inf, math.inf)


def test_moments_add_up():
    g = torch.Generator().manual_seed(1)
    y, exact = torch.randn((4, 6), generator=g).half(), torch.randn((4, 6), generator=g).double()
    halves = compare.moments(y[:2], exact[:2]) + compare.moments(y[2:], exact[2:])
    assert halves.relative_l2 == pytest.approx(compare.moments(y, exact).relative_l2, rel=1e-12)


@pytest.mark.parametrize("dtype", FORMATS)
def test_digest_and_count_see_nan_payloads_and_signs_of_zero(dtype):
    quiet = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}[dtype]
    a = torch.tensor([0, quiet, 17], dtype=torch.int16).view(dtype)
    for at, pattern in ((0, -0x8000), (1, quiet + 1), (2, 18)):
        bits = a.view(torch.int16).clone()
        bits[at] = pattern
        b = bits.view(dtype)
        assert compare.digest(a) != compare.digest(b)
        assert compare.differing(a, b) == 1
    assert compare.digest(a) == compare.digest(a.clone())
    assert compare.differing(a, a.clone()) == 0


def test_digest_depends_on_shape_and_dtype_and_not_on_strides():
    y = torch.arange(6, dtype=torch.float16)
    assert len({compare.digest(y), compare.digest(y.reshape(2, 3)), compare.digest(y.view(torch.bfloat16))}) == 3
    wide = torch.zeros((2, 8), dtype=torch.float16)
    wide[:, 2:5] = y.reshape(2, 3)
    assert compare.digest(wide[:, 2:5]) == compare.digest(y.reshape(2, 3))
    assert compare.differing(wide[:, 2:5], y.reshape(2, 3)) == 0


def test_differing_refuses_other_shapes_and_dtypes():
    y = torch.zeros((2, 2), dtype=torch.float16)
    for other in (y.reshape(4), y.float()):
        with pytest.raises(ValueError, match="cannot compare"):
            compare.differing(y, other)


def test_equivalence_classes_keep_the_order_of_first_meeting():
    digests = {"c": "2", "a": "1", "b": "2", "e": "3", "d": "1"}
    assert compare.equivalence_classes(digests) == (("c", "b"), ("a", "d"), ("e",))
    assert compare.equivalence_classes({}) == ()


def test_off_diagonal():
    nan = math.nan
    got = compare.off_diagonal([[9.0, 1.0, 2.0], [1.0, 9.0, nan], [2.0, nan, 9.0]])
    assert got == compare.OffDiagonal(1.5, 1.0, 2.0)
    assert compare.off_diagonal([[5.0]]) is None
    assert compare.off_diagonal([]) is None
    assert compare.off_diagonal([[0.0, nan], [nan, 0.0]]) is None
