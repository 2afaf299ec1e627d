"""Faults of packing and group layout, planted as they come about: in packed tensors that are read back by qlab.packing.

Each plant takes a weight and says what it did in the words of the tool that is to name it, with a place where the words alone
do not say it; None where the storage cannot hold the weight or the fault is not possible there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from qlab.attribution import faults_damage, faults_weight
from qlab.attribution.fault import Fault
from qlab.errors import QlabError
from qlab.lab.faults import ONE_HIGH, ONE_LOW
from qlab.packing import awq, exllama, gptq, marlin, nibbles
from qlab.weights import Int4Weight, sequential_groups

Planted = tuple[Int4Weight, Fault]
Plant = Callable[[Int4Weight, Generator], "Planted | None"]


@dataclass(frozen=True, eq=False)
class Storage:
    """A weight in GPTQ's tensors, which hold every layout of groups."""

    tensors: gptq.GptqTensors

    @classmethod
    def of(cls, w: Int4Weight) -> Storage:
        return cls(gptq.pack(w, 1 if int(w.zeros.min()) else 2))

    def read(self, **changed: object) -> Int4Weight:
        return gptq.unpack(replace(self.tensors, **changed))  # type: ignore[arg-type]


def _any(g: Generator, most: int) -> int:
    return int(torch.randint(0, most, (1,), generator=g))


def codes_stored_naturally(w: Int4Weight, g: Generator) -> Planted:
    found = awq.unpack(replace(awq.pack(w), qweight=nibbles.join(w.codes)))
    return found, Fault("codes: AWQ's nibble order where natural order is stored, along columns")


def zeros_stored_naturally(w: Int4Weight, g: Generator) -> Planted:
    found = awq.unpack(replace(awq.pack(w), qzeros=nibbles.join(w.zeros)))
    return found, Fault("zero points: AWQ's nibble order where natural order is stored, along columns")


def all_stored_naturally(w: Int4Weight, g: Generator) -> Planted:
    found = awq.unpack(replace(awq.pack(w), qweight=nibbles.join(w.codes), qzeros=nibbles.join(w.zeros)))
    return found, Fault("codes and zero points: AWQ's nibble order where natural order is stored, along columns")


def codes_read_naturally(w: Int4Weight, g: Generator) -> Planted:
    found = replace(w, codes=nibbles.split(awq.pack(w).qweight))
    return found, Fault("codes: natural nibble order where AWQ's is stored, along columns")


def zeros_read_naturally(w: Int4Weight, g: Generator) -> Planted:
    found = Storage.of(w).read(qzeros=awq.pack(w).qzeros, version=2)
    return found, Fault("zero points: natural nibble order where AWQ's is stored, along columns")


def exllama_read_as_gptq(w: Int4Weight, g: Generator) -> Planted:
    shuffled = exllama.pack(replace(w, group_index=sequential_groups(w.K, w.group_size)), 1 if int(w.zeros.min()) else 2)
    return Storage.of(w).read(qweight=shuffled.qweight), Fault("codes: natural nibble order where AWQ's is stored, along rows")


def gptq_read_as_exllama(w: Int4Weight, g: Generator) -> Planted | None:
    if w.act_order:
        return None
    version: gptq.Version = 1 if int(w.zeros.min()) else 2
    tensors = replace(exllama.pack(w, version), qweight=gptq.pack(w, version).qweight)
    return exllama.unpack(tensors), Fault("codes: AWQ's nibble order where natural order is stored, along rows")


def _version_1(w: Int4Weight) -> Tensor:
    """What a writer that subtracts one in four bits stores."""
    return nibbles.join((w.zeros - 1) & 15)


def v1_read_as_v2(w: Int4Weight, g: Generator) -> Planted:
    return Storage.of(w).read(qzeros=_version_1(w), version=2), Fault(ONE_LOW)


def v2_read_as_v1(w: Int4Weight, g: Generator) -> Planted:
    return Storage.of(w).read(qzeros=nibbles.join(w.zeros & 15), version=1), Fault(ONE_HIGH)


def zero_minus_one_is_15(w: Int4Weight, g: Generator) -> Planted | None:
    found = Storage.of(w).read(qzeros=_version_1(w), version=1)
    return (found, Fault(faults_weight.WRAPPED)) if int(w.zeros.min()) == 0 else None


def one_more_is_0(w: Int4Weight, g: Generator) -> Planted | None:
    stored = nibbles.join(nibbles.split(_version_1(w)) + 1 & 15)
    found = Storage.of(w).read(qzeros=stored, version=2)
    return (found, Fault(faults_weight.CUT)) if int(w.zeros.max()) == 16 else None


def symmetric_zeros(w: Int4Weight, g: Generator) -> Planted:
    t = Storage.of(w)
    found = t.read(qzeros=torch.full_like(t.tensors.qzeros, 0x77777777), version=1)
    return found, Fault("zero points: 8 everywhere (an asymmetric weight read as symmetric)")


GROUPED = "Marlin's 64-column permutation applied once too often or not at all"
SINGLE = "Marlin's single-group permutation applied once too often or not at all"


def scales_unpermuted(w: Int4Weight, g: Generator) -> Planted | None:
    """Marlin reads scales as if they had been permuted."""
    if w.act_order or w.groups == 1 or w.N % 64:
        return None
    return replace(w, scales=marlin.unpermute_scales(w.scales)), Fault(f"scales: {GROUPED}")


def zeros_unpermuted(w: Int4Weight, g: Generator) -> Planted | None:
    if w.act_order or w.N % 64 or int(w.zeros.max()) == 16:
        return None
    packed = nibbles.join(nibbles.even_then_odd(w.zeros))
    return replace(w, zeros=marlin.unpack_zeros(packed)), Fault(f"zero points: {GROUPED}")


def scales_of_one_group(w: Int4Weight, g: Generator) -> Planted:
    """The whole columns' permutation where the grouped one belongs, or once too often."""
    return replace(w, scales=marlin.permute_bias(w.scales)), Fault(f"scales: {SINGLE}")


def next_columns_scales(w: Int4Weight, g: Generator) -> Planted:
    by = 2 * _any(g, 2) - 1
    return replace(w, scales=w.scales.roll(by, 1)), Fault(f"scales: from the {'previous' if by == 1 else 'next'} column")


def other_group(w: Int4Weight, g: Generator) -> Planted | None:
    """The group index off by one group: in g_idx, or in the rows of scales and zero points where there is none."""
    if w.groups == 1:
        return None
    by = 2 * _any(g, 2) - 1
    fault = Fault(f"group index: every row takes the {'next' if by == 1 else 'previous'} group")
    t = Storage.of(w)
    return t.read(g_idx=(t.tensors.g_idx + by) % w.groups), fault


def groups_reversed(w: Int4Weight, g: Generator) -> Planted | None:
    if w.groups == 1:
        return None
    t = Storage.of(w)
    return t.read(g_idx=w.groups - 1 - t.tensors.g_idx), Fault("group index: groups in reverse")


def fine(w: Int4Weight, group_of: Callable[[int], int], size: int) -> Int4Weight:
    """The weight whose rows take the parameters of ``group_of(row)``, written as smaller groups of ``size`` rows."""
    of = [group_of(row) for row in range(0, w.K, size)]
    index = (torch.arange(w.K) // size).to(torch.int32)
    return Int4Weight(w.codes, w.zeros[of].contiguous(), w.scales[of].contiguous(), index)


def ranks(w: Int4Weight, count: int) -> Planted | None:
    """Each of ``count`` tensor-parallel ranks counts groups from its own first row, on from the one that row lies in."""
    share, size = w.K // count, w.group_size
    if w.act_order or w.groups == 1 or w.K % count or share % size == 0 or share % 8:
        return None

    def group_of(row: int) -> int:
        rank, local = divmod(row, share)
        return min(rank * share // size + local // size, w.groups - 1)

    where = f"{count} ranks of {share} rows, groups of {size}"
    return fine(w, group_of, math.gcd(share, size)), Fault(faults_damage.STRADDLED, where)


def straddled(w: Int4Weight, g: Generator) -> Planted | None:
    return next((p for count in (4, 2) if (p := ranks(w, count)) is not None), None)


def shifted(w: Int4Weight, g: Generator) -> Planted | None:
    """A rank whose first row is not a group's: groups counted from half a group, or another part, earlier."""
    size = w.group_size
    if w.act_order or w.groups == 1:
        return None
    by = (size // 2, size // 4)[_any(g, 2)]
    found = fine(w, lambda row: min((row + by) // size, w.groups - 1), math.gcd(by, size))
    return found, Fault(faults_damage.SHIFTED, f"as if rows were {by} rows later than they lie")


def act_order_ignored(w: Int4Weight, g: Generator) -> Planted | None:
    if not w.act_order:
        return None
    found = Storage.of(w).read(g_idx=sequential_groups(w.K, w.group_size))
    return found, Fault("group index: ignored (act-order rows read as k // group_size)")


def rows_left_sorted(w: Int4Weight, g: Generator) -> Planted | None:
    if not w.act_order:
        return None
    order = torch.tensor(sorted(range(w.K), key=lambda k: (int(w.group_index[k]), k)))
    t = Storage.of(replace(w, codes=w.codes[order], group_index=w.group_index[order]))
    return t.read(), Fault("group index: rows left in sorted order (activations not permuted)")


def nibble_flipped(w: Int4Weight, g: Generator) -> Planted:
    """One bit of one packed code."""
    k, n, bit = _any(g, w.K), _any(g, w.N), _any(g, 4)
    qweight = Storage.of(w).tensors.qweight.clone()
    qweight[k // 8, n] ^= torch.tensor((1 << (4 * (k % 8) + bit)) - (1 << 32 if (k % 8, bit) == (7, 3) else 0)).to(torch.int32)
    old = int(w.codes[k, n])
    return Storage.of(w).read(qweight=qweight), Fault(
        faults_damage.CODE, f"k={k}, n={n} holds code {old ^ 1 << bit} instead of {old}"
    )


def _copied(w: Int4Weight) -> bool:
    """Whether groups were written as smaller ones, so that one parameter is stored several times."""
    return len(torch.cat((w.zeros.to(w.dtype), w.scales), 1).unique(dim=0)) < w.groups


def zero_damaged(w: Int4Weight, g: Generator) -> Planted | None:
    """One bit of one packed zero point."""
    if _copied(w):
        return None
    group, n, bit = _any(g, w.groups), _any(g, w.N), _any(g, 4)
    t = Storage.of(w)
    offset = 2 - t.tensors.version
    stored = nibbles.split(t.tensors.qzeros)
    stored[group, n] ^= 1 << bit
    old, new = int(w.zeros[group, n]), int(stored[group, n]) + offset
    where = f"group {group}, n={n} has {new} instead of {old}"
    return t.read(qzeros=nibbles.join(stored)), Fault(faults_damage.ZERO, where)


def scale_damaged(w: Int4Weight, g: Generator) -> Planted | None:
    """One bit of one scale, its lowest ones, its exponent's lowest or its sign."""
    if _copied(w):
        return None
    group, n, bit = _any(g, w.groups), _any(g, w.N), (0, 1, 3, 10, 15)[_any(g, 5)]
    scales = w.scales.clone()
    flip = torch.tensor((1 << bit) - (1 << 16 if bit == 15 else 0)).to(torch.int16)
    scales.view(torch.int16)[group, n] ^= flip
    where = f"group {group}, n={n} has {float(scales[group, n]):.9g} instead of {float(w.scales[group, n]):.9g}"
    return Storage.of(w).read(scales=scales), Fault(faults_damage.SCALE, where)


NIBBLES: tuple[Plant, ...] = (
    codes_stored_naturally,
    zeros_stored_naturally,
    all_stored_naturally,
    codes_read_naturally,
    zeros_read_naturally,
    exllama_read_as_gptq,
    gptq_read_as_exllama,
)
ZEROS: tuple[Plant, ...] = (v1_read_as_v2, v2_read_as_v1, zero_minus_one_is_15, one_more_is_0, symmetric_zeros)
SCALES: tuple[Plant, ...] = (scales_unpermuted, zeros_unpermuted, scales_of_one_group, next_columns_scales)
GROUPS: tuple[Plant, ...] = (other_group, groups_reversed, straddled, shifted, act_order_ignored, rows_left_sorted)
DAMAGE: tuple[Plant, ...] = (nibble_flipped, zero_damaged, scale_damaged)
FAMILIES: Mapping[str, tuple[Plant, ...]] = {
    "nibbles": NIBBLES,
    "zeros": ZEROS,
    "scales": SCALES,
    "groups": GROUPS,
    "damage": DAMAGE,
}


def planted(plant: Plant, w: Int4Weight, g: Generator) -> Planted | None:
    """The plant, or None where storage cannot hold it or it leaves the weight as it is."""
    try:
        found = plant(w, g)
    except QlabError:
        return None
    return None if found is None or found[0].equals(w) else found
