"""Marlin's layout for 16-bit activations, as vLLM's ``gptq_marlin_repack`` and its helpers leave it for ``marlin_gemm``.

Codes lie in tiles of 16 rows and 64 columns, so that each thread of a warp reads with one 16-byte load what its tensor-core
fragments need. With k = 16 kt + 8h + 2t + e and n = 64 nt + 16w + 8c + r, code (k, n) is in row kt, int32
128 nt + 16r + 4t + w, nibble 4e + 2c + h. Scales, zero points and bias are permuted along N to match:

* grouped scales and all zero points: of every 64 columns, column 8j + i goes to place 8i + j; a zero point's int32 then
  holds its eight in the order 0, 2, 4, 6, 1, 3, 5, 7;
* whole-column scales and the bias: of every 32 columns, column 8a + 2i + e goes to place 8i + 2a + e.

``marlin_gemm`` takes one group for whole-column scales, whatever the group size was called. Act-order sorts the rows by group;
the kernel gathers the activations by ``perm``. It takes act-order with zero points, too, as compressed-tensors checkpoints
bring it, but not with a single group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlab.errors import PackingError
from qlab.packing import act_order, checks, nibbles
from qlab.weights import Int4Weight, sequential_groups

LAYOUT = "marlin"

Kind = Literal["uint4", "uint4b8"]


@dataclass(frozen=True, eq=False)
class MarlinTensors:
    """One layer, ready for ``marlin_gemm``."""

    qweight: Tensor
    """int32 [K/16, 2N]."""
    scales: Tensor
    """fp16 or bf16 [G, N], permuted."""
    zeros: Tensor | None
    """int32 [G, N/8], permuted; None for ``uint4b8``."""
    g_idx: Tensor
    """int32 [K], the group of each sorted row, or [0] without act-order."""
    perm: Tensor
    """int32 [K], the original row of each sorted row, or [0] without act-order."""
    kind: Kind
    """vLLM's scalar type: ``uint4`` with zero points, ``uint4b8`` with the zero point 8."""


def pack(weight: Int4Weight, kind: Kind | None = None, *, perm: Tensor | None = None) -> MarlinTensors:
    """``weight`` as Marlin reads it; ``kind`` defaults to ``uint4b8`` for a symmetric weight and ``uint4`` for any other.

    ``perm`` int32 [K] sorts the rows by group; by default the stable sort of an act-order weight's group index. Raises
    PackingError when K is not a multiple of 16 or N not one of 64, for a zero point that the kind cannot hold, or for a
    ``perm`` that does not sort or comes with a single group.
    """
    kind = kind or ("uint4b8" if weight.symmetric else "uint4")
    layout = f"{LAYOUT} {_known(kind)}"
    checks.multiples(weight, layout, k=16, n=64)
    if kind == "uint4":
        checks.zero_points(weight, layout, 0, 15, "use a layout that stores it less one, as gptq version 1")
    else:
        checks.zero_points(weight, layout, 8, 8, 'use kind "uint4"')
    if perm is not None and weight.groups == 1:
        checks.refuse(weight, layout, "marlin_gemm sorts no rows within a single group; leave perm out")
    order = act_order.order(weight, perm, layout)
    return MarlinTensors(
        pack_codes(act_order.sort(weight.codes, order)),
        permute_scales(weight.scales),
        pack_zeros(weight.zeros) if kind == "uint4" else None,
        weight.group_index[order.long()],
        order,
        kind,
    )


def unpack(tensors: MarlinTensors, *, name: str = "", input_scale: Tensor | None = None) -> Int4Weight:
    """The weight that ``tensors`` hold, the inverse of :func:`pack`. Raises PackingError naming the tensor that is wrong."""
    check = checks.Tensors(f"{LAYOUT} {_known(tensors.kind)}", name, tensors.qweight)
    check.codes("qweight", tensors.qweight)
    k, n = 16 * tensors.qweight.shape[0], tensors.qweight.shape[1] // 2
    if tensors.qweight.shape[1] % 128:
        check.refuse(f"qweight must have a multiple of 128 columns, two for each of N, not {tensors.qweight.shape[1]}")
    check.scales("scales", tensors.scales, columns=n)
    groups = tensors.scales.shape[0]
    size = check.group_size("scales", k, groups)
    if (tensors.zeros is None) != (tensors.kind == "uint4b8"):
        check.refuse("zeros must be int32 for uint4 and None for uint4b8")
    if tensors.perm.numel() or tensors.g_idx.numel():
        check.permutation("perm", tensors.perm, k)
        check.vector("g_idx", tensors.g_idx, k)
        if not torch.equal(tensors.g_idx, sequential_groups(k, size, tensors.g_idx.device)):
            check.refuse(f"g_idx must be sorted, {size} rows to each group, as it is after perm")
    if tensors.zeros is None:
        zeros = torch.full((groups, n), 8, dtype=torch.uint8, device=tensors.qweight.device)
    else:
        check.codes("zeros", tensors.zeros, groups, n // 8)
        zeros = unpack_zeros(tensors.zeros)
    codes = act_order.unsort(unpack_codes(tensors.qweight), tensors.perm)
    index = act_order.group_index(tensors.perm, k, groups)
    return check.weight(codes, zeros, unpermute_scales(tensors.scales), index, name, input_scale)


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 [K, N] to int32 [K/16, 2N] in tiles; K a multiple of 16, N of 64."""
    k, n = codes.shape
    tiles = codes.reshape(k // 16, 2, 4, 2, n // 64, 4, 2, 8)  # kt h t e nt w c r
    return nibbles.join(tiles.permute(0, 4, 7, 2, 5, 3, 6, 1).reshape(k // 16, 16 * n))  # kt nt r t w e c h


def unpack_codes(qweight: Tensor) -> Tensor:
    """int32 [K/16, 2N] to uint8 [K, N], the inverse of :func:`pack_codes`."""
    k, n = 16 * qweight.shape[0], qweight.shape[1] // 2
    tiles = nibbles.split(qweight).reshape(k // 16, n // 64, 8, 4, 4, 2, 2, 2)  # kt nt r t w e c h
    return tiles.permute(0, 7, 3, 5, 1, 4, 6, 2).reshape(k, n)  # kt h t e nt w c r


def permute_scales(scales: Tensor) -> Tensor:
    """[G, N] in Marlin's order: the grouped permutation for more than one group, the whole-column one for one. N % 64 == 0."""
    return _transpose_eights(scales) if scales.shape[0] > 1 else permute_bias(scales)


def unpermute_scales(scales: Tensor) -> Tensor:
    """The inverse of :func:`permute_scales`."""
    if scales.shape[0] > 1:
        return _transpose_eights(scales)
    return scales.unflatten(-1, (-1, 4, 4, 2)).transpose(-2, -3).reshape(scales.shape)


def pack_zeros(zeros: Tensor) -> Tensor:
    """uint8 [G, N] of 0 to 15 to int32 [G, N/8]; the grouped permutation, for a single group too. N % 64 == 0."""
    return nibbles.join(nibbles.even_then_odd(_transpose_eights(zeros)))


def unpack_zeros(packed: Tensor) -> Tensor:
    """int32 [G, N/8] to uint8 [G, N], the inverse of :func:`pack_zeros`."""
    return _transpose_eights(nibbles.undo_even_then_odd(nibbles.split(packed)))


def permute_bias(bias: Tensor) -> Tensor:
    """A bias [..., N] as ``marlin_gemm`` reads it, a contiguous copy: the whole-column scales' permutation.

    Raises PackingError when N is not a multiple of 32.
    """
    if bias.shape[-1] % 32:
        raise PackingError(f"marlin: a bias must have a multiple of 32 columns, not {bias.shape[-1]}; pad the layer")
    return checks.copied(bias.unflatten(-1, (-1, 4, 4, 2)).transpose(-2, -3).reshape(bias.shape))


def _transpose_eights(values: Tensor) -> Tensor:
    """Every 64 columns as an 8 x 8 matrix, transposed; its own inverse."""
    return values.unflatten(-1, (-1, 8, 8)).transpose(-1, -2).reshape(values.shape)


def _known(kind: str) -> str:
    if kind not in ("uint4", "uint4b8"):
        raise PackingError(f'marlin kind {kind!r} is not known; it is "uint4" or "uint4b8"')
    return kind
