"""How far two checkpoints of one model are apart: what is stored, and the weights in the original model's coordinates.

AWQ multiplies the rows of a weight by its input scale s, and where another linear makes that input, divides that one's columns
by it: ``x W = (x / s) (diag(s) W)``. Undone, two quantisations of one model can be subtracted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.checkpoint import Checkpoint
from qlab.errors import CheckpointError, WeightError
from qlab.quantize.fold import PROJECTIONS, UNITS
from qlab.weights import Int4Weight

SCHEMA = "qlab/weights-difference/1"
_FEEDS = {unit.previous: unit.members[0] for unit in UNITS if unit.previous in PROJECTIONS}
"""A projection whose columns are the input channels of another, to that one."""


@dataclass(frozen=True)
class LinearDifference:
    """Of one linear. Shares are of its weights (k, n), from 0 to 1; a group's zero point and scale count for all its rows."""

    name: str
    codes: float
    zeros: float
    scales: float
    relative_l2: float | None
    """``||W_b - W_a|| / ||W_a||`` (Frobenius) without rounding; None where the coordinates of one are not known."""
    elements: int = 0
    """K times N."""
    squares: tuple[float, ...] = ()
    """``||W_b - W_a||^2`` and ``||W_a||^2``, of which totals are made; empty where relative_l2 is None."""


@dataclass(frozen=True)
class WeightsDifference:
    """Of two checkpoints; linears that are stored alike are left out."""

    linears: tuple[LinearDifference, ...]
    dense: tuple[str, ...]
    """Other tensors (embeddings, norms) that differ."""
    input_scales: tuple[str, ...]
    """Linears whose AWQ input scales, kept beside the weights and read by no kernel, differ."""
    count: int
    """Linears of the model."""
    codes: float
    """Share of all codes that differ."""
    relative_l2: float | None
    """Over all linears together; None where it is so for one."""
    schema: str = SCHEMA

    @property
    def served_alike(self) -> bool:
        """Whether an engine that loads the two computes the same: every stored tensor of the model agrees."""
        return not self.linears and not self.dense

    def __str__(self) -> str:
        if self.served_alike:
            return "equal weights"
        parts = []
        if self.linears:
            size = "" if self.relative_l2 is None else f"relative L2 {self.relative_l2:.3g}, "
            parts.append(f"{size}{_percent(self.codes)} of codes differ, in {len(self.linears)} of {self.count} linears")
        if self.dense:
            parts.append(f"{len(self.dense)} other tensors differ ({self.dense[0]}{', ...' if len(self.dense) > 1 else ''})")
        return "; ".join(parts)


def weight_difference(
    a: Int4Weight, b: Int4Weight, columns_a: Tensor | None = None, columns_b: Tensor | None = None, *, known: bool = True
) -> LinearDifference:
    """Between two quantisations of one linear [K, N], groups of any size.

    ``columns_a`` and ``columns_b`` (float32 [N] or None) are the input scales of the linear that takes the columns as its
    channels; ``known`` False says that the coordinates are not. Raises WeightError for two shapes.
    """
    if a.codes.shape != b.codes.shape:
        raise WeightError(f"{a.name!r} is {list(a.codes.shape)} in A and {list(b.codes.shape)} in B; they must be one linear")
    rows_a, rows_b = a.group_index.long(), b.group_index.long()
    squares: tuple[float, ...] = ()
    if known:
        before = _original(a, columns_a)
        squares = (float((_original(b, columns_b) - before).square().sum()), float(before.square().sum()))
    return LinearDifference(
        a.name,
        _share(a.codes, b.codes),
        _share(a.zeros[rows_a], b.zeros[rows_b]),
        _share(a.scales[rows_a], b.scales[rows_b]),
        _ratio(squares),
        a.codes.numel(),
        squares,
    )


def difference(a: Checkpoint, b: Checkpoint) -> WeightsDifference:
    """Between two checkpoints of one architecture, one linear in memory at a time.

    Raises CheckpointError where they do not quantise the same linears, WeightError where these have other shapes.
    """
    if a.names() != b.names():
        name = sorted(set(a.names()) ^ set(b.names()))[0]
        raise CheckpointError(f"only one of {a.directory} and {b.directory} quantises {name!r}; name two of one model")
    dense = _dense(a, b)
    original = _scales_known(a) and _scales_known(b)
    every, linears, input_scales = [], [], []
    for name in a.names():
        ours, theirs = a.weight(name), b.weight(name)
        if not same_bits(ours.input_scale, theirs.input_scale):
            input_scales.append(name)
        if original:
            found = weight_difference(ours, theirs, _columns(a, name), _columns(b, name))
        else:  # with equal norms AWQ's scales are those of one search, so that the stored weights can be subtracted
            found = weight_difference(replace(ours, input_scale=None), replace(theirs, input_scale=None), known=not dense)
        every.append(found)
        if not stored_alike(ours, theirs):
            linears.append(found)
    total = sum(d.elements for d in every)
    squares = tuple(sum(side) for side in zip(*(d.squares for d in every), strict=True))
    return WeightsDifference(
        tuple(linears),
        dense,
        tuple(input_scales),
        len(every),
        sum(d.codes * d.elements for d in linears) / total,
        _ratio(squares),
    )


def stored_alike(a: Int4Weight, b: Int4Weight) -> bool:
    """Whether codes, zero points, scales and group index agree bit for bit; input scales are no kernel's."""
    return all(same_bits(getattr(a, p), getattr(b, p)) for p in ("codes", "zeros", "scales", "group_index"))


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """The same bits; -0 is not 0."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _original(weight: Int4Weight, columns: Tensor | None) -> Tensor:
    """The dequantised weight float64 [K, N] with AWQ's scales taken out of its rows and put back into its columns."""
    w = weight.dequantize(torch.float64)
    if weight.input_scale is not None:
        w /= weight.input_scale.double()[:, None]
    return w if columns is None else w * columns.double()


def _columns(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """The input scale of the linear that takes this one's columns as its channels, where they are as many."""
    for path, consumer in _FEEDS.items():
        if name.endswith(path):
            other = name.removesuffix(path) + consumer
            if other not in checkpoint.names():
                return None
            scale = checkpoint.weight(other).input_scale
            fits = scale is not None and len(scale) == checkpoint.weight(name).N
            return scale if fits else None
    return None


def _scales_known(checkpoint: Checkpoint) -> bool:
    """AWQ's scales stand beside the weights, or the method has none."""
    return checkpoint.method != "awq" or any(w.input_scale is not None for w in checkpoint.weights.values())


def _dense(a: Checkpoint, b: Checkpoint) -> tuple[str, ...]:
    names = dict.fromkeys((*a.others(), *b.others()))
    return tuple(n for n in names if not same_bits(*(_tensor(c, n) for c in (a, b))))


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """None where the checkpoint has none, or an all-zero bias, such as AutoGPTQ gives every linear."""
    if name not in checkpoint:
        return None
    found = checkpoint.tensor(name)
    return None if name.endswith(".bias") and not bool(found.any()) else found


def _share(a: Tensor, b: Tensor) -> float:
    return float((a != b).double().mean())


def _ratio(squares: tuple[float, ...]) -> float | None:
    if not squares:
        return None
    return math.sqrt(squares[0] / squares[1]) if squares[1] else (math.inf if squares[0] else 0.0)


def _percent(share: float) -> str:
    return "no share" if not share else f"{100 * share:.3g}%"
