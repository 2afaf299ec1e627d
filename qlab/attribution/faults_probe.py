"""Inputs that show a fault: one-hot rows for the weight, sums that cancel for the arithmetic, and some of every other kind.

A rounding of one part in 2^24 is lost in an output of 11 bits, unless the sum is as small as its roundings. So some inputs
are solved for: within each set of k half of x is drawn at random, and the other half, in two steps, takes away what the first
one leaves in a few columns, down to the last bits of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.attribution.rewrites import has
from qlab.inputs import one_hot_rows, random_activations
from qlab.recipe import Chain, HalfDot, Recipe, nodes, unfold
from qlab.replay.operands import DTYPES, decode, row_order
from qlab.weights import Int4Weight, round_once

SLAB = 16
"""Columns side by side in which the sums cancel."""
LARGEST = 2.0**15
"""What no sum of absolute products of an input exceeds, in fp16."""


@dataclass(frozen=True, eq=False)
class Probe:
    """x [M, K] and what it is."""

    kind: str
    x: Tensor


def slab(n: int, seed: int) -> tuple[int, int]:
    """The columns in which sums cancel, as a range."""
    width = min(SLAB, n)
    start = int(torch.randint(0, n // width, (1,), generator=torch.Generator().manual_seed(seed))) * width
    return start, start + width


def probes(recipe: Recipe, weight: Int4Weight, seed: int) -> Iterator[Probe]:
    """Inputs of every kind but one-hot rows, those that show most first; other inputs for another seed."""
    columns = torch.arange(*slab(weight.N, seed))
    spread = torch.arange(0, weight.N, max(1, weight.N // SLAB))
    w, summed = multiplied(recipe, weight), _summed(recipe, weight).abs()
    dtype, shape = DTYPES[recipe.dtype], (recipe.M, recipe.K)
    chains, steps = _sets(recipe, weight)
    whole = [torch.arange(recipe.K)[None]]

    def cancel(sets: list[Tensor], where: Tensor) -> Callable[[int], Tensor]:
        return lambda s: _fitted(cancelling(w, sets, where, recipe.M, dtype, s), summed, dtype)

    makers: tuple[tuple[str, Callable[[int], Tensor]], ...] = (
        ("each chain cancels", cancel(chains, columns)),
        ("the whole sum cancels", cancel(whole, columns)),
        ("each fused sum cancels", cancel(steps, columns)),
        *_exact_dots(recipe, weight, columns),
        ("Gaussian", lambda s: random_activations(*shape, dtype=dtype, seed=s)),
        ("the whole sum cancels in columns far apart", cancel(whole, spread)),
        ("wide exponents", lambda s: _fitted(_wide(*shape, s), summed, dtype)),
        ("integers", lambda s: torch.randint(-8, 9, shape, generator=_generator(s)).to(dtype)),
        ("all ones", lambda s: torch.ones(shape, dtype=dtype)),
        ("large", lambda s: _fitted(_gaussian(*shape, s), summed, dtype)),
        ("small", lambda s: (_gaussian(*shape, s) * 2.0**-14).to(dtype)),
    )
    for number, (kind, make) in enumerate(makers):
        yield Probe(kind, make(1000 * seed + number))


def _gaussian(m: int, k: int, seed: int) -> Tensor:
    return random_activations(m, k, dtype=torch.float16, seed=seed).double()


def _wide(m: int, k: int, seed: int) -> Tensor:
    """Exponents from anywhere within 24 binades."""
    return _gaussian(m, k, seed) * torch.pow(2.0, torch.randint(-24, 1, (m, k), generator=_generator(seed)).double())


def multiplied(recipe: Recipe, weight: Int4Weight) -> Tensor:
    """The weight as the recipe decodes it, its scale in it: float64 [K, N]."""
    w = _summed(recipe, weight)
    return w * weight.scales.double()[weight.group_index.long()] if recipe.weights == "integer" else w


def _summed(recipe: Recipe, weight: Int4Weight) -> Tensor:
    """The same as it is summed, perhaps before its scale."""
    return decode(recipe, weight.codes, weight.zeros, weight.scales, weight.group_index).double()


def one_hot(recipe: Recipe, power: int) -> Iterator[Tensor]:
    """Rows of the identity times ``2 ** power``, M at a time, the last filled up with zeros: x [M, K]."""
    for start in range(0, recipe.K, recipe.M):
        stop = min(start + recipe.M, recipe.K)
        x = torch.zeros((recipe.M, recipe.K), dtype=DTYPES[recipe.dtype])
        x[: stop - start] = one_hot_rows(start, stop, recipe.K, dtype=DTYPES[recipe.dtype]) * 2.0**power
        yield x


def _exact_dots(recipe: Recipe, weight: Int4Weight, columns: Tensor) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """For ExLlama's fp16 dots, whose own roundings hide all others: x of few bits, one for each dot, so that dots are exact."""
    if not has(recipe, HalfDot):
        return
    size = HalfDot().terms
    order = row_order(recipe, weight)
    rows = (torch.arange(recipe.K) if order is None else order).reshape(-1, size)
    whole, dtype = [torch.arange(len(rows))[None]], DTYPES[recipe.dtype]
    w, summed = multiplied(recipe, weight)[rows].sum(1), _summed(recipe, weight).abs()

    def make(seed: int) -> Tensor:
        few = cancelling(w, whole, columns, recipe.M, dtype, seed, bits=5, levels=4, share=16)
        x = torch.empty((recipe.M, recipe.K), dtype=torch.float64)
        x[:, rows.reshape(-1)] = few.repeat_interleave(size, 1)
        return _fitted(x, summed, dtype)

    yield "exact dots cancel", make


def one_hot_power(weight: Int4Weight, bias: Tensor | None) -> int:
    """By how much one-hot rows are scaled: with a bias so that it hides few bits of a weight, otherwise not at all."""
    if bias is None:
        return 0
    largest = max(16 * float(weight.scales.abs().max()), 16.0)  # integer weights are up to 16 before their scale
    return max(0, int(math.log2(LARGEST / largest)))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sets(recipe: Recipe, weight: Int4Weight) -> tuple[list[Tensor], list[Tensor]]:
    """The k of each chain of the first sum, and of each of its fused sums: int64 [sets, size] for every size."""
    order = row_order(recipe, weight)
    chains: dict[int, list[Tensor]] = {}
    steps: dict[int, list[Tensor]] = {}
    for node in nodes(recipe.regions[0].tree):
        if isinstance(node, Chain) and node.walk:
            k = torch.from_numpy(unfold(node.walk)).long()
            k = k if order is None else order[k]
            chains.setdefault(len(k), []).append(k)
            size = max(node.step.terms, 8)
            if len(k) % size == 0:
                steps.setdefault(size, []).extend(k.reshape(-1, size).unbind(0))
    return [torch.stack(s) for s in chains.values()], [torch.stack(s) for s in steps.values()]


def cancelling(
    w: Tensor,
    sets: list[Tensor],
    columns: Tensor,
    m: int,
    dtype: torch.dtype,
    seed: int,
    *,
    bits: int = 0,
    levels: int = 2,
    share: int = 8,
) -> Tensor:
    """x float64 [m, K] whose products with w float64 [K, N] nearly cancel in some ``columns`` within every set of k [S, size].

    Of as many bits as ``dtype`` has, or of ``bits``; to be scaled by a power of two. As many columns as size / ``share``, at
    least one. Half of a set is drawn at random, the rest takes away what is left in ``levels`` steps; sets too small for the
    steps take random values.
    """
    g = _generator(seed)
    x = torch.zeros((m, len(w)), dtype=torch.float64)
    for k in sets:
        size = k.shape[1]
        k = k.gather(1, torch.rand(k.shape, generator=g).argsort(1))
        take = columns[: max(1, size // share)]
        step = size // (2 * levels)
        drawn, *parts = k.split([size - levels * step, *[step] * levels], 1)
        values = random_activations(m, drawn.numel(), dtype=torch.float16, seed=seed + 1).double()
        x[:, drawn.reshape(-1)] = _rounded(values, dtype, bits)
        left = torch.einsum("msk,skc->msc", x[:, drawn], w[drawn][..., take])
        for part in parts if step else ():
            a = w[part][..., take]  # [S, step, c]
            found = -torch.einsum("msc,sck->msk", left, torch.linalg.pinv(a))
            found = _rounded(found.clamp(-512, 512), dtype, bits)
            x[:, part.reshape(-1)] = found.reshape(m, -1)
            left = left + torch.einsum("msk,skc->msc", found, a)
    return x


def _rounded(x: Tensor, dtype: torch.dtype, bits: int) -> Tensor:
    """To a number of ``dtype``, or of so many bits; float64."""
    if not bits:
        return round_once(x, dtype).double()
    fraction, exponent = torch.frexp(x)
    return torch.ldexp((fraction * 2**bits).round(), exponent - bits)


def _fitted(x: Tensor, summed: Tensor, dtype: torch.dtype) -> Tensor:
    """x times the power of two that brings its sums of absolute products just below :data:`LARGEST`."""
    most = float((x.abs() @ summed).max())
    power = math.floor(math.log2(LARGEST / most)) if most else 0
    largest = float(x.abs().max()) or 1.0
    power = min(power, math.floor(math.log2(LARGEST / largest)))
    return round_once(x * 2.0**power, dtype)
