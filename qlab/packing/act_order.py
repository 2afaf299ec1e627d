"""Rows sorted by group, for kernels that want every group's rows together: a permutation stands in for the group index.

vLLM takes ``torch.argsort(g_idx)``, which is not stable: which row of a group comes first is up to the sort of the machine
that loads the checkpoint, and with it the order of summation and the bits. So the permutation is an argument here, stable
unless one is given, and unpacking follows the permutation it finds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.packing import checks
from qlab.weights import Int4Weight, sequential_groups


def order(weight: Int4Weight, perm: Tensor | None, layout: str) -> Tensor:
    """int32 [K], the original row of each sorted row, or int32 [0] where rows stay as they are.

    Without ``perm``: the stable sort of an act-order weight's group index, [0] for any other weight. A given ``perm`` is
    used for any weight; PackingError when it is no permutation of the rows or leaves a group's rows apart.
    """
    if perm is None:
        return torch.argsort(weight.group_index, stable=True).int() if weight.act_order else none(weight.device)
    if perm.shape != (weight.K,) or perm.dtype != torch.int32 or perm.device != weight.device or not checks.permutes(perm):
        checks.refuse(weight, layout, f"perm must be int32 [{weight.K}] on {weight.device} and hold every row once")
    sorted_index = weight.group_index[perm.long()]
    bad = sorted_index != sequential_groups(weight.K, weight.group_size, weight.device)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        checks.refuse(
            weight,
            layout,
            f"perm does not sort the group index: row {int(perm[row])}, of group {int(sorted_index[row])}, "
            f"would come to place {row}, in group {row // weight.group_size}; use torch.argsort of the group index",
        )
    return perm.clone()


def none(device: torch.device) -> Tensor:
    """int32 [0]: how the kernels are told that rows are in order."""
    return torch.empty(0, dtype=torch.int32, device=device)


def sort(rows: Tensor, perm: Tensor) -> Tensor:
    """``rows`` in the order of ``perm``; as they are when it is empty."""
    return rows[perm.long()] if perm.numel() else rows


def unsort(rows: Tensor, perm: Tensor) -> Tensor:
    """The inverse of :func:`sort`."""
    if not perm.numel():
        return rows
    found = torch.empty_like(rows)
    found[perm.long()] = rows
    return found


def group_index(perm: Tensor, k: int, groups: int) -> Tensor:
    """int32 [k], the group of each original row when sorted rows fill the groups one after another."""
    return unsort(sequential_groups(k, k // groups, perm.device), perm)
