"""What a sum left to atomics can become: every reachable result, or, for many addends, an interval and sampled orders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.errors import QlabError
from qlab.recipe import Output, Recipe, Tile, Unordered
from qlab.replay import replay
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
    """Ascending."""
    low: float
    high: float
    """No order leaves this interval: the extremes where ``exact``, else a bound from the roundings."""

    def holds(self, y: float) -> bool:
        """Whether an output can have come from some order."""
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
        results = _every(parts)
        return Reachable(n, True, tuple(results), min(results), max(results))
    order = np.random.default_rng(seed)
    permuted = torch.stack([parts[torch.from_numpy(order.permutation(n))] for _ in range(samples)])  # [S, P]
    total = torch.zeros(samples, dtype=parts.dtype)
    for i in range(n):
        total = total + permuted[:, i]
    wide = parts.double()
    positive, negative = float(wide.clamp(min=0).sum()), float(wide.clamp(max=0).sum())
    # Every intermediate sum lies between the two, so each addition errs by half a last place there at most, to first order.
    slack = n * torch.finfo(parts.dtype).eps / 2 * max(positive, -negative) * (1 + n * torch.finfo(parts.dtype).eps)
    exact = float(wide.sum())
    return Reachable(n, False, tuple(sorted({float(v) for v in total})), exact - slack, exact + slack)


def _every(parts: Tensor) -> list[float]:
    """All results, by subsets of growing size: a state is (which parts are in, what their sum is)."""
    n = len(parts)
    states: NDArray[np.int64] = np.zeros(1, np.int64)  # subset << 16 | bits of the sum
    for _ in range(n):
        grown = []
        for i in range(n):
            open_ = states[(states >> (16 + i)) & 1 == 0]
            total = torch.from_numpy((open_ & 0xFFFF).astype(np.uint16).view(np.int16)).view(parts.dtype) + parts[i]
            bits = total.view(torch.int16).numpy().view(np.uint16).astype(np.int64)
            grown.append(((open_ >> 16) | (1 << i)) << 16 | bits)
        states = np.unique(np.concatenate(grown))
    last = torch.from_numpy((states & 0xFFFF).astype(np.uint16).view(np.int16)).view(parts.dtype)
    return sorted({float(v) for v in last})
