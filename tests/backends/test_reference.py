from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from qlab.backends.reference import magnitude, oracle
from qlab.backends.registry import kernel
from qlab.errors import UnsupportedError
from qlab.inputs import random_activations, random_weight
from qlab.weights import round_once


def rational_products(x, weight):
    """x @ w and |x| @ |w| in exact rationals, w by the formula and one rounding through numpy's float16."""
    rows, columns = x.shape[0], weight.N
    value = [[Fraction(0)] * columns for _ in range(rows)]
    size = [[Fraction(0)] * columns for _ in range(rows)]
    for n in range(columns):
        for k in range(weight.K):
            g = int(weight.group_index[k])
            steps = int(weight.codes[k, n]) - int(weight.zeros[g, n])
            w = Fraction(float(np.float16(steps * float(weight.scales[g, n]))))
            for m in range(rows):
                term = Fraction(float(x[m, k])) * w
                value[m][n] += term
                size[m][n] += abs(term)
    return value, size


@pytest.mark.parametrize("act_order", [False, True])
def test_oracle_and_magnitude_against_rationals(act_order):
    weight = random_weight(64, 8, 32, act_order=act_order, seed=3)
    x = random_activations(3, 64, seed=4)
    got, scale = oracle(x, weight), magnitude(x, weight)
    value, size = rational_products(x, weight)
    for m in range(3):
        for n in range(8):
            assert abs(Fraction(float(got[m, n])) - value[m][n]) <= size[m][n] * Fraction(2) ** -52
            assert abs(Fraction(float(scale[m, n])) - size[m][n]) <= size[m][n] * Fraction(2) ** -52


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_round_once_where_two_roundings_err(dtype, bits):
    """Just above and below a tie by less than float32 can hold; the way through float32 falls onto the tie."""
    tie = 1 + 2.0**-bits
    above, below = 1 + 2.0 ** (1 - bits), 1.0
    values = torch.tensor([tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40, tie], dtype=torch.float64)
    assert round_once(values, dtype).tolist() == [above, below, -above, below]
    assert values.float().to(dtype).tolist() == [below, below, -below, below]


def test_round_once_against_numpy():
    """numpy converts float64 to float16 in one rounding."""
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**63), 2**63 - 1, (20000,), generator=g).view(torch.float64)
    scaled = torch.randn(20000, generator=g, dtype=torch.float64) * torch.logspace(-9, 5.5, 20000, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 65519.99, 65520.0, 2.0**-25])
    halves = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16).double()
    ties = (halves[1:] + halves[:-1]) / 2
    for values in (patterns, scaled, special.double(), ties, ties * (1 + 2.0**-45), ties * (1 - 2.0**-45)):
        with np.errstate(over="ignore", invalid="ignore"):
            want = values.numpy().astype(np.float16)
        got = round_once(values, torch.float16).numpy()
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(want[~np.isnan(want)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float64_is_the_oracle_rounded_once(dtype):
    weight = random_weight(256, 48, 64, dtype=dtype, seed=1)
    x = random_activations(9, 256, dtype=dtype, seed=2)
    for name, factor in (("reference.float64", 1.0), ("reference.float32", 1.01)):
        k = kernel(name)
        y = k.run(x, k.pack(weight))
        assert y.dtype == dtype
        best = (round_once(oracle(x, weight), dtype).double() - oracle(x, weight)).norm()
        assert float((y.double() - oracle(x, weight)).norm()) <= factor * float(best)


@pytest.mark.parametrize("name", ["reference.float64", "reference.float32"])
def test_bad_input_is_a_sentence(name):
    k = kernel(name)
    packed = k.pack(random_weight(64, 8, 32))
    with pytest.raises(UnsupportedError, match=r"x must be \[M, 64\]"):
        k.run(torch.zeros(2, 63, dtype=torch.float16), packed)
    with pytest.raises(UnsupportedError, match="cast x"):
        k.run(torch.zeros(2, 64), packed)
