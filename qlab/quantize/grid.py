"""The grid of one group: which sixteen values its codes can stand for.

Scale and zero point come from the group's range. The scale is rounded to the stored dtype first; zero point and codes are then
chosen for the rounded scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qlab.errors import WeightError
from qlab.weights import ACTIVATION_DTYPES

TOP = 15
"""Largest 4-bit code."""
MIDDLE = 8
"""Zero point of symmetric weights, the only one that GPTQ's symmetric type (uint4b8) has."""


class Grid(NamedTuple):
    """``value = (code - zeros) * scales``, code 0 to 15; both tensors broadcast against the weights they serve."""

    scales: Tensor
    """fp16 or bf16 [..., N], at least the dtype's smallest normal number."""
    zeros: Tensor
    """uint8 [..., N]."""


def group_rows(k: int, group_size: int) -> int:
    """Rows per group; -1 means the whole column. Raises WeightError when K is not a multiple."""
    rows = k if group_size == -1 else group_size
    if rows <= 0 or k <= 0 or k % rows:
        raise WeightError(f"K={k} is not a multiple of the group size {group_size}; choose a divisor of K, or -1 for one group")
    return rows


def checked(w: Tensor, name: str = "") -> Tensor:
    """``w`` [K, N] in float64. Raises WeightError when it is not a finite floating-point matrix."""
    where = f"weight {name!r}: " if name else "weight: "
    if w.ndim != 2 or not w.is_floating_point():
        raise WeightError(f"{where}a quantizer takes a floating-point [K, N], not {w.dtype} {list(w.shape)}")
    bad = ~torch.isfinite(w)
    if bool(bad.any()):
        k, n = (int(i) for i in bad.nonzero()[0])
        raise WeightError(f"{where}(k, n) = ({k}, {n}) is not finite; repair the full-precision weight")
    return w.detach().double()


def bounds(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, each [G, N], of weights [G, rows, N]."""
    return groups.amin(1), groups.amax(1)


def choose(low: Tensor, high: Tensor, *, symmetric: bool, dtype: torch.dtype, zero_min: int = 1) -> Grid:
    """The grid that covers [low, high] and zero, elementwise over float64 tensors of one shape.

    Symmetric: zero point 8 and scale max(|low|, |high|) / 7.5, as GPTQ has it. Asymmetric: scale (high - low) / 15 and zero
    point ``RN(-low / scale)`` in ``zero_min`` to 15. AWQ holds 0 to 15 and GPTQ v1 holds 1 to 16, so the default 1 suits both;
    where it raises the zero point, the scale grows until the range is covered again.

    No scale is below the dtype's smallest normal number, so an all-zero group gets that scale and code = zero point = 8.
    Raises WeightError for a dtype that scales cannot have and for a range that overflows it.
    """
    if dtype not in ACTIVATION_DTYPES:
        raise WeightError(f"scales are torch.float16 or torch.bfloat16, not {dtype}")
    if zero_min not in (0, 1):
        raise WeightError(f"zero_min is 0 (AWQ, GPTQ v2) or 1 (AWQ and GPTQ v1), not {zero_min}")
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        scales = _rounded(2 * torch.maximum(-low, high) / TOP, dtype)
        return Grid(scales, torch.full_like(scales, MIDDLE, dtype=torch.uint8))
    scales = _rounded((high - low) / TOP, dtype)
    zeros = torch.round(-low / scales.double())
    raised = zeros < zero_min
    zeros = zeros.clamp(zero_min, TOP)
    cover = torch.maximum(high / (TOP - zeros).clamp(min=1), -low / zeros.clamp(min=1))
    scales = torch.where(raised, _rounded(cover, dtype), scales)
    zeros = torch.where((low == 0) & (high == 0), MIDDLE, zeros)
    return Grid(scales, zeros.to(torch.uint8))


def encode(w: Tensor, grid: Grid) -> Tensor:
    """Nearest code (ties to even) of each weight, uint8 of ``w``'s shape."""
    return (torch.round(w / grid.scales.double()) + grid.zeros.double()).clamp(0, TOP).to(torch.uint8)


def nearest(w: Tensor, grid: Grid) -> Tensor:
    """``decode(encode(w, grid), grid)`` in one go: the value each weight is rounded to, float64."""
    scales, zeros = grid.scales.double(), grid.zeros.double()
    steps = torch.round(w / scales)
    return steps.clamp_(-zeros, TOP - zeros).mul_(scales)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """What the codes stand for, exact in float64."""
    return (codes.double() - grid.zeros.double()) * grid.scales.double()


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scale.to(dtype).clamp(min=torch.finfo(dtype).tiny)
    if not bool(torch.isfinite(rounded).all()):
        raise WeightError(f"a group's range needs the scale {float(scale.max()):g}, which {dtype} cannot hold; use bfloat16")
    return rounded
