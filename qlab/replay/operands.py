"""What an engine multiplies: the weight decoded as a recipe says, with its scales and bias, as bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.recipe import Recipe
from qlab.replay.step import Bits16
from qlab.weights import Int4Weight


@dataclass(frozen=True, eq=False)
class Operands:
    """Columns of a decoded weight, as bits of the recipe's dtype."""

    w: Bits16
    """[K, N]"""
    scales: Bits16
    """[G, N]"""
    group: np.ndarray
    """int32 [K]: row of ``scales`` for each k."""
    bias: Bits16
    """[N], or [0] without a bias."""


def row_order(recipe: Recipe, weight: Int4Weight) -> Tensor | None:
    """int64 [K]: which row of the weight each k of the recipe's walks is; None for the natural order.

    vLLM calls ``torch.argsort(g_idx)``, which keeps the order within a group on CUDA for every index tried.
    """
    return torch.argsort(weight.group_index, stable=True) if recipe.rows == "sorted" else None


def decode(recipe: Recipe, weight: Int4Weight) -> Tensor:
    """The weight [K, N] in its own dtype as ``recipe.weights`` says, rows in natural order."""
    if recipe.weights == "rounded":
        return weight.dequantize(weight.dtype)
    g = weight.group_index.long()
    codes, zeros = weight.codes.float(), weight.zeros.float()
    if recipe.weights == "integer":
        return (codes - zeros[g]).to(weight.dtype)
    scales = weight.scales.float()
    shift = (-scales * zeros).to(weight.dtype).float()
    # Exact in float32 before the rounding: both terms are multiples of the scale's last place, and their sum has 16 bits.
    return (codes * scales[g] + shift[g]).to(weight.dtype)


def columns(weight: Int4Weight, start: int, stop: int) -> Int4Weight:
    """Columns ``start:stop`` of a weight."""
    part = slice(start, stop)
    return Int4Weight(
        weight.codes[:, part], weight.zeros[:, part], weight.scales[:, part], weight.group_index, weight.input_scale, weight.name
    )


def operands(recipe: Recipe, weight: Int4Weight, bias: Tensor | None = None) -> Operands:
    """Operands of a weight that was cut to the columns in question (``bias`` likewise), rows in the recipe's order."""
    if bias is not None and (bias.shape != (weight.N,) or bias.dtype != weight.dtype):
        raise QlabError(f"the bias must be {weight.dtype} [{weight.N}], not {bias.dtype} {list(bias.shape)}")
    w, group, order = decode(recipe, weight), weight.group_index, row_order(recipe, weight)
    if order is not None:
        w, group = w[order], group[order]
    none = np.zeros(0, np.uint16)
    return Operands(bits(w), bits(weight.scales), group.cpu().numpy(), none if bias is None else bits(bias))


def bits(t: Tensor) -> Bits16:
    """A 16-bit tensor's bits on the CPU: uint16, C-contiguous."""
    return t.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
