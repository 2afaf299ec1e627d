"""Refusals shared by the layouts: each is one sentence that names the layout, the place and the mend."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from qlab.errors import PackingError, WeightError
from qlab.weights import ACTIVATION_DTYPES, Int4Weight, sequential_groups


def refuse(weight: Int4Weight, layout: str, reason: str) -> NoReturn:
    named = f" {weight.name!r}" if weight.name else ""
    raise PackingError(f"cannot pack weight{named} as {layout}: {reason}")


def multiples(weight: Int4Weight, layout: str, *, k: int = 1, n: int = 1) -> None:
    """Refuse a weight whose K is not a multiple of ``k`` or whose N is not one of ``n``."""
    for size, letter, unit in ((weight.K, "K", k), (weight.N, "N", n)):
        if size % unit:
            refuse(weight, layout, f"{letter}={size} is not a multiple of {unit}; pad the layer to {size + unit - size % unit}")


def zero_points(weight: Int4Weight, layout: str, low: int, high: int, mend: str) -> None:
    """Refuse zero points outside ``low`` to ``high``, naming the first one's group and column."""
    bad = (weight.zeros < low) | (weight.zeros > high)
    if bool(bad.any()):
        group, column = (int(i) for i in bad.nonzero()[0])
        held = f"only {low}" if low == high else f"{low} to {high}"
        refuse(
            weight,
            layout,
            f"zero point {int(weight.zeros[group, column])} at group {group}, column {column}, "
            f"but the layout holds {held}; {mend}",
        )


class Tensors:
    """Checks the packed tensors of one layer before they are unpacked."""

    def __init__(self, layout: str, name: str, first: Tensor) -> None:
        self.layout = layout
        self.name = name
        self.device = first.device

    def refuse(self, reason: str) -> NoReturn:
        named = f" of {self.name!r}" if self.name else ""
        raise PackingError(f"{self.layout} tensors{named}: {reason}")

    def matrix(self, label: str, t: Tensor, dtypes: tuple[torch.dtype, ...], rows: int | None, columns: int | None) -> None:
        """Refuse ``t`` unless it is a non-empty [rows, columns] of one of ``dtypes`` (None stands for any size)."""
        self._shape(label, t, dtypes, (rows, columns))

    def codes(self, label: str, t: Tensor, rows: int | None = None, columns: int | None = None) -> None:
        self.matrix(label, t, (torch.int32,), rows, columns)

    def scales(self, label: str, t: Tensor, rows: int | None = None, columns: int | None = None) -> None:
        self.matrix(label, t, ACTIVATION_DTYPES, rows, columns)

    def vector(self, label: str, t: Tensor, size: int) -> None:
        """Refuse ``t`` unless it is int32 [size]."""
        self._shape(label, t, (torch.int32,), (size,))

    def group_size(self, label: str, k: int, groups: int) -> int:
        """Rows per group of K rows; refused when the groups that ``label`` has do not divide K."""
        if k % groups:
            self.refuse(f"{label} has {groups} groups, which do not divide K={k}")
        return k // groups

    def group_index(self, label: str, t: Tensor, k: int, groups: int) -> None:
        """Refuse ``t`` unless it is int32 [k] and puts as many rows into each of the groups."""
        self.vector(label, t, k)
        size = self.group_size(label, k, groups)
        bad = (t < 0) | (t >= groups)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            self.refuse(f"{label} must be 0 to {groups - 1}, but row {row} holds {int(t[row])}")
        counts = torch.bincount(t.long(), minlength=groups)
        if bool((counts != size).any()):
            group = int((counts != size).nonzero()[0])
            self.refuse(f"{label} must put {size} rows into every group, but group {group} has {int(counts[group])}")

    def permutation(self, label: str, t: Tensor, k: int) -> None:
        """Refuse ``t`` unless it is int32 [k] and holds every row once."""
        self.vector(label, t, k)
        if not permutes(t):
            self.refuse(f"{label} must hold every row 0 to {k - 1} once")

    def weight(
        self,
        codes: Tensor,
        zeros: Tensor,
        scales: Tensor,
        group_index: Tensor | None,
        name: str,
        input_scale: Tensor | None,
    ) -> Int4Weight:
        """The unpacked weight, with scales and group index copied; None is a group index without act-order."""
        if group_index is None:
            group_index = sequential_groups(codes.shape[0], codes.shape[0] // scales.shape[0], codes.device)
        try:
            return Int4Weight(codes.contiguous(), zeros.contiguous(), copied(scales), copied(group_index), input_scale, name)
        except WeightError as error:
            raise PackingError(f"{self.layout} tensors do not unpack to a weight: {error}") from error

    def _shape(self, label: str, t: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
        fits = t.ndim == len(shape) and all(s > 0 and e in (None, s) for s, e in zip(t.shape, shape, strict=True))
        if t.dtype not in dtypes or not fits:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            wanted = ", ".join("any" if e is None else str(e) for e in shape)
            self.refuse(f"{label} must be {kinds} [{wanted}], not {str(t.dtype).removeprefix('torch.')} {list(t.shape)}")
        if t.device != self.device:
            self.refuse(f"{label} is on {t.device}, the codes are on {self.device}; move them to one device")


def permutes(t: Tensor) -> bool:
    """True when a one-dimensional tensor holds every index 0 to len - 1 once."""
    return torch.equal(t.long().sort().values, torch.arange(t.numel(), device=t.device))


def copied(t: Tensor) -> Tensor:
    """A contiguous copy: packed tensors and weights never share memory, so a change to one leaves the other as it was."""
    return t.clone(memory_format=torch.contiguous_format)
