"""Recipes interpreted in exact arithmetic, one output at a time: fractions and whole numbers, straight from the rules.

An oracle for tests: it shares no arithmetic with qlab.replay. A number is a Fraction; NaN, the infinities and -0 are floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from qlab.recipe import Chain, Fma, HalfDot, Join, Node, Output, Recipe, Round, TensorCore, Type, Unordered, unfold


class Format(NamedTuple):
    """Significant bits and the exponents of the smallest and the largest normal numbers."""

    precision: int
    lowest: int
    highest: int


FORMATS: dict[Type, Format] = {"fp16": Format(11, -14, 15), "bf16": Format(8, -126, 127), "fp32": Format(24, -126, 127)}
Number = Fraction | float
INF, NAN, ZERO, NEGATIVE_ZERO = math.inf, math.nan, Fraction(0), -0.0


def decode(bits: int, type: Type) -> Number:
    precision, lowest, highest = FORMATS[type]
    top = 1 << (31 if type == "fp32" else 15)
    sign, magnitude = -1 if bits & top else 1, bits & (top - 1)
    field, fraction = magnitude >> (precision - 1), magnitude & ((1 << (precision - 1)) - 1)
    if field > 2 * highest:
        return NAN if fraction else sign * INF
    if magnitude == 0:
        return ZERO if sign > 0 else NEGATIVE_ZERO
    significand = fraction + ((1 << (precision - 1)) if field else 0)
    return sign * significand * Fraction(2) ** (max(field, 1) - 1 + lowest - precision + 1)


def encode(x: Number, type: Type) -> int:
    """Bits of a number that the type holds; NaN as 0x7FFF or 0x7FFFFFFF."""
    precision, lowest, highest = FORMATS[type]
    width = 32 if type == "fp32" else 16
    if isinstance(x, float):
        if math.isnan(x):
            return (1 << (width - 1)) - 1
        magnitude = (2 * highest + 1) << (precision - 1) if math.isinf(x) else 0
        return magnitude | (math.copysign(1, x) < 0) << (width - 1)
    exponent = max(floor_log2(x), lowest) if x else lowest
    significand = abs(x) / Fraction(2) ** (exponent - precision + 1)
    assert significand.denominator == 1
    assert significand < 1 << precision
    return ((exponent - lowest) << (precision - 1)) + int(significand) | (x < 0) << (width - 1)


def floor_log2(x: Fraction) -> int:
    e = abs(x).numerator.bit_length() - x.denominator.bit_length()
    return e if abs(x) >= Fraction(2) ** e else e - 1


def nearest(x: Number, type: Type) -> Number:
    """To nearest, ties to even; too large gives infinity; the sign of what vanishes stays."""
    if isinstance(x, float) or not x:
        return x
    precision, lowest, highest = FORMATS[type]
    unit = Fraction(2) ** (max(floor_log2(x), lowest) - precision + 1)
    magnitude = round(abs(x) / unit) * unit  # Python's round is to even
    if magnitude >= Fraction(2) ** (highest + 1):
        return INF if x > 0 else -INF
    return (magnitude if x > 0 else -magnitude) if magnitude else ZERO if x > 0 else NEGATIVE_ZERO


def toward_zero(x: Fraction, type: Type) -> Number:
    """Truncated, but for overflow; zero is positive."""
    precision, lowest, highest = FORMATS[type]
    unit = Fraction(2) ** (max(floor_log2(x), lowest) - precision + 1) if x else Fraction(1)
    truncated = int(x / unit) * unit
    if abs(truncated) >= Fraction(2) ** (highest + 1):
        return INF if x > 0 else -INF
    return truncated


def add(x: Number, y: Number) -> Number:
    """Exact, as IEEE 754 has it for NaN, infinities and zeros."""
    special = [v for v in (x, y) if isinstance(v, float) and v != 0]
    if special:
        return sum(special)
    if isinstance(x, float) and isinstance(y, float):
        return NEGATIVE_ZERO
    return Fraction(x) + Fraction(y)


def negative(x: Number) -> bool:
    return math.copysign(1, x) < 0 if isinstance(x, float) else x < 0


def multiply(x: Number, y: Number) -> Number:
    if any(isinstance(v, float) and v != 0 for v in (x, y)):
        if any(isinstance(v, float) and math.isnan(v) for v in (x, y)) or x == 0 or y == 0:
            return NAN
        return -INF if negative(x) != negative(y) else INF
    product = Fraction(x) * Fraction(y)
    return product if product or negative(x) == negative(y) else NEGATIVE_ZERO


def fma(x: Number, y: Number, z: Number, type: Type) -> Number:
    return nearest(add(multiply(x, y), z), type)


def exponent(x: Number, type: Type) -> int:
    """Of a finite number other than zero, as it is stored: a subnormal has the smallest normal number's."""
    return max(floor_log2(Fraction(x)), FORMATS[type].lowest)


def tensor_core(a: Sequence[Number], b: Sequence[Number], c: Number, step: TensorCore, dtype: Type) -> Number:
    """One fused sum: c and the products a[i] * b[i]."""
    terms = [(c, exponent(c, step.accumulator) if c and not isinstance(c, float) else step.zero_exponent)]
    for x, y in zip(a, b, strict=True):
        p = multiply(x, y)
        terms.append((p, exponent(x, dtype) + exponent(y, dtype) if p and not isinstance(p, float) else step.zero_exponent))
    special = [t for t, _ in terms if isinstance(t, float) and t != 0]
    if special:
        return sum(special)
    unit = Fraction(2) ** (max(e for _, e in terms) - step.fraction_bits)
    total = sum((int(Fraction(t) / unit) * unit for t, _ in terms), ZERO)  # int() truncates toward zero
    if step.accumulator == "fp32":
        return toward_zero(total, "fp32")
    rounded = nearest(total, "fp16")
    return rounded if rounded else ZERO


@dataclass
class Element:
    """Everything that one output is computed from."""

    dtype: Type
    x: list[Number]
    w: list[Number]
    scales: list[Number]
    group: list[int]
    bias: Number

    def output(self, tree: Node, rule: Output) -> Number:
        y = nearest(self.value(tree), self.dtype)
        if rule.bias == "fused":
            return fma(y, self.scales[0], self.bias, self.dtype)
        if rule.scale:
            y = nearest(multiply(y, self.scales[0]), self.dtype)
        return nearest(add(y, self.bias), self.dtype) if rule.bias == "added" else y

    def value(self, node: Node) -> Number:
        match node:
            case Chain():
                return self.chain(node)
            case Round():
                return nearest(self.value(node.node), node.type)
            case Join():
                total = self.value(node.parts[0])
                for part in node.parts[1:]:
                    total = nearest(add(total, self.value(part)), node.type)
                return total
            case Unordered():
                assert len(node.parts) <= 2
                total = ZERO
                for part in node.parts:
                    v = self.value(part)
                    v = nearest(multiply(v, self.scales[0]), node.type) if node.scaled else v
                    total = nearest(add(total, v), node.type)
                return total
        raise AssertionError(node)

    def chain(self, node: Chain) -> Number:
        k, step = unfold(node.walk).tolist(), node.step
        total: Number = ZERO
        for i in range(0, len(k), step.terms):
            x, w = ([v[j] for j in k[i : i + step.terms]] for v in (self.x, self.w))
            match step:
                case TensorCore():
                    total = tensor_core(x, w, total, step, self.dtype)
                case Fma():
                    total = fma(x[0], w[0], total, step.accumulator)
                case HalfDot():
                    low, high = ZERO, ZERO
                    for j in range(0, step.terms, 2):
                        low, high = fma(x[j], w[j], low, "fp16"), fma(x[j + 1], w[j + 1], high, "fp16")
                    total = fma(nearest(add(low, high), "fp32"), self.scales[self.group[k[i]]], total, "fp32")
        return total


def run(recipe: Recipe, x: Any, w: Any, scales: Any, group: Any, bias: Any) -> np.ndarray:
    """y uint16 [M, N]; operands as bits: x [M, K], w [K, N], scales [G, N], bias [N]."""
    numbers = {b: decode(b, recipe.dtype) for a in (x, w, scales, bias) for b in np.unique(a).tolist()}
    y = np.zeros((recipe.M, recipe.N), np.uint16)
    for region in recipe.regions:
        for n in (n for c in region.columns for n in range(*c)):
            column, scale = ([numbers[b] for b in a[:, n].tolist()] for a in (w, scales))
            for m in range(*region.rows):
                row = [numbers[b] for b in x[m].tolist()]
                e = Element(recipe.dtype, row, column, scale, group.tolist(), numbers[int(bias[n])])
                y[m, n] = encode(e.output(region.tree, region.output), recipe.dtype)
    return y
