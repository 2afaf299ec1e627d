"""Packing, or weights? Which fault of storage explains the difference of two weights, and each kernel's own packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qlab.attribution.weight_difference import same_bits, stored_alike
from qlab.backends import registry
from qlab.backends.registry import Problem
from qlab.lab.faults import Shards, diagnose
from qlab.packing import awq, exllama, fragments, gptq, marlin, wgmma_rows
from qlab.weights import Int4Weight

_UNNAMED = "unnamed fault"
_SINGLE = "codes: k="
"""Codes one by one: ``codes: k=17, n=600 holds code 3 instead of 11`` need not say twice what they are."""
_DECODES = "reference.float64"
"""Decodes ``RN((q - z) * s)``, as the faults are told by."""


def storage_fault(a: Int4Weight, b: Int4Weight, shards: Shards = ()) -> str:
    """The fault of packing or group layout that makes ``b`` of ``a``, by name and place; empty where no known one does.

    ``shards`` are the modules of a fused linear with their columns, to be named. The weights must be of one shape, grouping,
    dtype and input scale: only then do equal settings leave storage to blame.
    """
    one, other = ((w.codes.shape, w.scales.shape, w.dtype) for w in (a, b))
    if one != other or not same_bits(a.input_scale, b.input_scale) or stored_alike(a, b):
        return ""
    kernel = registry.kernel(_DECODES)
    got = kernel.decoded(b)
    places = (got != kernel.decoded(a)).nonzero()
    if not len(places):  # other parts that decode alike, which only another quantizer would write
        return ""
    said = diagnose(got, a, kernel, places, shards)
    if said.startswith(_UNNAMED):
        return ""
    return said.removeprefix("codes: ") if said.startswith(_SINGLE) else said


@dataclass(frozen=True)
class RoundTrip:
    """What a kernel's storage decodes to, beside the weight that was packed into it."""

    kernel: str
    storage: str
    """A module of qlab.packing, or ``none``."""
    exact: bool | None
    """Whether every bit comes back; None where nothing on this machine can read the storage."""
    text: str
    """One clause, for a reader."""


def packing_round_trip(name: str, weight: Int4Weight) -> RoundTrip:
    """Pack ``weight`` as the kernel of that name stores it and unpack it again: packing costs nothing where that is exact.

    The layouts are qlab.packing's, which the tests hold to what vLLM's own repacking operators leave. Raises QlabError for an
    unknown kernel and PackingError where its storage cannot hold the weight.
    """
    kernel = registry.kernel(name)
    if kernel.layout not in _LAYOUTS:
        if kernel.portable:
            return RoundTrip(name, kernel.layout, True, "takes the decoded weight, no storage between")
        return RoundTrip(
            name, kernel.layout, None, "its prepack is CUTLASS's own, with no inverse here; --probe reads it on a Hopper GPU"
        )
    back = _LAYOUTS[kernel.layout](weight, kernel)
    exact = back.equals(weight)
    if exact:
        return RoundTrip(name, kernel.layout, True, "its storage decodes to the weight, bit for bit")
    return RoundTrip(name, kernel.layout, False, storage_fault(weight, back) or "its storage decodes to another weight")


def _version(weight: Int4Weight, kernel: registry.Kernel) -> gptq.Version:
    """Of GPTQ's zero points: the kernel's own where it has one, otherwise version 1 where that can hold them."""
    stored: gptq.Version | None = getattr(kernel, "stored", None)
    return stored or (1 if Problem.of(weight, 0).zero_min >= 1 else 2)


def _awq(weight: Int4Weight, kernel: registry.Kernel) -> Int4Weight:
    return awq.unpack(awq.pack(weight), input_scale=weight.input_scale)


def _gptq(weight: Int4Weight, kernel: registry.Kernel) -> Int4Weight:
    return gptq.unpack(gptq.pack(weight, _version(weight, kernel)), input_scale=weight.input_scale)


def _exllama(weight: Int4Weight, kernel: registry.Kernel) -> Int4Weight:
    return exllama.unpack(exllama.pack(weight, _version(weight, kernel)), input_scale=weight.input_scale)


def _marlin(weight: Int4Weight, kernel: registry.Kernel) -> Int4Weight:
    kind: marlin.Kind = "uint4" if kernel.source == "awq" else "uint4b8"
    return marlin.unpack(marlin.pack(weight, kind), input_scale=weight.input_scale)


def _fragments(weight: Int4Weight, kernel: registry.Kernel) -> Int4Weight:
    return fragments.unpack(fragments.pack(weight), input_scale=weight.input_scale)


def _wgmma_rows(weight: Int4Weight, kernel: registry.Kernel) -> Int4Weight:
    return wgmma_rows.unpack(wgmma_rows.pack(weight), input_scale=weight.input_scale)


_LAYOUTS: dict[str, Callable[[Int4Weight, registry.Kernel], Int4Weight]] = {
    "awq": _awq,
    "gptq": _gptq,
    "exllama": _exllama,
    "marlin": _marlin,
    "fragments": _fragments,
    "wgmma_rows": _wgmma_rows,
}
