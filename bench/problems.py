"""Problems that any machine makes again bit for bit from their parameters, and the native call for each.

Beside the families of ``bench/record_silicon.py`` there are three. ``wild`` and ``special`` take the whole exponent range of
the dtype, subnormals and zeros of both signs included; in ``wild`` weights are finite, in ``special`` they may overflow and
some rows of x hold infinities or NaN. ``cancel`` shows every order of summation: large terms cancel exactly over the whole sum
and leave small ones, which each partial sum rounds as it meets the large ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from bench.record_silicon import DTYPES, Case, make_activations, make_weight
from qlab.backends.registry import Kernel, Packed, Problem
from qlab.backends.vllm_marlin import Marlin
from qlab.errors import UnsupportedError
from qlab.inputs import random_activations
from qlab.recipe import Join, Recipe, nodes
from qlab.replay.atomics import reachable
from qlab.weights import Int4Weight

CHUNK = 32
"""Rows of k that ``cancel`` repeats: the unit in which every kernel deals k to its accumulators, or a part of it."""


@dataclass(frozen=True)
class Trial:
    """One call of a kernel: a weight, x and perhaps a bias, re-creatable by :func:`inputs`."""

    M: int
    K: int
    N: int
    group_size: int
    """-1 for whole-column scales."""
    dtype: str
    form: str
    """``awq`` (asymmetric), ``gptq`` (symmetric) or ``act_order`` (symmetric, rows of a group scattered)."""
    values: str
    """``plain``, ``wide`` or ``exact`` as in bench/record_silicon.py, ``wild``, ``special`` or ``cancel``."""
    seed: int
    """Trials that agree in everything but M and bias share their weight."""
    bias: bool = False

    def __str__(self) -> str:
        kind = f"{self.dtype} {self.form} {self.values}{' bias' if self.bias else ''}"
        return f"M={self.M} K={self.K} N={self.N} g={self.group_size} {kind} seed={self.seed}"

    def problem(self, weight: Int4Weight) -> Problem:
        return replace(Problem.of(weight, self.M), bias=self.bias)

    def outline(self) -> Problem:
        """The problem without its weight: all that a recipe asks for."""
        symmetric = self.form != "awq"
        zeros = (8, 8) if symmetric else (1, 15)
        group_size = self.K if self.group_size == -1 else self.group_size
        act_order = self.form == "act_order"
        return Problem(self.M, self.K, self.N, group_size, DTYPES[self.dtype], symmetric, act_order, *zeros, self.bias)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What one call is given, on the CPU."""

    weight: Int4Weight
    x: Tensor
    bias: Tensor | None


def inputs(trial: Trial) -> Inputs:
    """Weight, x and bias of a trial; the same bits on every machine."""
    seed, dtype = 100_000 * trial.M + trial.seed, DTYPES[trial.dtype]
    if trial.values in ("wild", "special"):
        x = wild(trial.M, trial.K, dtype, seed, highest=8 if (trial.values, dtype) == ("wild", torch.float16) else 127)
        if trial.values == "special":
            x = _with_specials(x, seed + 1)
    elif trial.values == "cancel":
        x = _cancelling(random_activations(trial.M, trial.K, dtype=dtype, seed=seed), seed + 1)
    else:
        x = make_activations(trial.values, trial.M, trial.K, trial.dtype, seed)
    bias = None
    if trial.bias:
        if trial.values in ("wild", "special"):
            bias = wild(1, trial.N, dtype, seed + 2)[0]
        else:
            bias = random_activations(1, trial.N, dtype=dtype, seed=seed + 2)[0]
    return Inputs(_weight(replace(trial, M=0, bias=False)), x, bias)


@lru_cache(maxsize=2)
def _weight(trial: Trial) -> Int4Weight:
    case = Case(trial.K, trial.N, trial.group_size, trial.dtype, trial.form, trial.values, trial.seed, ())
    if trial.values not in ("wild", "special", "cancel"):
        return make_weight(case)
    plain = make_weight(replace(case, values="plain"))
    if trial.values == "cancel":
        zeros, scales = (t[:1].expand_as(t).contiguous() for t in (plain.zeros, plain.scales))
        return replace(plain, codes=plain.codes[:CHUNK].repeat(trial.K // CHUNK, 1), zeros=zeros, scales=scales)
    dtype = plain.scales.dtype
    # 15 times a scale below 2^12 (2^124 in bf16) is finite. Each column has exponents of its own.
    highest = 127 if trial.values == "special" else 11 if dtype == torch.float16 else 123
    scales = wild(trial.N, plain.groups, dtype, trial.seed + 1, highest=highest).t().contiguous()
    smallest = torch.ones_like(scales, dtype=torch.int16).view(dtype)
    return replace(plain, scales=torch.where(scales == 0, smallest, scales))


def wild(rows: int, columns: int, dtype: torch.dtype, seed: int, *, highest: int = 127) -> Tensor:
    """[rows, columns] of ``dtype`` over its whole exponent range below 2^(highest + 1).

    A row's exponents lie near one of its own, every fourth row's anywhere; one element in 16 is zero, of either sign.
    """
    fraction_bits, offset, most = (10, 15, 30) if dtype == torch.float16 else (7, 127, 254)
    most = min(most, highest + offset)
    g = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    near = torch.randint(0, most + 1, (rows, 1), generator=g) + torch.randint(-9, 4, shape, generator=g)
    anywhere = torch.randint(0, most + 1, shape, generator=g)
    exponent = torch.where(torch.arange(rows)[:, None] % 4 == 3, anywhere, near.clamp(0, most))
    magnitude = (exponent << fraction_bits) + torch.randint(0, 1 << fraction_bits, shape, generator=g)
    magnitude = torch.where(torch.randint(0, 16, shape, generator=g) == 0, 0, magnitude)
    negative = torch.randint(0, 2, shape, generator=g)
    return (magnitude - (negative << 15)).to(torch.int16).view(dtype)


def _cancelling(x: Tensor, seed: int) -> Tensor:
    """x whose chunks of 32 k are large and in pairs that differ in sign alone, or, two in five, small and alone.

    Every chunk of a ``cancel`` weight is the same, so a pair's products sum to zero.
    """
    g = torch.Generator().manual_seed(seed)
    rows, count = len(x), x.shape[1] // CHUNK
    chunks = x.double().reshape(rows, count, CHUNK)
    order = torch.argsort(torch.randint(0, 1 << 40, (rows, count), generator=g), dim=1)
    large = 3 * count // 10 * 2
    power = torch.randint(-9, -3, (rows, count), generator=g).double()
    power.scatter_(1, order[:, :large], torch.randint(3, 8, (rows, large), generator=g).double())
    chunks = chunks * torch.pow(2.0, power)[:, :, None]
    first, second = (order[:, i:large:2, None].expand(-1, -1, CHUNK) for i in (0, 1))
    chunks.scatter_(1, second, -chunks.gather(1, first))
    return chunks.reshape(x.shape).to(x.dtype)


def _with_specials(x: Tensor, seed: int) -> Tensor:
    """x with an infinity in row 5 of every eight, a NaN in row 6 and infinities of both signs in row 7."""
    g = torch.Generator().manual_seed(seed)
    places = torch.randint(0, x.shape[1], (len(x), 2), generator=g)
    x = x.clone()
    for row in range(len(x)):
        first, second = places[row].tolist()
        if row % 8 == 5:
            x[row, first] = -torch.inf
        elif row % 8 == 6:
            x[row, first] = torch.nan
        elif row % 8 == 7:
            x[row, first], x[row, second] = torch.inf, -torch.inf
    return x


def not_modelled(kernel: str, trial: Trial, recipe: Recipe) -> str:
    """Why a recipe makes no claim for a trial; empty when it does."""
    if recipe.opaque:
        return recipe.opaque
    cut = any(isinstance(n, Join) for r in recipe.regions for n in nodes(r.tree))
    if kernel.startswith("vllm.machete") and cut and trial.dtype == "bf16" and trial.values in ("wild", "special"):
        return "Machete joins the pieces of a sum by additions that flush subnormal fp32 numbers"
    return ""


def possible(y: float, parts: Tensor) -> bool:
    """Whether some order of adding ``parts`` [P] gives y."""
    return reachable(parts).holds(y)


def call(kernel: Kernel, packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel's y. A bias is added inside the call, as Marlin alone does it."""
    if bias is None:
        return kernel.run(x, packed)
    if not isinstance(kernel, Marlin):
        raise UnsupportedError(f"{kernel.name} takes no bias")
    with torch.cuda.device_of(x):
        return kernel.gemm(x, packed, bias)
