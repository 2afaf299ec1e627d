"""What an engine multiplies: the weight decoded as a recipe says, with its scales and bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.recipe import Recipe, Type, Unordered
from qlab.replay.step import Bits16
from qlab.weights import Int4Weight

DTYPES: dict[Type, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Operands:
    """Some columns of a decoded weight, rows in the recipe's order, in the activations' dtype on the weight's device."""

    w: Tensor
    """[K, N]"""
    scales: Tensor
    """[G, N]"""
    group: Tensor
    """int32 [K]: row of ``scales`` for each k."""
    bias: Tensor
    """[N], or [0] without a bias."""


def row_order(recipe: Recipe, weight: Int4Weight) -> Tensor | None:
    """int64 [K]: which row of the weight each k of the recipe's walks is; None for the natural order.

    vLLM calls ``torch.argsort(g_idx)``, which kept the order within a group on CUDA for every index tried.
    """
    return torch.argsort(weight.group_index, stable=True) if recipe.rows == "sorted" else None


def operands(
    recipe: Recipe, weight: Int4Weight, columns: slice = slice(None), order: Tensor | None = None, bias: Tensor | None = None
) -> Operands:
    """Operands of some columns; ``order`` is :func:`row_order`'s, ``bias`` the whole output's."""
    codes, zeros, scales = (t[:, columns] for t in (weight.codes, weight.zeros, weight.scales))
    group = weight.group_index
    if order is not None:
        codes, group = codes[order], group[order]
    part = scales.new_empty(0) if bias is None else bias[columns].contiguous()
    return Operands(decode(recipe, codes, zeros, scales, group), scales.contiguous(), group.contiguous(), part)


def decode(recipe: Recipe, codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """w [K, N] in the scales' dtype as ``recipe.weights`` says, exact before its one rounding.

    |q - z| has 5 bits and s at most 11, so float32 holds the product. ``fused``: both terms are multiples of the scale's last
    place, and their sum has 16 bits.
    """
    g = group.long()
    q, z, s = codes.float(), zeros.float(), scales.float()
    if recipe.weights == "integer":
        return (q - z[g]).to(scales.dtype)
    if recipe.weights == "rounded":
        return ((q - z[g]) * s[g]).to(scales.dtype)
    shift = (-s * z).to(scales.dtype).float()
    return (q * s[g] + shift[g]).to(scales.dtype)


class Shaped(Protocol):
    """What a recipe asks of a weight, decoded or not."""

    @property
    def K(self) -> int: ...
    @property
    def N(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...


def check(recipe: Recipe, shape: Sequence[int], dtype: torch.dtype, weight: Shaped, bias: Tensor | None) -> None:
    """Raise QlabError unless x (``shape``, ``dtype``), weight and bias are what the recipe was made for."""
    both, want = [*shape, weight.N], [recipe.M, recipe.K, recipe.N]
    if both != want or weight.K != recipe.K:
        raise QlabError(f"the recipe is for M, K, N = {want} and x {list(shape)}, weight [{weight.K}, {weight.N}] are not")
    if dtype != DTYPES[recipe.dtype] or weight.dtype != dtype:
        raise QlabError(f"the recipe is for {recipe.dtype} and x is {dtype}, the weight {weight.dtype}")
    scaled = any(r.output.scale or (isinstance(r.tree, Unordered) and r.tree.scaled) for r in recipe.regions)
    if scaled and weight.groups > 1:
        raise QlabError(f"the recipe multiplies sums by whole columns' scales, and the weight has {weight.groups} groups")
    biased = any(r.output.bias != "none" for r in recipe.regions)
    if biased != (bias is not None):
        raise QlabError("the recipe adds a bias and none was given" if biased else "a bias was given and the recipe adds none")
    if bias is not None and (bias.shape != (weight.N,) or bias.dtype != dtype):
        raise QlabError(f"the bias must be {dtype} [{weight.N}], not {bias.dtype} {list(bias.shape)}")


def bits(t: Tensor) -> Bits16:
    """A 16-bit tensor's bits on the CPU: uint16, C-contiguous."""
    return t.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)


def values(b: Bits16, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`bits`."""
    return torch.from_numpy(np.ascontiguousarray(b).view(np.int16)).view(dtype)
