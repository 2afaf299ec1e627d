"""AWQ: enlarge the input channels that matter before rounding, and clip what does not pay (arXiv 2306.00978).

With a scale s per input channel the layer computes ``(x / s) Q(diag(s) W)``. A larger s makes the channel's own rounding error
smaller and, through the group's range, its neighbours' larger. Candidates are ``mean|x|^a`` for a in 0 to 1, and the same
divided by ``mean|w|^(1 - a)``, the form that AutoAWQ searches; the one with the least output error on real activations wins.
a = 0 of the first form is s = 1, so that on those activations the search never loses to plain rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qlab.errors import WeightError
from qlab.quantize.grid import Grid, bounds, checked, choose, group_rows, nearest
from qlab.quantize.rtn import on_grid
from qlab.quantize.statistics import Statistics, output_error
from qlab.weights import Int4Weight

RATIOS = 20
"""Values of a."""
SHRINK = tuple(1 - i / 20 for i in range(11))
"""Parts of a group's range that clipping tries."""


def search_scale(
    weights: Sequence[Tensor],
    statistics: Statistics,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    *,
    zero_min: int = 1,
) -> Tensor:
    """The input scale, float32 [K], for weights [K, N_i] that share an input; all ones when no scale does better.

    Its error is ``||X W - X diag(1/s) Q(diag(s) W)||^2`` summed over the unit, before clipping. Scales are normalised to
    ``sqrt(max * min) = 1``. Raises WeightError for weights that are not finite or not a multiple of the group.
    """
    w = torch.cat([checked(part) for part in weights], 1)
    size = group_rows(w.shape[0], group_size)
    if statistics.gram.shape[0] != w.shape[0]:
        raise WeightError(
            f"the weights have K={w.shape[0]}, their inputs {statistics.gram.shape[0]}; both must be of one layer"
        )
    best, least = torch.ones(w.shape[0], device=w.device), float("inf")
    for s in _candidates(w, statistics.mean_abs, group_size):
        groups = (w * s.double()[:, None]).reshape(-1, size, w.shape[1])
        grid = choose(*bounds(groups), symmetric=symmetric, dtype=dtype, zero_min=zero_min)
        difference = nearest(groups, _per_row(grid)).reshape(w.shape) / s.double()[:, None] - w
        error = float(output_error(difference, statistics.gram).sum())
        if error < least:
            best, least = s, error
    return best


def quantize_scaled(
    w: Tensor,
    gram: Tensor,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    *,
    input_scale: Tensor | None = None,
    clip: bool = True,
    zero_min: int = 1,
    name: str = "",
) -> Int4Weight:
    """``w`` [K, N], already multiplied by ``input_scale``, to the codes that the scaled input will meet.

    ``gram`` is ``X^T X`` [K, K] of the inputs before scaling; ``input_scale`` (float32 [K] or None) is kept with the weight.
    Clipping fits each group and column on its own, and a column takes it only where the whole column's error falls.
    """
    wide = checked(w, name)
    groups = wide.reshape(-1, group_rows(w.shape[0], group_size), w.shape[1])
    low, high = bounds(groups)
    plain = choose(low, high, symmetric=symmetric, dtype=dtype, zero_min=zero_min)
    if not clip:
        return on_grid(wide, plain, input_scale=input_scale, name=name)
    if input_scale is not None:
        gram = gram / torch.outer(input_scale.double(), input_scale.double())
    part = _best_shrink(groups, gram, symmetric, dtype, zero_min)
    clipped = choose(low * part, high * part, symmetric=symmetric, dtype=dtype, zero_min=zero_min)
    keep = _error(groups, clipped, gram) < _error(groups, plain, gram)
    grid = Grid(torch.where(keep, clipped.scales, plain.scales), torch.where(keep, clipped.zeros, plain.zeros))
    return on_grid(wide, grid, input_scale=input_scale, name=name)


def quantize_unit(
    weights: Sequence[Tensor],
    statistics: Statistics,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    *,
    clip: bool = True,
    zero_min: int = 1,
) -> list[Int4Weight]:
    """Search one scale for weights [K, N_i] that share an input, then scale, clip and round each."""
    s = search_scale(weights, statistics, group_size, symmetric, dtype, zero_min=zero_min)
    return [
        quantize_scaled(
            checked(w) * s.double()[:, None],
            statistics.gram,
            group_size,
            symmetric,
            dtype,
            input_scale=s,
            clip=clip,
            zero_min=zero_min,
        )
        for w in weights
    ]


def _candidates(w: Tensor, mean_abs: Tensor, group_size: int) -> Iterator[Tensor]:
    x = mean_abs.clamp(min=1e-4 * max(float(mean_abs.max()), 1e-30))
    magnitude = w.abs().reshape(-1, group_rows(w.shape[0], group_size), w.shape[1])
    share = magnitude / magnitude.amax(1, keepdim=True).clamp(min=1e-30)
    mean_w = share.reshape(w.shape).mean(1).clamp(min=1e-4)
    ratios = [i / RATIOS for i in range(RATIOS + 1)]
    for s in [x**a for a in ratios] + [x**a / mean_w ** (1 - a) for a in ratios]:
        yield (s / (s.max() * s.min()).sqrt()).float()


def _best_shrink(groups: Tensor, gram: Tensor, symmetric: bool, dtype: torch.dtype, zero_min: int) -> Tensor:
    """The part of each group's range [G, N] that gives the group's own inputs the least output error."""
    count, size, _ = groups.shape
    own = torch.stack([gram[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
    low, high = bounds(groups)
    best = torch.ones_like(low)
    least = torch.full_like(low, float("inf"))
    for part in SHRINK:
        grid = choose(low * part, high * part, symmetric=symmetric, dtype=dtype, zero_min=zero_min)
        difference = nearest(groups, _per_row(grid)) - groups
        error = (difference * (own @ difference)).sum(1)
        better = error < least
        best, least = torch.where(better, part, best), torch.where(better, error, least)
    return best


def _error(groups: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    return output_error((nearest(groups, _per_row(grid)) - groups).flatten(0, 1), gram)


def _per_row(grid: Grid) -> Grid:
    """A grid [G, N] in the shape that serves groups [G, rows, N]."""
    return Grid(grid.scales[:, None], grid.zeros[:, None])
