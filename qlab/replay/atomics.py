"""What a sum left to atomics can become: every reachable result, or, for many addends, an interval and sampled orders."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.recipe import Output, Recipe, Tile, Unordered
from qlab.replay import replay
from qlab.replay.operands import bits, values
from qlab.replay.step import Bits16
from qlab.weights import Int4Weight

EXACT_ADDENDS = 16
"""Up to so many addends the set of results is computed whole."""


@dataclass(frozen=True)
class Reachable:
    """Results that some order of the additions gives for one output."""

    addends: int
    exact: bool
    """True where ``values`` is every reachable result; False where it holds those of sampled orders."""
    values: tuple[float, ...]
    """Ascending, NaN last. Zero is +0: the sum starts there, and no addition of other numbers to it gives -0."""
    low: float
    high: float
    """No order leaves this interval, but for NaN: the extremes where ``exact``, else a bound from the roundings."""

    def holds(self, y: float) -> bool:
        """Whether an output can have come from some order; -0 never can. NaN can where neither end of a bound is finite."""
        if math.isnan(y):
            return any(map(math.isnan, self.values)) if self.exact else math.isinf(self.low) and math.isinf(self.high)
        if y == 0 and math.copysign(1, y) < 0:
            return False
        return y in self.values if self.exact else self.low <= y <= self.high


def addends(recipe: Recipe, x: Tensor, weight: Int4Weight) -> list[tuple[slice, slice, Tensor]]:
    """(rows, columns, parts [P, rows, columns]) of each region whose sum is unordered, the parts as they are added."""
    found = []
    for region in recipe.regions:
        if not isinstance(region.tree, Unordered):
            continue
        node = region.tree
        output = Output(scale=node.scaled)
        parts = []
        for part in node.parts:
            tile = Tile((0, recipe.M), (0, recipe.N), part, output)
            alone = Recipe.of(recipe.M, recipe.K, recipe.N, recipe.dtype, [tile], weights=recipe.weights, rows=recipe.rows)
            parts.append(replay(alone, x, weight))
        every = torch.stack(parts)
        for columns in region.columns:
            found.append((slice(*region.rows), slice(*columns), every[:, slice(*region.rows), slice(*columns)]))
    return found


def reachable(parts: Tensor, seed: int = 0, samples: int = 1000) -> Reachable:
    """Results of adding ``parts`` [P] (fp16 or bf16) onto zero in some order, each addition rounded to their dtype."""
    if parts.ndim != 1 or parts.dtype not in (torch.float16, torch.bfloat16):
        raise QlabError(f"parts must be fp16 or bf16 [P], not {parts.dtype} {list(parts.shape)}")
    parts, n = parts.detach().cpu(), len(parts)
    if n <= EXACT_ADDENDS:
        results = _ascending(_every(parts))
        numbers = [v for v in results if not math.isnan(v)] or [math.nan]
        return Reachable(n, True, results, numbers[0], numbers[-1])
    order = np.random.default_rng(seed)
    permuted = torch.stack([parts[torch.from_numpy(order.permutation(n))] for _ in range(samples)])  # [S, P]
    total = torch.zeros(samples, dtype=parts.dtype)
    for i in range(n):
        total = total + permuted[:, i]
    return Reachable(n, False, _ascending(total), *_bounds(parts.double().tolist(), torch.finfo(parts.dtype)))


def _bounds(parts: list[float], kind: torch.finfo) -> tuple[float, float]:
    """With u half a last place of 1, an exact partial sum lies between the sums of the negative and of the positive parts.

    If it is at most A, the n-th computed one errs by at most A * ((1 + u)^n - 1): each addition by u times what it gives.
    """
    if not all(map(math.isfinite, parts)):
        return -math.inf, math.inf
    least, most, exact = math.fsum(min(p, 0) for p in parts), math.fsum(max(p, 0) for p in parts), math.fsum(parts)
    slack = max(most, -least) * math.expm1(len(parts) * math.log1p(kind.eps / 2)) * (1 + 1e-9)
    low = -math.inf if least - slack < kind.min else exact - slack
    return low, math.inf if most + slack > kind.max else exact + slack


def _ascending(results: Tensor) -> tuple[float, ...]:
    found = {float(v) for v in results.double().unique()}
    return (*sorted(v for v in found if not math.isnan(v)), *[math.nan] * any(map(math.isnan, found)))


def _every(parts: Tensor) -> Tensor:
    """All results, by subsets of growing size: a state is (which parts are in, bits of their sum), 16 bits each."""
    every_number = np.arange(1 << 16).astype(np.uint16)
    tables = [_plus(every_number, p) for p in parts] if len(parts) > 10 else []  # there are more states than numbers then
    states = np.zeros(1, np.uint32)
    for _ in parts:
        grown = []
        for i, part in enumerate(parts):
            without = states[(states >> (16 + i)) & 1 == 0]
            sums = without.astype(np.uint16)
            total = tables[i][sums] if tables else _plus(sums, part)
            grown.append((without & 0xFFFF0000) | np.uint32(1 << (16 + i)) | total)
        states = np.sort(np.concatenate(grown))
        states = states[np.append(True, states[1:] != states[:-1])]  # np.unique hashes, which takes longer
    return values(states.astype(np.uint16), parts.dtype)


def _plus(sums: Bits16, part: Tensor) -> Bits16:
    total = values(sums, part.dtype) + part
    return bits(torch.where(total.isnan(), math.nan, total))
