"""The reference engine against exact fractions, on tiny random recipes and numbers over the whole range of exponents."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem
from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import AMPERE, HOPPER, VOLTA, gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipe import (
    Fma,
    HalfDot,
    Node,
    Opaque,
    Output,
    Recipe,
    Step,
    TensorCore,
    Tile,
    Type,
    chain,
    join,
    rounded,
    unordered,
)
from qlab.recipes import recipe
from qlab.replay import reference, replay
from qlab.replay.operands import Operands, bits, decode, operands, row_order, values
from qlab.weights import Int4Weight
from tests.replay import exact_model

TORCH: dict[Type, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
M, N, K, G = 2, 3, 32, 4
STEPS: dict[str, Step] = {
    "volta": TensorCore.of(VOLTA),
    "ampere": TensorCore.of(AMPERE),
    "hopper": TensorCore.of(HOPPER),
    "hopper as two": TensorCore(25, 8, -133),
    "volta fp16": TensorCore.of(VOLTA, "fp16"),
    "ampere fp16": TensorCore.of(AMPERE, "fp16"),
    "hopper fp16": TensorCore.of(HOPPER, "fp16"),
    "fma fp32": Fma("fp32"),
    "fma fp16": Fma("fp16"),
    "half dot": HalfDot(8),
    "half dot of 4": HalfDot(4),
}
CASES = [(name, "fp16") for name in STEPS] + [(name, "bf16") for name in STEPS if "fp16" not in name and "half" not in name]
RULES = (Output(), Output(True), Output(False, "added"), Output(True, "added"), Output(True, "fused"))


def random_numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Type, mode: str) -> np.ndarray:
    """Bits: exponents anywhere (wide), alike with few significant bits (near: ties, cancellation), or with NaN and infinity.

    Most stay where 32 products do not overflow.
    """
    fraction_bits, offset = (10, 15) if dtype == "fp16" else (7, 127)
    most = 2 * offset
    exponent = np.where(rng.random(shape) < 0.01, rng.integers(0, most + 1, shape), rng.integers(0, offset * 4 // 3 + 1, shape))
    if mode == "near":
        exponent = rng.integers(offset - 4, offset + 1, shape)
    b = (exponent << fraction_bits) | rng.integers(0, 1 << fraction_bits, shape)
    if mode == "near":
        b &= -1 << rng.integers(0, fraction_bits, shape)
    b[rng.random(shape) < 0.08] = 0
    b[rng.random(shape) < 0.05] &= (1 << fraction_bits) - 1  # subnormal
    if mode == "special":
        b[rng.random(shape) < 0.003] = (most + 1) << fraction_bits
        b[rng.random(shape) < 0.003] = ((most + 1) << fraction_bits) | 1
    return (b | rng.integers(0, 2, shape) << 15).astype(np.uint16)


def random_operands(rng: np.random.Generator, dtype: Type, mode: str, n: int = N) -> tuple[np.ndarray, ...]:
    """x, w, scales, group, bias; some products cancel."""
    x, w, scales, bias = (random_numbers(rng, s, dtype, mode) for s in ((M, K), (K, n), (G, n), (n,)))
    pairs = rng.permutation(K).reshape(-1, 2)[: K // 8]
    x[:, pairs[:, 1]], w[pairs[:, 1]] = x[:, pairs[:, 0]], w[pairs[:, 0]] ^ 0x8000
    return x, w, scales, rng.integers(0, G, K).astype(np.int32), bias


def random_tree(rng: np.random.Generator, step: Step, dtype: Type) -> Node:
    """Chains over a random order of k, joined at random."""
    order = rng.permutation(K).reshape(-1, step.terms)
    cuts = np.sort(rng.choice(np.arange(1, len(order)), min(len(order) - 1, int(rng.integers(0, 4))), replace=False))
    parts: list[Node] = [chain(step, o.ravel()) for o in np.split(order, cuts)]
    while len(parts) > 1:
        count = int(rng.integers(2, len(parts) + 1))
        type: Type = rng.choice(["fp32", "fp32", "fp16", "bf16"])
        some = [rounded(p, type) if type != "fp32" or rng.random() < 0.5 else rounded(p, dtype) for p in parts[:count]]
        if count == 2 and type != "fp32" and rng.random() < 0.5:
            parts[:count] = [unordered(some, type, scaled=bool(rng.random() < 0.5))]
        else:
            parts[:count] = [join(some, type)]
        parts = [parts[i] for i in rng.permutation(len(parts))]
    return rounded(parts[0], rng.choice(["fp32", "fp16", "bf16"]))


def run(recipe: Recipe, x: Any, w: Any, scales: Any, group: Any, bias: Any) -> np.ndarray:
    w, scales, bias = (values(v, TORCH[recipe.dtype]) for v in (w, scales, bias))
    return reference.run(recipe, x, Operands(w, scales, torch.from_numpy(group), bias))


@pytest.mark.parametrize("mode", ["wide", "near", "special"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_random_recipes(name: str, dtype: Type, mode: str) -> None:
    rng = np.random.default_rng([CASES.index((name, dtype)), len(mode)])
    seen = []
    for _ in range(8):
        trees = [(random_tree(rng, STEPS[name], dtype), RULES[rng.integers(len(RULES))]) for _ in range(N)]
        r = Recipe.of(M, K, N, dtype, [Tile((0, M), (n, n + 1), *t) for n, t in enumerate(trees)])
        o = random_operands(rng, dtype, mode)
        got, want = run(r, *o), exact_model.run(r, *o)
        assert np.array_equal(got, want), (r.regions, *o)
        seen.append(want)
    y = np.stack(seen) & 0x7FFF
    finite, nonzero = y < (0x7C00 if dtype == "fp16" else 0x7F80), y > 0
    assert (finite & nonzero).sum() > 8  # what overflows or vanishes would show nothing
    assert len(np.unique(y)) > 8


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_output_rules(rule: Output, dtype: Type) -> None:
    """Many columns of one sum each: scales and biases of any exponent, products that underflow, sums that hide a bias."""
    rng = np.random.default_rng(7)
    n = 300
    for mode in ("wide", "near", "special"):
        r = Recipe.of(M, K, n, dtype, [Tile((0, M), (0, n), chain(Fma(), [3, 8]), rule)])
        o = random_operands(rng, dtype, mode, n)
        assert np.array_equal(run(r, *o), exact_model.run(r, *o))


def test_fused_bias_in_bf16_is_rounded_once() -> None:
    """(1 + 2^-7) * 1.5 is a tie, and a bias of 2^-80 decides it: float64 cannot hold the two, and loses the bias."""
    r = Recipe.of(1, 1, 3, "bf16", [Tile((0, 1), (0, 3), chain(Fma(), [0]), Output(True, "fused"))])
    x, w, s, bias = ([1 + 2.0**-7], [1.0] * 3, [1.5] * 3, [2.0**-80, 0, -(2.0**-80)])
    *columns, bias_bits = (bits(torch.tensor(v).bfloat16()) for v in (x, w, s, bias))
    o = (*(c[None] for c in columns), np.zeros(1, np.int32), bias_bits)
    assert values(run(r, *o), torch.bfloat16).tolist() == [[194 / 128, 194 / 128, 193 / 128]]
    assert np.array_equal(run(r, *o), exact_model.run(r, *o))


@pytest.mark.parametrize("type", ["fp32", "fp16", "bf16"])
def test_roundings(type: Type) -> None:
    """Ties, what lies just beside them, overflow and subnormal results, from float64."""
    f = exact_model.FORMATS[type]
    rng = np.random.default_rng(3)
    kept = rng.integers(1, 1 << f.precision, 4000).astype(float)
    exponent = rng.integers(f.lowest - 2 * f.precision, f.highest + 2, 4000)
    beside = rng.choice([0, 0.25, 0.5, 0.75, 0.5 + 2.0**-20, 0.5 - 2.0**-20], 4000)
    x = np.ldexp(kept + beside, exponent - f.precision + 1) * rng.choice([-1, 1], 4000)
    largest = (2.0 - 2.0 ** (1 - f.precision)) * 2.0**f.highest
    x = np.r_[x, largest * (1 + 2.0**-40), 2.0 ** (f.highest + 1) - 2.0 ** (f.highest - f.precision), 1e300, 5e-324, -5e-324]
    got = bits32(reference._round(x, type))
    want = [exact_model.encode(exact_model.nearest(Fraction(v), type), "fp32") for v in x.tolist()]
    assert got == want
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0])
    assert bits32(reference._round(special, type))[1:] == [0x7F800000, 0xFF800000, 0, 0x80000000]
    assert np.isnan(reference._round(special, type)[0])


def bits32(x: np.ndarray) -> list[int]:
    assert x.dtype == np.float32
    return x.view(np.uint32).tolist()


@pytest.mark.parametrize("type", ["fp32", "fp16"])
def test_fma_rounds_once(type: Type) -> None:
    """A float64 sum of product and addend loses bits that decide ties; fp32 factors, as in ExLlama's last step, too."""
    rng = np.random.default_rng(4)
    n = 6000
    x, w = (rng.integers(1, 1 << 24, n).astype(np.float32) * rng.choice([-1, 1], n).astype(np.float32) for _ in range(2))
    x, w = np.ldexp(x, rng.integers(-60, -20, n)), np.ldexp(w, rng.integers(-40, -10, n)).astype(np.float32)
    total = (x.astype(np.float64) * w * np.exp2(rng.integers(-60, 60, n))).astype(np.float32)
    # Ties of the addend with a product far below it.
    total[::3] = np.ldexp(rng.integers(1 << 23, 1 << 24, n)[::3].astype(np.float32), -30)
    w[::3] = np.ldexp(np.float32(1), rng.integers(-30, 0, n)[::3])
    x[::3] = np.ldexp((rng.integers(0, 2, n)[::3] + 1).astype(np.float32), -31)
    if type == "fp16":
        total = values(bits(torch.from_numpy(total).half()), torch.float16).float().numpy()
    with np.errstate(invalid="ignore"):
        got = bits32(reference._fma(x, w, total, type))
    number = [[exact_model.decode(b, "fp32") for b in bits32(v.astype(np.float32))] for v in (x, w, total)]
    want = [exact_model.encode(exact_model.fma(a, b, c, type), "fp32") for a, b, c in zip(*number, strict=True)]
    assert got == want


def test_exact_model_knows_its_formats() -> None:
    for type, width in ("fp16", 16), ("bf16", 16):
        every = np.arange(0, 1 << width, 7).astype(np.uint16)
        numbers = [exact_model.decode(b, type) for b in every.tolist()]
        real = values(every, TORCH[type]).double().tolist()
        assert all(float(a) == b or (a != a and b != b) for a, b in zip(numbers, real, strict=True))
        again = [exact_model.encode(v, type) for v in numbers]
        assert all(a == b for a, b, v in zip(again, every.tolist(), numbers, strict=True) if v == v)
        assert {a for a, v in zip(again, numbers, strict=True) if v != v} == {0x7FFF}


def test_atomics_start_at_zero() -> None:
    """-2^-30 is -0 in fp16: atomics make +0 of it, a join keeps it."""
    x, w = (bits(torch.tensor(v).half()) for v in ([[-(2.0**-15), 2.0**-15]], [[2.0**-15], [-(2.0**-15)]]))
    parts = [rounded(chain(Fma(), [i]), "fp16") for i in range(2)]
    one, two = (unordered(parts[:n], "fp16") for n in (1, 2))
    trees = {"join": join(parts, "fp16"), "atomics": two, "one": one, "x": parts[0]}
    none = np.zeros((1, 1), np.uint16), np.zeros(2, np.int32), np.zeros(1, np.uint16)
    got = {
        name: hex(int(run(Recipe.of(1, 2, 1, "fp16", [Tile((0, 1), (0, 1), tree)]), x, w, *none)[0, 0]))
        for name, tree in trees.items()
    }
    assert got == {"join": "0x8000", "atomics": "0x0", "one": "0x0", "x": "0x8000"}


def test_refusals() -> None:
    o = random_operands(np.random.default_rng(0), "fp16", "near")
    parts = [rounded(chain(Fma(), [i]), "fp16") for i in range(3)]
    for tree, sentence in (
        (unordered(parts, "fp16"), "the order of atomics is not fixed"),
        (Opaque("cuBLAS"), "opaque: cuBLAS"),
    ):
        with pytest.raises(UnsupportedError, match=sentence):
            run(Recipe.of(M, K, N, "fp16", [Tile((0, M), (0, N), tree)]), *o)
    r = Recipe.of(M, K, N, "fp16", [Tile((0, M), (0, N), parts[0], Output(False, "added"))])
    with pytest.raises(UnsupportedError, match="the recipe adds a bias and none was given"):
        run(r, *o[:4], np.zeros(0, np.uint16))


# Operands


def numbers(t: torch.Tensor) -> list[list[exact_model.Number]]:
    return [[Fraction(v) for v in row] for row in t.double().tolist()]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("rule", ["rounded", "fused", "integer"])
def test_decoded_weights(rule: str, dtype: Type) -> None:
    """All codes and zero points, scales of any exponent."""
    rng = np.random.default_rng(5)
    scales = values(random_numbers(rng, (256, 10), dtype, "wide"), TORCH[dtype])
    scales = torch.where(scales.abs() * 225 < torch.finfo(scales.dtype).max, scales, torch.ones_like(scales))
    codes = torch.arange(256)[:, None].expand(256, 10).remainder(16).to(torch.uint8)
    zeros = torch.arange(256)[:, None].expand(256, 10).div(16, rounding_mode="floor").to(torch.uint8)
    group = torch.arange(256, dtype=torch.int32)
    r = Recipe.of(1, 256, 10, dtype, [Tile((0, 1), (0, 10), chain(Fma(), range(256)))], weights=rule)  # type: ignore[arg-type]
    got = bits(decode(r, codes, zeros, scales, group))
    for k, row in enumerate(numbers(scales)):
        q, z = int(codes[k, 0]), int(zeros[k, 0])
        for n, s in enumerate(row):
            shift = exact_model.nearest(-s * z, dtype)
            exact = {"rounded": (q - z) * s, "integer": Fraction(q - z), "fused": exact_model.add(q * s, shift)}
            want = exact_model.encode(exact_model.nearest(exact[rule], dtype), dtype)
            assert got[k, n] & 0x7FFF == want & 0x7FFF  # a zero's sign is not kept apart
            assert got[k, n] == want or want & 0x7FFF == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_weights_are_the_dequantised_weight(dtype: torch.dtype) -> None:
    w = random_weight(256, 64, 32, dtype=dtype, seed=1)
    name: Type = "fp16" if dtype == torch.float16 else "bf16"
    r = Recipe.of(1, 256, 64, name, [Tile((0, 1), (0, 64), chain(Fma(), range(256)))])
    o = operands(r, w)
    assert torch.equal(o.w, w.dequantize(dtype))
    part = operands(r, w, slice(16, 40))
    assert torch.equal(part.w, o.w[:, 16:40])
    assert torch.equal(part.scales, w.scales[:, 16:40])
    assert o.bias.numel() == 0


def test_sorted_rows_keep_the_order_within_a_group() -> None:
    """Replaying sorted rows is replaying a weight whose rows, and x's columns, were sorted beforehand."""
    w = random_weight(64, 32, 16, dtype=torch.float16, seed=2)
    g = torch.Generator().manual_seed(0)
    shuffled = replace(w, group_index=w.group_index[torch.randperm(64, generator=g)])
    tile = Tile((0, 3), (0, 32), chain(Fma("fp16"), range(64)))
    natural, by_group = (Recipe.of(3, 64, 32, "fp16", [tile], rows=rows) for rows in ("natural", "sorted"))
    order = row_order(by_group, shuffled)
    assert order is not None
    assert row_order(natural, shuffled) is None
    moved = shuffled.group_index[order]
    assert torch.equal(moved, moved.sort().values)
    assert all(order[moved == i].diff().min() > 0 for i in range(4))
    x = random_activations(3, 64, dtype=torch.float16, seed=3)
    got = reference.run(by_group, bits(x[:, order]), operands(by_group, shuffled, order=order))
    plain = Int4Weight(shuffled.codes[order], w.zeros, w.scales, moved, w.input_scale, "")
    want = reference.run(natural, bits(x[:, order]), operands(natural, plain))
    assert np.array_equal(got, want)
    assert not np.array_equal(got, reference.run(natural, bits(x), operands(natural, shuffled)))


def test_scales_of_groups_are_not_taken_for_a_column_s() -> None:
    """A whole-column recipe on a weight with groups would use the first group's scale alone."""
    whole, grouped = random_weight(256, 64, -1, seed=1), random_weight(256, 64, 64, seed=1)
    made = recipe("vllm.marlin.awq", Problem.of(whole, 2), gpu("h100"))
    x = random_activations(2, 256)
    assert replay(made, x, whole).shape == (2, 64)
    with pytest.raises(QlabError, match="whole columns' scales, and the weight has 4 groups"):
        replay(made, x, grouped)
    with pytest.raises(QlabError, match="seed of an order of atomics must be 0 or more"):
        replay(made, x, whole, seed=-1)
