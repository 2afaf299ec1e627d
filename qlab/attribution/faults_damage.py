"""What is solved for rather than listed: damaged codes, zero points and scales by place, and the group that each row takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qlab.attribution.fault import Fault
from qlab.attribution.faults_weight import MOST_DAMAGED, Reading, Tables, same
from qlab.weights import round_once, sequential_groups

CELLS = 4
"""Groups of a column that may hold damage."""
NEAR = 48
"""Units in the last place around the scale that a reading suggests."""
RANKS = (2, 4, 8)
"""Tensor-parallel ranks over which groups may straddle."""
CODE = "codes: a nibble is another"
ZERO = "zero points: one of them is another"
SCALE = "scales: one of them is another"
STRADDLED = "group index: groups straddle tensor-parallel ranks, each counts from its own first row"
SHIFTED = "group index: counted from another row"
OTHER_GROUPS = "group index: rows take other groups"


def damage(reading: Reading, t: Tables, got: Tensor) -> tuple[Tables, tuple[Fault, ...]] | None:
    """The tables with single codes, zero points and scales changed so that they show ``got`` [K, N]; None where none do."""
    wrong = ~same(reading.predict(t), got)
    places = wrong.nonzero()
    if not len(places):
        return t, ()
    cells = torch.stack((t.group_index[places[:, 0]].long(), places[:, 1]), 1).unique(dim=0)
    if len(cells) > CELLS:
        return None
    faults: list[Fault] = []
    for g, n in cells.tolist():
        rows = (t.group_index == g).nonzero()[:, 0]
        solved = _cell(reading, t, got[rows, n], rows, g, n, int(wrong[rows, n].sum()))
        if solved is None:
            return None
        t, found = solved
        faults += found
    return t, tuple(faults)


def _cell(
    reading: Reading, t: Tables, seen: Tensor, rows: Tensor, g: int, n: int, wrong: int
) -> tuple[Tables, list[Fault]] | None:
    """One group of one column: a parameter that all of its rows bear out, or else up to ``CELLS`` codes."""
    solvers = (_codes, _zero, _scale) if wrong <= 2 else (_zero, _scale, _codes)
    return next((s for solve in solvers if (s := solve(reading, t, seen, rows, g, n)) is not None), None)


def _shown(reading: Reading, codes: Tensor, zeros: Tensor, scales: Tensor, rows: Tensor, n: int) -> Tensor:
    """What rows of column ``n`` show for each of C candidates: codes [rows, C], zeros and scales [C]."""
    t = Tables(codes, zeros[None], scales[None], torch.zeros(len(codes), dtype=torch.int32))
    return reading.show(t, rows, torch.full((len(zeros),), n))


def _zero(reading: Reading, t: Tables, seen: Tensor, rows: Tensor, g: int, n: int) -> tuple[Tables, list[Fault]] | None:
    zeros = torch.arange(17, dtype=torch.uint8)
    codes = t.codes[rows, n][:, None].expand(-1, 17)
    shown = _shown(reading, codes, zeros, t.scales[g, n].expand(17), rows, n)
    fits = same(shown, seen[:, None]).all(0).nonzero()[:, 0].tolist()
    if not fits:
        return None
    changed, old = t.zeros.clone(), int(t.zeros[g, n])
    changed[g, n] = fits[0]
    return replace(t, zeros=changed), [Fault(ZERO, f"group {g}, n={n} has {fits[0]} instead of {old}")]


def _scale(reading: Reading, t: Tables, seen: Tensor, rows: Tensor, g: int, n: int) -> tuple[Tables, list[Fault]] | None:
    codes, old = t.codes[rows, n], t.scales[g, n]
    ratio = _ratio(reading, _shown(reading, codes[:, None], t.zeros[g, n][None], old[None], rows, n)[:, 0], seen, n)
    if ratio is None:
        return None
    near = round_once(old.double() * ratio, old.dtype).view(torch.int16)
    offsets = torch.arange(-NEAR, NEAR + 1, dtype=torch.int16)
    offsets = offsets[torch.argsort(offsets.abs(), stable=True)]
    scales = (near + offsets).view(old.dtype)
    scales = scales[torch.isfinite(scales) & (scales != 0)]
    count = len(scales)
    shown = _shown(reading, codes[:, None].expand(-1, count), t.zeros[g, n].expand(count), scales, rows, n)
    fits = same(shown, seen[:, None]).all(0).nonzero()[:, 0].tolist()
    if not fits:
        return None
    changed = t.scales.clone()
    changed[g, n] = scales[fits[0]]
    where = f"group {g}, n={n} has {float(scales[fits[0]]):.9g} instead of {float(old):.9g}"
    return replace(t, scales=changed), [Fault(SCALE, where)]


def _ratio(reading: Reading, want: Tensor, seen: Tensor, n: int) -> Tensor | None:
    """By what the scale must have been multiplied, from the row that shows it best: float64."""
    bias = 0.0 if reading.bias is None else float(reading.bias[n])
    clean = want.double() - bias
    at = int(clean.abs().argmax())
    return (seen[at].double() - bias) / clean[at] if float(clean[at]) else None


def _codes(reading: Reading, t: Tables, seen: Tensor, rows: Tensor, g: int, n: int) -> tuple[Tables, list[Fault]] | None:
    codes = torch.arange(16, dtype=torch.uint8).expand(len(rows), 16)
    shown = _shown(reading, codes, t.zeros[g, n].expand(16), t.scales[g, n].expand(16), rows, n)
    fits = same(shown, seen[:, None])
    own = fits.gather(1, t.codes[rows, n].long()[:, None])[:, 0]
    if int((~own).sum()) > CELLS or not bool(fits.any(1).all()):
        return None
    changed, faults = t.codes.clone(), []
    for i in (~own).nonzero()[:, 0].tolist():
        k, new, old = int(rows[i]), int(fits[i].int().argmax()), int(t.codes[rows[i], n])
        changed[k, n] = new
        faults.append(Fault(CODE, f"k={k}, n={n} holds code {new} instead of {old}"))
    return replace(t, codes=changed), faults


def regrouped(reading: Reading, t: Tables, got: Tensor, columns: Tensor) -> tuple[Tables, Fault] | None:
    """The tables with another group for some rows, so that ``got`` [K, len(columns)] is shown by all but a few columns."""
    groups, k = len(t.scales), len(t.codes)
    if groups == 1:
        return None
    agree = torch.empty((groups, k), dtype=torch.int64)
    for g in range(groups):
        one = replace(t, group_index=torch.full((k,), g, dtype=torch.int32))
        agree[g] = same(reading.predict(one, columns), got).sum(1)
    least = len(columns) - MOST_DAMAGED
    own = agree.gather(0, t.group_index.long()[None])[0] >= least
    if not bool((agree.max(0).values >= least).all()):
        return None
    index = torch.where(own, t.group_index, agree.argmax(0).to(torch.int32)).contiguous()
    if torch.equal(index, t.group_index):
        return None
    return replace(t, group_index=index), _layout(index, t.group_index, groups)


def layouts(k: int, size: int) -> Iterator[tuple[Fault, Tensor]]:
    """Ways to count groups of ``size`` rows from other rows than the first: the group of each row, int32 [k]."""
    groups, rows = k // size, torch.arange(k)
    for ranks in RANKS:
        share = k // ranks
        if k % ranks or share % size == 0:
            continue
        first = rows // share * share // size
        index = (first + rows % share // size).clamp(max=groups - 1)
        yield Fault(STRADDLED, f"{ranks} ranks of {share} rows, groups of {size}"), index.to(torch.int32)
    for by in (*range(1, size), *range(-1, -size, -1)):
        index = torch.div(rows + by, size, rounding_mode="floor")
        ahead = f"{abs(by)} rows {'later' if by > 0 else 'earlier'} than they lie"
        yield Fault(SHIFTED, f"as if rows were {ahead}"), index.clamp(0, groups - 1).to(torch.int32)
        yield Fault(SHIFTED, f"as if rows were {ahead}, around the end"), (index % groups).to(torch.int32)


def _layout(index: Tensor, old: Tensor, groups: int) -> Fault:
    k = len(index)
    if torch.equal(old, sequential_groups(k, k // groups)):
        for fault, other in layouts(k, k // groups):
            if torch.equal(index, other):
                return fault
    at = (index != old).nonzero()[:, 0]
    return Fault(OTHER_GROUPS, f"{len(at)} rows, the first k={int(at[0])}: group {int(index[at[0]])} for {int(old[at[0]])}")
