"""Single rows of a problem, without the others: a kernel's row r depends on row r of x, on its place and on nothing else.

A recipe says so by itself: its regions are rectangles, and no tree reads another row. What r and M decide is which tree sums
the row, so a verifier who knows (r, M) needs one row of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.recipe import Recipe, Tile
from qlab.replay import Decoded, Prepared
from qlab.replay.atomics import addends, reachable
from qlab.replay.operands import bits
from qlab.weights import Int4Weight

STAGES = ((2, 4), (14, 64))
"""Orders of atomics to replay, then outputs per row whose reachable set is computed; the second stage for rows that pass."""
MANY, FEW_OUTPUTS = 10, 4
"""With more than ``MANY`` addends one reachable set takes long, and ``FEW_OUTPUTS`` per row must do."""


def at_rows(recipe: Recipe, rows: Sequence[int]) -> Recipe:
    """The recipe for x [len(rows), K] whose row i is summed as row ``rows[i]`` of ``recipe`` is.

    Raises QlabError for a row outside of the recipe's 0 to M - 1, and for no row.
    """
    if not len(rows):
        raise QlabError("there is no row to restrict the recipe to; name one")
    bad = next((r for r in rows if not 0 <= r < recipe.M), None)
    if bad is not None:
        raise QlabError(f"row {bad} is not among the {recipe.M} rows of the problem")
    tiles = [
        Tile((i, i + 1), columns, region.tree, region.output)
        for i, r in enumerate(rows)
        for region in recipe.regions
        if region.rows[0] <= r < region.rows[1]
        for columns in region.columns
    ]
    return Recipe.of(len(rows), recipe.K, recipe.N, recipe.dtype, tiles, weights=recipe.weights, rows=recipe.rows)


@dataclass(frozen=True)
class Outside:
    """An output that no order of the additions gives."""

    row: int
    column: int
    low: float
    """Smallest result that is reachable, or a bound of it."""
    high: float


def outside(recipe: Recipe, x: Tensor, weight: Int4Weight, y: Tensor, decoded: Decoded | None = None) -> dict[int, Outside]:
    """By row of y [M, N]: an output that the kernel's atomics cannot have given for x [M, K]; empty where none was found.

    Whatever is named here is certain. What is not named may have come from some order: outputs that one of a few orders gave
    are reached, and of each row's others some are examined (:data:`STAGES`). Sums that are not left to atomics must agree in
    every bit.
    """
    decoded = Decoded(recipe, weight, device=x.device) if decoded is None else decoded
    found: dict[int, Outside] = {}
    rows, seed = list(range(recipe.M)), 0
    left = torch.ones(y.shape, dtype=torch.bool)
    for orders, outputs in STAGES:
        part = at_rows(recipe, rows)
        prepared = Prepared(part, decoded)
        for _ in range(1 if part.ordered else orders):
            again = prepared.run(x[rows], seed).cpu()
            left[rows] &= _differs(again, y[rows])
            seed += 1
        some = [i for i, row in enumerate(rows) if bool(left[row].any())]
        if not some:
            return found
        numbers = [rows[i] for i in some]
        beyond = _beyond(at_rows(part, some), x[numbers], weight, y[numbers], left[numbers], again[some], outputs)
        found |= {numbers[i]: replace(o, row=numbers[i]) for i, o in beyond.items()}
        rows = [row for row in numbers if row not in found]
        if not rows:
            break
    return found


def _beyond(
    recipe: Recipe, x: Tensor, weight: Int4Weight, y: Tensor, left: Tensor, again: Tensor, outputs: int
) -> dict[int, Outside]:
    """:func:`outside` of the outputs ``left``; ``again`` is one replay."""
    found: dict[int, Outside] = {}
    parts = [(rows, columns, every) for rows, columns, every in addends(recipe, x, weight) if every.shape[0] > 2]
    fixed = left.clone()
    for rows, columns, _ in parts:
        fixed[rows, columns] = False
    for row, column in fixed.nonzero().tolist():  # one result, and it is another
        found.setdefault(row, Outside(row, column, float(again[row, column]), float(again[row, column])))
    for rows, columns, every in parts:
        count = outputs if every.shape[0] <= MANY else min(outputs, FEW_OUTPUTS)
        for row in range(*rows.indices(recipe.M)):
            for column in left[row, columns].nonzero().flatten().tolist()[:count]:
                if row in found:
                    break
                reach = reachable(every[:, row - rows.start, column], samples=1)
                if not reach.holds(float(y[row, columns.start + column])):
                    found[row] = Outside(row, columns.start + column, reach.low, reach.high)
    return found


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Where bits differ, any NaN being another's equal."""
    return torch.from_numpy(bits(a) != bits(b)) & ~(a.cpu().isnan() & b.cpu().isnan())
