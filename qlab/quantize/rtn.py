"""Round to nearest: every weight to the closest value of its group's grid. The baseline that AWQ and GPTQ must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.quantize.grid import Grid, bounds, checked, choose, encode, group_rows
from qlab.weights import Int4Weight, sequential_groups


def quantize(
    w: Tensor,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.float16,
    *,
    zero_min: int = 1,
    name: str = "",
) -> Int4Weight:
    """``w`` [K, N] of any floating dtype to the nearest codes, scales in ``dtype``; ``group_size`` -1 for whole columns.

    Raises WeightError when K is not a multiple of the group, w is not finite, or a scale overflows ``dtype``.
    """
    wide = checked(w, name)
    groups = wide.reshape(-1, group_rows(w.shape[0], group_size), w.shape[1])
    grid = choose(*bounds(groups), symmetric=symmetric, dtype=dtype, zero_min=zero_min)
    return on_grid(wide, grid, name=name)


def on_grid(w: Tensor, grid: Grid, *, input_scale: Tensor | None = None, name: str = "") -> Int4Weight:
    """Round float64 ``w`` [K, N] to a given grid [G, N] of consecutive groups of rows."""
    k, n = w.shape
    groups = w.reshape(grid.scales.shape[0], -1, n)
    codes = encode(groups, Grid(grid.scales[:, None], grid.zeros[:, None])).reshape(k, n)
    return Int4Weight(codes, grid.zeros, grid.scales, sequential_groups(k, groups.shape[1], w.device), input_scale, name)
