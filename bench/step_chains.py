"""Whole chains over K in one step or another, replayed or on a GPU's tensor core, and what they lose to truncation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.hardware import AMPERE, HOPPER, Step
from qlab.inputs import random_activations, random_weight
from qlab.quantize import rtn
from qlab.replay import native, probe
from qlab.replay.operands import bits, values
from qlab.replay.program import Program

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
K, GROUP = 4096, 128
ROWS, COLUMNS = 16, 128
"""Outputs of one data set: 2,048."""
WEIGHTS = ("normal", "uniform")
"""Normal weights, rounded to nearest, symmetric; or uniform codes under random scales, asymmetric."""
A100, F_ALONE, L_ALONE, H100 = "A100", "F of H100", "L of H100", "H100"
STEPS = {A100: AMPERE, F_ALONE: replace(AMPERE, fraction_bits=25), L_ALONE: replace(AMPERE, terms=16), H100: HOPPER}
"""Ampere's step and Hopper's, and what lies between them."""
Bits = NDArray[np.uint32]


@dataclass(frozen=True)
class Way:
    """One way to sum an output."""

    step: str
    """Key of STEPS."""
    pieces: int = 1
    """Equal contiguous pieces of K, a chain each, joined in fp32 from the first to the last."""
    permuted: bool = False
    """k in the order 0, 8, 1, 9, ... inside each 16."""


@dataclass(frozen=True, eq=False)
class Data:
    """One data set."""

    x: NDArray[np.uint16]
    """Bits [M, K]."""
    w: NDArray[np.uint16]
    """Bits [K, N], decoded."""
    dtype: str

    @classmethod
    def make(cls, seed: int, dtype: str, weights: str = "normal", m: int = ROWS, n: int = COLUMNS, k: int = K) -> Data:
        kind, group = DTYPES[dtype], min(GROUP, k)
        if weights == "normal":
            weight = rtn.quantize(random_activations(k, n, dtype=torch.float32, seed=2 * seed) / 64, group, True, kind)
        else:
            weight = random_weight(k, n, group, dtype=kind, seed=2 * seed)
        return cls(bits(random_activations(m, k, dtype=kind, seed=2 * seed + 1)), bits(weight.dequantize(kind)), dtype)

    @property
    def values(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """x and w as float64."""
        x, w = (values(t, DTYPES[self.dtype]).double().numpy() for t in (self.x, self.w))
        return x, w

    @cached_property
    def exact(self) -> NDArray[np.float64]:
        """x @ w [M, N]."""
        x, w = self.values
        return np.asarray(x @ w)


def accumulators(data: Data, way: Way) -> Bits:
    """What the chains leave in fp32 before any rounding to the output's dtype: bits uint32 [M, N]."""
    step, (m, k) = STEPS[way.step], data.x.shape
    n, length = data.w.shape[1], k // way.pieces
    order = np.arange(k, dtype=np.int32)
    if way.permuted:
        order = np.ascontiguousarray(order.reshape(-1, 2, 8).transpose(0, 2, 1).ravel())
    chains = [(0, 0, i * length, (i + 1) * length) for i in range(way.pieces)]
    ops = [chains[0], *(op for chain in chains[1:] for op in (chain, (1, 0, 0, 0)))]
    program = Program(
        order,
        np.array([(0, step.fraction_bits, step.terms, step.zero_exponent, 0, step.terms)], np.int32),
        np.array(ops, np.int32),
        np.array([(0, m, 0, n, 0, len(ops))], np.int32),
    )
    y, nothing = np.zeros((m, n), np.uint32), np.zeros(0, np.uint16)
    arrays = (program.order, program.steps, program.ops, program.regions)
    scales, group = np.zeros((0, n), np.uint16), np.zeros(0, np.int32)
    native.execute(data.x, data.w, scales, group, nothing, *arrays, data.dtype == "bf16", y)
    return y


def on_silicon(data: Data, instruction: probe.Shape, mma: Callable[..., Tensor] = probe.mma, device: str = "cuda") -> Bits:
    """The same by chains of one instruction, the accumulator handed from each to the next: bits uint32 [M, N].

    M is a multiple of 16 and N of 8; ``mma`` is :func:`qlab.replay.probe.mma` or stands in for it.
    """
    depth = probe.DEPTHS[instruction]
    x, w = (torch.from_numpy(t.view(np.int16)).to(device) for t in (data.x, data.w))
    (m, k), n = x.shape, w.shape[1]
    down, across = m // 16, n // 8
    a = x.reshape(down, 1, 16, k // depth, depth).permute(3, 0, 1, 2, 4)  # [steps, down, 1, 16, depth]
    b = w.reshape(k // depth, 1, depth, across, 8).permute(0, 1, 3, 2, 4)  # [steps, 1, across, depth, 8]
    c = torch.zeros((down * across, 16, 8), dtype=torch.int32, device=device)
    for own_a, own_b in zip(a, b, strict=True):
        left = own_a.expand(down, across, 16, depth).reshape(-1, 16, depth)
        right = own_b.expand(down, across, depth, 8).reshape(-1, depth, 8)
        c = mma(left, right, c, instruction, "fp32", DTYPES[data.dtype])
    y = c.reshape(down, across, 16, 8).permute(0, 2, 1, 3).reshape(m, n)
    return np.ascontiguousarray(y.cpu().numpy()).view(np.uint32)


def loss(data: Data, y: Bits) -> tuple[float, float]:
    """(sum of sign(exact) (exact - accumulator), sum of |exact|): their ratio is the loss.

    Not a mean of relative errors: an output near zero would outweigh all others.
    """
    short = np.sign(data.exact) * (data.exact - y.view(np.float32))
    return float(short.sum()), float(np.abs(data.exact).sum())


def predicted_loss(data: Data, step: Step) -> float:
    """The first of :func:`loss`'s sums by the closed form: at the end of each fused sum, where the exact sum lies there."""
    x, w = data.values
    m, n, chunks = len(x), w.shape[1], x.shape[1] // step.terms
    parts = x.reshape(m, chunks, step.terms).transpose(1, 0, 2) @ w.reshape(chunks, step.terms, n)
    sums = np.cumsum(parts, axis=0)  # [chunks, M, N]
    last_place = np.exp2(np.frexp(sums)[1] - 24.0)
    return float((last_place * np.sign(sums) * np.sign(data.exact)).sum()) * closed_form(step) * step.terms


def closed_form(step: Step) -> float:
    """Predicted loss per product, in last places of the accumulator: (1 - 2^-(F - 23)) / 2 / L."""
    return (1 - 2.0 ** -(step.fraction_bits - 23)) / 2 / step.terms
