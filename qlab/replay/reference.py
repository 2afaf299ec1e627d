"""The reference engine: a recipe's tree interpreted in numpy, element by element, to be read beside the rules. Slow.

Values are float32 arrays [E], one per output element of a block; fp16 and bf16 values are held in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from qlab import hardware
from qlab.errors import UnsupportedError
from qlab.recipe import Chain, Fma, HalfDot, Join, Node, Opaque, Recipe, Region, Round, TensorCore, Type, Unordered, unfold
from qlab.replay.operands import DTYPES, Operands, bits, values
from qlab.replay.step import Bits16, fused_dot_add, half_dot_add
from qlab.weights import round_once

Float = NDArray[np.float32]
Double = NDArray[np.float64]
BLOCK = 1 << 21
"""Operand elements of one block: bounds the memory."""


def run(recipe: Recipe, x: Bits16, operands: Operands) -> Bits16:
    """y uint16 [M, N], bits, for x uint16 [M, K], bits. Raises UnsupportedError for atomics of three parts and opaque sums."""
    y = np.zeros((recipe.M, recipe.N), np.uint16)
    with np.errstate(invalid="ignore"):  # infinities and NaN are numbers like others
        for region in recipe.regions:
            for rows, columns in _blocks(region, recipe.K):
                y[rows, columns] = _Block(recipe, x[rows], operands, columns).output(region)
    return y


def _blocks(region: Region, k: int) -> Iterator[tuple[slice, slice]]:
    width = max(1, BLOCK // max(k, 1))
    for m in range(*region.rows):
        for start, stop in region.columns:
            for n in range(start, stop, width):
                yield slice(m, m + 1), slice(n, min(n + width, stop))


class _Block:
    """One row of x against some columns of the weight."""

    def __init__(self, recipe: Recipe, x: Bits16, operands: Operands, columns: slice) -> None:
        self.dtype = DTYPES[recipe.dtype]
        self.type: Type = recipe.dtype
        self.b = bits(operands.w[:, columns].t())  # [E, K]
        self.a = np.broadcast_to(x, self.b.shape)
        self.scales = operands.scales[:, columns].float().cpu().numpy()  # [G, E]
        self.bias = operands.bias[columns].float().cpu().numpy() if operands.bias.numel() else None
        self.group = operands.group.cpu().numpy()

    def output(self, region: Region) -> Bits16:
        y = _round(self.value(region.tree), self.type)
        if region.output.bias == "fused":
            return _bits(_fma(y, self.scales[0], self._bias(), self.type), self.dtype)
        if region.output.scale:
            y = self._scaled(y, self.type)
        if region.output.bias == "added":
            y = _round(y.astype(np.float64) + self._bias(), self.type)
        return _bits(y, self.dtype)

    def _scaled(self, y: Float, type: Type) -> Float:
        return _round(y.astype(np.float64) * self.scales[0], type)

    def _bias(self) -> Float:
        if self.bias is None:
            raise UnsupportedError("the recipe adds a bias and none was given")
        return self.bias

    def value(self, node: Node) -> Float:
        match node:
            case Chain():
                return self.chain(node)
            case Join():
                total = self.value(node.parts[0])
                for part in node.parts[1:]:
                    total = _round(total.astype(np.float64) + self.value(part), node.type)
                return total
            case Round():
                return _round(self.value(node.node), node.type)
            case Unordered() if len(node.parts) <= 2:
                total = np.zeros(len(self.b), np.float32)
                for part in node.parts:
                    addend = self._scaled(self.value(part), node.type) if node.scaled else self.value(part)
                    total = _round(total.astype(np.float64) + addend, node.type)
                return total
            case Unordered():
                raise UnsupportedError("the order of atomics is not fixed: replay one order of them with a seed")
            case Opaque():
                raise UnsupportedError(f"opaque: {node.name}")

    def chain(self, node: Chain) -> Float:
        k, step = unfold(node.walk), node.step
        a, b = self.a[:, k], self.b[:, k]
        match step:
            case TensorCore():
                rule = hardware.Step(step.fraction_bits, step.terms, step.zero_exponent, step.zero_exponent)
                if step.accumulator == "fp16":
                    return half_dot_add(a, b, np.zeros(len(a), np.uint16), rule).view(np.float16).astype(np.float32)
                return fused_dot_add(a, b, np.zeros(len(a), np.uint32), rule, self.dtype, "numpy").view(np.float32)
            case Fma():
                return _fma_chain(_floats(a, self.dtype), _floats(b, self.dtype), step.accumulator)
            case HalfDot():
                x, w = _floats(a, self.dtype), _floats(b, self.dtype)
                total = np.zeros(len(a), np.float32)
                for i in range(0, len(k), step.terms):
                    stretch = slice(i, i + step.terms)
                    low, high = (_fma_chain(x[:, stretch][:, j::2], w[:, stretch][:, j::2], "fp16") for j in (0, 1))
                    dot = _round(low.astype(np.float64) + high, "fp32")
                    total = _fma(dot, self.scales[self.group[k[i]]], total, "fp32")
                return total


def _fma_chain(x: Float, w: Float, type: Type) -> Float:
    total = np.zeros(len(x), np.float32)
    for i in range(x.shape[1]):
        total = _fma(x[:, i], w[:, i], total, type)
    return total


def _fma(x: Float, w: Float, total: Float, type: Type) -> Float:
    """RN(x * w + total), rounded once.

    The product of two floats is exact in float64 and its sum with a third is not always, so what that sum lost decides ties:
    the float64 sum is moved to the odd one of its neighbours (Boldo and Melquiond, IEEE TC 2008).
    """
    product, other = x.astype(np.float64) * w, total.astype(np.float64)
    s = product + other
    z = s - product
    lost = (product - (s - z)) + (other - z)  # Knuth's two-sum: s + lost is the exact sum
    odd = np.isfinite(s) & np.isfinite(lost) & (lost != 0) & (s.view(np.int64) & 1 == 0)
    toward = np.where((lost > 0) == (s > 0), 1, -1)  # a larger or a smaller magnitude
    return _round(np.where(odd, (s.view(np.int64) + toward).view(np.float64), s), type)


def _round(exact: Float | Double, type: Type) -> Float:
    """To nearest even, once; the values are exact, or odd where they are not."""
    wide = torch.from_numpy(np.ascontiguousarray(exact, np.float64))
    if type == "fp32":
        return wide.to(torch.float32).numpy()
    return round_once(wide, DTYPES[type]).to(torch.float32).numpy()


def _floats(b: Bits16, dtype: torch.dtype) -> Float:
    return values(b, dtype).to(torch.float32).numpy()


def _bits(y: Float, dtype: torch.dtype) -> Bits16:
    return np.where(np.isnan(y), np.uint16(0x7FFF), bits(torch.from_numpy(y).to(dtype)))
