"""What atomics can give: every order by brute force, the bound beyond, and the addends of a kernel."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipe import Unordered
from qlab.recipes import recipe
from qlab.replay import replay
from qlab.replay.atomics import EXACT_ADDENDS, addends, reachable

F16, BF16 = torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf


def brute_force(parts: torch.Tensor) -> set[float]:
    """Results of all orders, onto +0; NaN as None."""
    orders = torch.tensor(list(itertools.permutations(range(len(parts)))))
    total = torch.zeros(len(orders), dtype=parts.dtype)
    for column in parts[orders].T:
        total = total + column
    assert not (total.signbit() & (total == 0)).any()
    return {float(v) for v in total}


def spread(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Parts of very different size, some of which cancel."""
    g = torch.Generator().manual_seed(seed)
    parts = torch.randn(n, generator=g) * torch.exp2(torch.randint(-6, 7, (n,), generator=g))
    parts[1::3] = -parts[::3][: len(parts[1::3])] * (1 + torch.randint(-2, 3, (len(parts[1::3]),), generator=g) * 2.0**-7)
    return parts.to(dtype)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("n", range(1, 8))
def test_every_order(n: int, dtype: torch.dtype) -> None:
    several = 0
    for seed in range(5):
        parts = spread(n, dtype, seed)
        r, want = reachable(parts), brute_force(parts)
        assert (r.addends, r.exact) == (n, True)
        assert list(r.values) == sorted(want)
        assert (r.low, r.high) == (min(want), max(want))
        assert all(map(r.holds, want))
        assert not r.holds(r.high + 1)
        several += len(want) > 1
    assert several > 2 or n < 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1.0, -1.0, 2049.0, 2.0**-24, -0.0, 0.0, 65504.0, -65504.0, 0.5, 3.0]), min_size=1, max_size=6))
def test_every_order_of_duplicates_zeros_and_overflow(parts: list[float]) -> None:
    t = torch.tensor(parts).half()
    got, want = reachable(t).values, brute_force(t)
    assert [v for v in got if v == v] == sorted(v for v in want if v == v)
    assert any(v != v for v in got) == any(v != v for v in want)


def test_two_parts_have_one_result() -> None:
    assert reachable(spread(2, F16, 3)).values == (float(spread(2, F16, 3).sum()),)


def test_zero_is_plus_zero() -> None:
    """+0 and -0 are one number in ``values``, and it is +0: a sum onto zero never gives -0."""
    for parts in [-0.0], [-0.0, -0.0, -0.0], [1.0, -1.0, -0.0], []:
        r = reachable(torch.tensor(parts, dtype=F16))
        assert r.values == (0.0,)
        assert math.copysign(1, r.values[0]) == 1
        assert r.holds(0.0)
        assert not r.holds(-0.0)
    assert not reachable(torch.zeros(20, dtype=F16)).holds(-0.0)


def test_nan_and_infinity() -> None:
    cases: list[tuple[list[float], tuple[float, ...]]] = [
        ([NAN, 1, 2], (NAN,)),
        ([INF, -INF, 1], (NAN,)),
        ([INF, 1, -5], (INF,)),
        ([-INF, 1], (-INF,)),
        ([65504, 65504, -65504], (65504, INF)),
        ([65504, 65504, -INF], (-INF, NAN)),  # the finite ones may overflow first
    ]
    for parts, want in cases:
        r = reachable(torch.tensor(parts, dtype=F16))
        assert repr(r.values) == repr(tuple(map(float, want)))
        assert all(map(r.holds, want))
        assert r.holds(NAN) == (want[-1] != want[-1])
    many = reachable(torch.tensor([INF, *range(20)], dtype=F16))
    assert repr(many.values) == "(inf,)"
    assert many.holds(INF)
    assert many.holds(NAN)  # not excluded by the bound
    assert repr(reachable(torch.tensor([NAN, *range(20)], dtype=BF16)).values) == "(nan,)"


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_sixteen_addends_in_seconds(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    half = torch.randn(8, generator=g) * torch.exp2(torch.arange(8))
    cancelling = torch.cat([half, -half * (1 + torch.randn(8, generator=g) * 0.01)]).to(dtype)
    began = time.process_time()
    r = reachable(cancelling)
    assert time.process_time() - began < 10
    assert (r.addends, r.exact) == (EXACT_ADDENDS, True)
    sampled = {float(v) for v in in_random_orders(cancelling, 3000)}
    assert sampled <= set(r.values)
    assert len(r.values) > 50


def in_random_orders(parts: torch.Tensor, count: int) -> torch.Tensor:
    order = np.random.default_rng(9)
    orders = torch.from_numpy(np.stack([order.permutation(len(parts)) for _ in range(count)]))
    total = torch.zeros(count, dtype=parts.dtype)
    for column in parts[orders].T:
        total = total + column
    return total


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("n", [17, 32, 112, 500])
def test_the_bound_holds_every_sample(n: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        parts = spread(n, dtype, seed)
        parts = parts.abs() if seed == 2 else parts  # errors of one sign
        r = reachable(parts, seed=1, samples=200)
        assert not r.exact
        assert set(r.values) == set(reachable(parts, seed=1, samples=200).values)
        assert all(r.low <= v <= r.high for v in r.values)
        assert all(map(r.holds, in_random_orders(parts, 500).tolist()))
        # In ascending and in descending order, which are the extremes of the errors.
        for p in parts.double().sort().values, parts.double().sort(descending=True).values:
            total = torch.zeros((), dtype=dtype)
            for v in p.to(dtype):
                total = total + v
            assert r.holds(float(total))
    assert r.low < float(parts.double().sum()) < r.high
    assert not r.holds(r.high * 2 + 1)


def test_the_bound_of_an_overflow() -> None:
    parts = torch.tensor([60000.0] * 9 + [-60000.0] * 9).half()
    r = reachable(parts)
    assert (r.low, r.high) == (-INF, INF)
    small = reachable(torch.tensor([6000.0] * 9 + [-600.0] * 9).half())
    assert -INF < small.low < 48600 < small.high < INF
    positive = reachable(torch.tensor([6000.0] * 20).half())
    assert positive.high == INF
    assert positive.holds(INF)


def test_refusals() -> None:
    for parts in torch.zeros(3), torch.zeros(2, 2, dtype=F16), torch.zeros(3, dtype=torch.float64):
        with pytest.raises(QlabError, match=r"parts must be fp16 or bf16 \[P\]"):
            reachable(parts)


def test_addends_of_a_kernel() -> None:
    """ExLlama's blocks of 128 rows: whatever a seed gives is among the results of its addends."""
    w = random_weight(640, 32, 128, dtype=F16, symmetric=True, seed=1)
    x = random_activations(3, 640, dtype=F16, seed=2)
    r = recipe("vllm.gptq_gemm", Problem.of(w, 3), gpu("h100"))
    ((rows, columns, parts),) = addends(r, x, w)
    assert (rows, columns, parts.shape) == (slice(0, 3), slice(0, 32), (5, 3, 32))
    exact = (x.double() @ w.dequantize(torch.float64)).float()
    assert torch.allclose(parts.float().sum(0), exact, rtol=0.02, atol=0.02)
    results = [[reachable(parts[:, m, n]) for n in range(32)] for m in range(3)]
    assert sum(len(r.values) > 1 for row in results for r in row) > 20
    try:
        outputs = [replay(r, x, w, seed=s) for s in range(4)]
    except QlabError as reason:  # the reference engine takes no seed
        pytest.skip(str(reason))
    assert all(results[m][n].holds(float(y[m, n])) for y in outputs for m in range(3) for n in range(32))
    assert len({tuple(y.view(torch.int16).flatten().tolist()) for y in outputs}) > 1


def test_scaled_addends() -> None:
    """Marlin's atomics of a whole column: each part is scaled before it is added."""
    w = random_weight(1024, 64, 1024, dtype=F16, symmetric=True, seed=3)
    x = random_activations(2, 1024, dtype=F16, seed=4)
    r = recipe("vllm.marlin.gptq.atomic", Problem.of(w, 2), gpu("h100"))
    (region,) = r.regions
    assert isinstance(region.tree, Unordered)
    assert region.tree.scaled
    ((_, _, parts),) = addends(r, x, w)
    exact = x.double() @ w.dequantize(torch.float64)
    assert torch.allclose(parts.double().sum(0), exact, rtol=0.01, atol=0.01)


def test_recipes_without_atomics_have_no_addends() -> None:
    w = random_weight(256, 64, 128, dtype=F16, seed=5)
    assert addends(recipe("vllm.marlin.awq", Problem.of(w, 2), gpu("h100")), random_activations(2, 256, dtype=F16), w) == []
