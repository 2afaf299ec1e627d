"""Inputs that any device makes again bit for bit: random numbers are a hash of their place, in exact integer arithmetic.

PyTorch's generators differ between the CPU and a GPU, and the CPU takes seconds for a layer of a real model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.weights import DTYPES, Int4Weight, sequential_groups

MASK = (1 << 32) - 1
MULTIPLIER = 0x45D9F3B
"""Below 2^27, so that no product leaves int64."""
STRETCH = 1 << 25
"""Numbers hashed at once, which bounds the memory."""


@dataclass(frozen=True)
class Trial:
    """One call: a weight and x, made by :func:`weight` and :func:`activations`."""

    M: int
    K: int
    N: int
    group_size: int
    """-1 for whole-column scales."""
    dtype: str
    form: str
    """``awq`` (asymmetric), ``gptq`` (symmetric) or ``act_order`` (symmetric, rows of a group scattered)."""
    values: str
    """``plain``; ``wide``, exponents that differ by row and column; or ``cancel``, sums that nearly vanish."""
    seed: int
    """Trials that agree in everything but M share their weight."""

    def __str__(self) -> str:
        shape = f"M={self.M} K={self.K} N={self.N} g={self.group_size}"
        return f"{shape} {self.dtype} {self.form} {self.values} seed={self.seed}"

    @property
    def products(self) -> int:
        return self.M * self.K * self.N

    def rows(self, m: int) -> Trial:
        return replace(self, M=m)


def mixed(places: Tensor, seed: int) -> Tensor:
    """A hash of each place, 0 to 2^32 - 1; places below 2^32 that are distinct stay so."""
    h = places ^ ((seed * 0x9E3779B1 + 0x7F4A7C15) & MASK)
    for _ in range(2):
        h = (((h >> 16) ^ h) * MULTIPLIER) & MASK
    return (h >> 16) ^ h


def hashed(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """int64 of ``shape``, the hashes of its places."""
    return mixed(torch.arange(math.prod(shape), device=device), seed).reshape(shape)


def shuffled(count: int, seed: int, device: torch.device) -> Tensor:
    """int64 [count], an order."""
    return torch.argsort(hashed((count,), seed, device), stable=True)


def power(exponent: Tensor) -> Tensor:
    """2 to an exponent of -126 to 127, fp32: put together, since not every device's ``pow`` is exact."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def weight(trial: Trial, device: torch.device) -> Int4Weight:
    """The trial's weight. A ``cancel`` weight's row K - 1 - k is its row k."""
    k, n, seed, dtype = trial.K, trial.N, 1_000 * trial.seed, DTYPES[trial.dtype]
    group = k if trial.group_size == -1 else trial.group_size
    groups = k // group
    codes = torch.empty((k, n), dtype=torch.uint8, device=device)
    step = max(1, STRETCH // n)
    for i, top in enumerate(range(0, k, step)):
        codes[top : top + step] = hashed((min(step, k - top), n), seed + 10 + i, device) >> 13 & 15
    symmetric = trial.form != "awq"
    zeros = (hashed((groups, n), seed + 1, device) >> 9 & 15).to(torch.uint8)
    if symmetric:
        zeros = torch.full_like(zeros, 8)
    h = hashed((groups, n), seed + 2, device)
    exponent = -6 - h % 3
    if trial.values == "wide":
        exponent = exponent - hashed((n,), seed + 3, device) % 9
    scales = ((1 + (h >> 12 & 1023).float() / 1024) * power(exponent)).to(dtype)
    if trial.values == "cancel":
        codes, zeros, scales = (torch.cat([t[: -(-len(t) // 2)], t[: len(t) // 2].flip(0)]) for t in (codes, zeros, scales))
    index = sequential_groups(k, group, device)
    if trial.form == "act_order":
        order = shuffled(k, seed + 4, device)
        codes, index = codes[order], index[order]
    return Int4Weight(codes.contiguous(), zeros.contiguous(), scales.contiguous(), index.contiguous())


def activations(trial: Trial, device: torch.device) -> Tensor:
    """x [M, K]: sums of four uniforms less their mean, exact before the one rounding; row by row the same for every M."""
    m, k, seed, dtype = trial.M, trial.K, 1_000 * trial.seed, DTYPES[trial.dtype]
    x = torch.empty((m, k), dtype=dtype, device=device)
    step = max(1, STRETCH // k)
    for top in range(0, m, step):
        rows = min(step, m - top)
        places = torch.arange(top * k, (top + rows) * k, device=device).reshape(rows, k)
        h = torch.stack([mixed(places, seed + 5), mixed(places, seed + 6)])
        total = ((h >> 16) + (h & 0xFFFF)).sum(0)
        value = (total - 2 * 65535).float() / 65536  # 19 bits, exact
        if trial.values == "wide":
            row = torch.arange(top, top + rows, device=device)
            value = value * power(row * 5 % 13 - 9)[:, None]
        x[top : top + rows] = value.to(dtype)
    if trial.values == "cancel":
        x[:, k // 2 :] = -x[:, : -(-k // 2)].flip(1)[:, -(k - k // 2) :]
        x.view(torch.int16)[:, ::37] ^= 1
        if trial.form == "act_order":
            x = x[:, shuffled(k, seed + 4, device)].contiguous()
    return x


def fingerprint(x: Tensor, w: Int4Weight) -> str:
    """64 bits of x and the weight by places and values, on whatever device they are: that the same inputs were made again."""
    total = 0
    for i, t in enumerate((x, w.codes, w.zeros, w.scales, w.group_index)):
        flat = t.contiguous().reshape(-1)
        flat = flat.view(torch.int16) if flat.is_floating_point() else flat
        for start in range(0, flat.numel(), STRETCH):
            part = flat[start : start + STRETCH].long() & 0xFFFF
            places = torch.arange(len(part), device=part.device) + (start + 977 * i)
            total += int(mixed(places ^ part << 16 & MASK, i).sum()) * (2 * i + 1)
    return f"{total & ((1 << 64) - 1):016x}"
