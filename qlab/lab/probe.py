"""The one-hot probe: rows of the identity as activations, so that a kernel's output is the weight it decoded.

One product is w, every other is zero, so no order of summation can show: what differs from the expected weight is packing or
group layout, never arithmetic. Known faults (nibble order, zero-point convention, scale permutation, group index) each
predict the whole decoded matrix; the one that predicts every element is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qlab.backends.registry import Kernel, Packed, Problem
from qlab.errors import QlabError
from qlab.inputs import one_hot_rows
from qlab.lab.results import ProbeFault, ProbeResult
from qlab.weights import Int4Weight, sequential_groups

ROWS = 16
"""One-hot rows per call: small enough that every kernel stays on its INT4 path (ExLlama leaves it above 50)."""
SHOWN = 8
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def decode(kernel: Kernel, packed: Packed, k: int, dtype: torch.dtype, device: torch.device, rows: int = ROWS) -> Tensor:
    """The weight as ``kernel`` decodes it from ``packed``: [K, N] in ``dtype``, by K / rows calls."""
    out = []
    for start in range(0, k, rows):
        x = one_hot_rows(start, min(start + rows, k), k, dtype=dtype).to(device)
        out.append(kernel.run(x, packed))
    return torch.cat(out)


def probe(
    kernel: Kernel, weight: Int4Weight, expected: Int4Weight | None = None, *, layer: str = "", key: str = ""
) -> ProbeResult:
    """Decode ``weight`` through ``kernel`` and compare with ``expected`` (the same weight unless one is given)."""
    expected = weight if expected is None else expected
    layer, key, elements = layer or weight.name, key or kernel.name, weight.K * weight.N
    support = kernel.supports(Problem.of(weight, ROWS), weight.device)
    if not support.ok:
        return ProbeResult(layer, key, support.reason, 0, elements, "", ())
    try:
        got = decode(kernel, kernel.pack(weight), weight.K, weight.dtype, weight.device)
    except QlabError as e:
        return ProbeResult(layer, key, str(e), 0, elements, "", ())
    return judge(got, expected, kernel, layer, key)


def judge(got: Tensor, expected: Int4Weight, kernel: Kernel, layer: str, key: str) -> ProbeResult:
    """Compare a decoded weight [K, N] with the expected one. -0 and +0 are the same weight: a sum cannot tell them apart."""
    want = kernel.decoded(expected)
    wrong = ~((got == want) | (torch.isnan(got) & torch.isnan(want)))
    count = int(wrong.sum())
    if not count:
        return ProbeResult(layer, key, "", 0, want.numel(), "", ())
    places = wrong.nonzero()
    faults = tuple(
        ProbeFault(int(k), int(n), float(want[k, n]), float(got[k, n])) for k, n in (p.tolist() for p in places[:SHOWN])
    )
    return ProbeResult(layer, key, "", count, want.numel(), diagnose(got, expected, kernel, places), faults)


Fault = Callable[[Int4Weight], Int4Weight]
"""From the expected weight to the one that a kernel with this fault decodes."""


def diagnose(got: Tensor, expected: Int4Weight, kernel: Kernel, places: Tensor) -> str:
    """Name the fault that predicts every element of ``got``, or say where the mismatches lie."""
    for name, fault in hypotheses(expected):
        try:
            predicted = kernel.decoded(fault(expected))
        except QlabError:  # the fault leaves the range of zero points: then it is not this one
            continue
        if torch.equal(predicted, got):
            return name
    return _single_codes(got, expected, kernel, places) or _where(expected, places)


def hypotheses(weight: Int4Weight) -> Iterator[tuple[str, Fault]]:
    """Every fault that the probe knows by name, for a weight of this shape."""
    yield from _nibble_faults(weight)
    yield (
        "zero points: one too low (stored minus one as in GPTQ v1, read as v2)",
        lambda w: replace(w, zeros=_shift(w.zeros, -1)),
    )
    yield (
        "zero points: one too high (stored as they are as in GPTQ v2, read as v1)",
        lambda w: replace(w, zeros=_shift(w.zeros, 1)),
    )
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


def _single_codes(got: Tensor, expected: Int4Weight, kernel: Kernel, places: Tensor) -> str:
    """Codes that explain the mismatches one by one: what a flipped nibble in a file looks like."""
    if len(places) > SHOWN:
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
        texts.append(f"k={k}, n={n} holds code {int(matches[0])} instead of {int(expected.codes[k, n])}")
    return "codes: " + "; ".join(texts)


def _where(expected: Int4Weight, places: Tensor) -> str:
    k, n = places[:, 0], places[:, 1]
    rows, columns = k.unique(), n.unique()
    groups = expected.group_index[k].unique()
    text = f"unnamed fault: rows {int(rows.min())} to {int(rows.max())}, columns {int(columns.min())} to {int(columns.max())}"
    if len(groups) == 1 and len(columns) == 1:
        return f"{text}: one scale or zero point, that of group {int(groups[0])}, column {int(columns[0])}"
    return f"{text}, {len(groups)} of {expected.groups} groups"
