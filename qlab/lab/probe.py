"""The one-hot probe: rows of the identity as activations, so that a kernel's output is the weight it decoded.

One product is w, every other is zero, so no order of summation can show: what differs from the expected weight is packing or
group layout, never arithmetic. :mod:`qlab.lab.faults` names it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.backends import failure
from qlab.backends.registry import Kernel, Packed, Problem
from qlab.inputs import one_hot_rows
from qlab.lab.faults import Shards, diagnose
from qlab.lab.results import ProbeFault, ProbeResult
from qlab.weights import Int4Weight

ROWS = 16
"""One-hot rows per call: small enough that every kernel stays on its INT4 path (ExLlama leaves it above 50)."""
CPU_ROWS = 256
"""The same where only references and Triton's interpreter run, whose time goes by calls."""
SHOWN = 8


def decode(kernel: Kernel, packed: Packed, k: int, dtype: torch.dtype, device: torch.device, rows: int = ROWS) -> Tensor:
    """The weight as ``kernel`` decodes it from ``packed``: [K, N] in ``dtype``, by K / rows calls."""
    out = []
    for start in range(0, k, rows):
        x = one_hot_rows(start, min(start + rows, k), k, dtype=dtype).to(device)
        out.append(kernel.run(x, packed))
    return torch.cat(out)


def probe(
    kernel: Kernel,
    weight: Int4Weight,
    expected: Int4Weight | None = None,
    *,
    layer: str = "",
    key: str = "",
    shards: Shards = (),
) -> ProbeResult:
    """Decode ``weight`` through ``kernel`` and compare with ``expected`` (the same weight unless one is given).

    ``shards`` lets the diagnosis name the module of a fused layer that a fault lies in.
    """
    expected = weight if expected is None else expected
    layer, key, elements = layer or weight.name, key or kernel.name, weight.K * weight.N
    rows = ROWS if weight.device.type == "cuda" else CPU_ROWS
    support = kernel.supports(Problem.of(weight, rows), weight.device)
    if not support.ok:
        return ProbeResult(layer, key, support.reason, 0, elements, "", ())
    try:
        got = decode(kernel, kernel.pack(weight), weight.K, weight.dtype, weight.device, rows)
        failure.wait(weight.device)
    except Exception as e:  # one broken kernel must not cost the others their probe
        return ProbeResult(layer, key, failure.reason(e, kernel.name, weight.device), 0, elements, "", ())
    return judge(got, expected, kernel, layer, key, shards)


def judge(got: Tensor, expected: Int4Weight, kernel: Kernel, layer: str, key: str, shards: Shards = ()) -> ProbeResult:
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
    return ProbeResult(layer, key, "", count, want.numel(), diagnose(got, expected, kernel, places, shards), faults)
