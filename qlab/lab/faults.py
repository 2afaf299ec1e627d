"""Faults of packing and group layout by name, and how a decoded weight is traced to one of them.

Known faults (nibble order, zero-point convention, scale permutation, group index) each predict the whole decoded matrix; the
one that predicts every element is named. Then come single zero points, scales and codes, as damage in a file leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qlab.backends.registry import Kernel
from qlab.errors import QlabError
from qlab.weights import Int4Weight, round_once, sequential_groups

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
CODES = 8
"""Codes that are named one by one."""
ONE_LOW = "zero points: one too low (stored minus one as in GPTQ v1, read as v2)"
ONE_HIGH = "zero points: one too high (stored as they are as in GPTQ v2, read as v1)"

Fault = Callable[[Int4Weight], Int4Weight]
"""From the expected weight to the one that a kernel with this fault decodes."""


Shards = Sequence[tuple[str, int]]
"""Modules that a fused layer was joined from, with their columns; empty for a layer that is one module."""


def diagnose(got: Tensor, expected: Int4Weight, kernel: Kernel, places: Tensor, shards: Shards = ()) -> str:
    """Name the fault that predicts every element of ``got`` [K, N], or say where the mismatches lie.

    ``places`` int64 [count, 2] holds (k, n) of every mismatch.
    """
    for name, fault in hypotheses(expected):
        try:
            predicted = kernel.decoded(fault(expected))
        except QlabError:  # the fault leaves the range of zero points: then it is not this one
            continue
        if torch.equal(predicted, got):
            return name
    return (
        _one_parameter(got, expected, kernel, places, shards)
        or _single_codes(got, expected, kernel, places, shards)
        or _where(expected, places, shards)
    )


def hypotheses(weight: Int4Weight) -> Iterator[tuple[str, Fault]]:
    """Every fault that the probe knows by name, for a weight of this shape."""
    yield from _nibble_faults(weight)
    yield ONE_LOW, lambda w: replace(w, zeros=_shift(w.zeros, -1))
    yield ONE_HIGH, lambda w: replace(w, zeros=_shift(w.zeros, 1))
    yield (
        "zero points: 8 everywhere (an asymmetric weight read as symmetric)",
        lambda w: replace(w, zeros=torch.full_like(w.zeros, 8)),
    )
    for name, columns in _scale_orders(weight.N, weight.device):
        for parts in (("scales",), ("zeros",), ("scales", "zeros")):
            yield f"{_named(parts)}: {name}", _reorder(parts, 1, columns)
    if weight.groups > 1:
        yield from _group_faults(weight)


def _nibble_faults(weight: Int4Weight) -> Iterator[tuple[str, Fault]]:
    order = torch.tensor(AWQ_ORDER)
    swaps = (
        ("AWQ's nibble order where natural order is stored", order),
        ("natural nibble order where AWQ's is stored", torch.argsort(order)),
    )
    for name, p in swaps:
        if weight.N % 8 == 0:
            columns = _octets(weight.N, p, weight.device)
            for parts in (("codes",), ("zeros",), ("codes", "zeros")):
                yield f"{_named(parts)}: {name}, along columns", _reorder(parts, 1, columns)
        if weight.K % 8 == 0:
            yield f"codes: {name}, along rows", _reorder(("codes",), 0, _octets(weight.K, p, weight.device))


def _group_faults(weight: Int4Weight) -> Iterator[tuple[str, Fault]]:
    groups, natural = weight.groups, sequential_groups(weight.K, weight.group_size, weight.device)
    if weight.act_order:
        order = torch.argsort(weight.group_index, stable=True)
        yield (
            "group index: ignored (act-order rows read as k // group_size)",
            lambda w: replace(w, group_index=natural),
        )
        yield (
            "group index: rows left in sorted order (activations not permuted)",
            lambda w: replace(w, codes=w.codes[order], group_index=w.group_index[order]),
        )
    yield "group index: every row takes the next group", lambda w: replace(w, group_index=(w.group_index + 1) % groups)
    yield "group index: every row takes the previous group", lambda w: replace(w, group_index=(w.group_index - 1) % groups)
    yield "group index: groups in reverse", lambda w: replace(w, group_index=groups - 1 - w.group_index)


def _reorder(parts: tuple[str, ...], axis: int, index: Tensor) -> Fault:
    return lambda w: replace(w, **{part: getattr(w, part).index_select(axis, index) for part in parts})


def _named(parts: tuple[str, ...]) -> str:
    return " and ".join("zero points" if part == "zeros" else part for part in parts)


def _octets(size: int, order: Tensor, device: torch.device) -> Tensor:
    return (torch.arange(0, size, 8)[:, None] + order).reshape(-1).to(device)


def _shift(zeros: Tensor, by: int) -> Tensor:
    """Zero points moved by one; -1 does not exist, so it becomes 255 and Int4Weight refuses it."""
    return (zeros.to(torch.int16) + by).to(torch.uint8)


def _scale_orders(n: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    if n % 64 == 0:
        transposed = torch.arange(64).reshape(8, 8).t().reshape(-1)
        columns = (torch.arange(0, n, 64)[:, None] + transposed).reshape(-1)
        yield "Marlin's 64-column permutation applied once too often or not at all", columns.to(device)
    if n % 32 == 0:
        single = torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
        for p in (single, torch.argsort(single)):
            columns = (torch.arange(0, n, 32)[:, None] + p).reshape(-1)
            yield "Marlin's single-group permutation applied once too often or not at all", columns.to(device)
    for by in (1, -1):
        yield f"from the {'next' if by == 1 else 'previous'} column", torch.arange(n, device=device).roll(-by)


def _one_parameter(got: Tensor, expected: Int4Weight, kernel: Kernel, places: Tensor, shards: Shards) -> str:
    """One zero point or one scale that explains every mismatch, all of them in one group of one column."""
    columns, groups = places[:, 1].unique(), expected.group_index[places[:, 0]].unique()
    if len(columns) > 1 or len(groups) > 1 or len(places) == 1:
        return ""
    n, g = int(columns), int(groups)
    rows = expected.group_index == g
    codes, seen = expected.codes[rows, n], got[rows, n]
    zero, scale = expected.zeros[g, n], expected.scales[g, n]
    where = f"group {g}, {_column(n, shards)}"
    zeros = torch.arange(17, dtype=torch.uint8, device=expected.device)
    if len(match := _match(kernel, codes, seen, zeros, scale.expand(17))):
        return f"zero points: {where} has {match[0]} instead of {int(zero)}"
    steps = codes.double() - zero.double()
    widest = int(steps.abs().argmax())
    near = round_once(seen[widest].double() / steps[widest], expected.dtype)
    scales = (near.view(torch.int16) + torch.arange(-2, 3, dtype=torch.int16, device=expected.device)).view(expected.dtype)
    scales = torch.where(torch.isfinite(scales) & (scales != 0), scales, scale)
    if len(match := _match(kernel, codes, seen, zero.expand(5), scales)):
        return f"scales: {where} has {float(scales[match[0]]):.9g} instead of {float(scale):.9g}"
    return ""


def _match(kernel: Kernel, codes: Tensor, seen: Tensor, zeros: Tensor, scales: Tensor) -> list[int]:
    """Which of the candidate (zero, scale) pairs decode ``codes`` [rows] to ``seen``."""
    index = torch.zeros(len(codes), dtype=torch.int32, device=codes.device)
    candidates = Int4Weight(codes[:, None].repeat(1, len(zeros)), zeros[None].contiguous(), scales[None].contiguous(), index)
    return (kernel.decoded(candidates) == seen[:, None]).all(0).nonzero()[:, 0].tolist()


def _single_codes(got: Tensor, expected: Int4Weight, kernel: Kernel, places: Tensor, shards: Shards) -> str:
    """Codes that explain the mismatches one by one: what a flipped nibble in a file looks like."""
    if len(places) > CODES:
        return ""
    texts = []
    for k, n in places.tolist():
        g = int(expected.group_index[k])
        zero, scale = expected.zeros[g, n].expand(1, 16), expected.scales[g, n].expand(1, 16)
        codes = torch.arange(16, dtype=torch.uint8, device=expected.device)[None]
        index = torch.zeros(1, dtype=torch.int32, device=expected.device)
        candidates = kernel.decoded(Int4Weight(codes, zero.contiguous(), scale.contiguous(), index))[0]
        matches = (candidates == got[k, n]).nonzero()
        if not len(matches):
            return ""
        texts.append(f"k={k}, {_column(n, shards)} holds code {int(matches[0])} instead of {int(expected.codes[k, n])}")
    return "codes: " + "; ".join(texts)


def _where(expected: Int4Weight, places: Tensor, shards: Shards) -> str:
    k, n = places[:, 0], places[:, 1]
    rows, columns = k.unique(), n.unique()
    groups = expected.group_index[k].unique()
    text = f"unnamed fault: rows {int(rows.min())} to {int(rows.max())}, columns {int(columns.min())} to {int(columns.max())}"
    if len(groups) == 1 and len(columns) == 1:
        return f"{text}: all in group {int(groups[0])}, {_column(int(columns[0]), shards)}"
    return f"{text}, {len(groups)} of {expected.groups} groups"


def _column(n: int, shards: Shards) -> str:
    """``n=600``, and in a fused layer also the module and the column there."""
    start = 0
    for module, width in shards if len(shards) > 1 else ():
        if n < start + width:
            return f"n={n} (column {n - start} of {module})"
        start += width
    return f"n={n}"
