"""compressed-tensors' pack-quantized format, as llm-compressor writes it and vLLM reads it.

Everything is stored as the linear layer's own [N, K] weight. Codes are signed there, q - 8, but packed with the 8 added back:
column k of row n is nibble k % 8 of int32 (n, k // 8), with q itself in it. Zero points are packed the same way, but along N:
that of column n and group g is nibble n % 8 of int32 (n // 8, g). Sizes that are no multiple of 8 are filled up with zero
nibbles. A symmetric layer has no zero points, and a layer without act-order (``actorder: group``) no group index.

Checked against compressed-tensors 0.15.0.1, ``compressors/pack_quantized``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlab.packing import checks, nibbles
from qlab.weights import Int4Weight

LAYOUT = "compressed-tensors"


@dataclass(frozen=True, eq=False)
class CompressedTensors:
    """One layer."""

    weight_packed: Tensor
    """int32 [N, ceil(K/8)]."""
    weight_scale: Tensor
    """fp16 or bf16 [N, G]."""
    weight_shape: Tensor
    """int64 [2]: N, K."""
    weight_zero_point: Tensor | None
    """int32 [ceil(N/8), G], or None where every zero point is 8."""
    weight_g_idx: Tensor | None
    """int32 [K], the group of each row, or None without act-order; -1 throughout means none, too."""


def pack(weight: Int4Weight) -> CompressedTensors:
    """``weight`` as pack-quantized. Raises PackingError for zero point 16."""
    checks.zero_points(weight, LAYOUT, 0, 15, "pack it as gptq version 1, which stores 16 as 15")
    return CompressedTensors(
        _join(weight.codes.t()),
        checks.copied(weight.scales.t()),
        torch.tensor([weight.N, weight.K], device=weight.device),
        None if weight.symmetric else _join(weight.zeros).t().contiguous(),
        checks.copied(weight.group_index) if weight.act_order else None,
    )


def unpack(tensors: CompressedTensors, *, name: str = "", input_scale: Tensor | None = None) -> Int4Weight:
    """The weight that ``tensors`` hold, the inverse of :func:`pack`. Raises PackingError naming the tensor that is wrong."""
    check = checks.Tensors(LAYOUT, name, tensors.weight_packed)
    n, k = _shape(check, tensors.weight_shape)
    check.codes("weight_packed", tensors.weight_packed, n, -(-k // 8))
    check.scales("weight_scale", tensors.weight_scale, rows=n)
    groups = tensors.weight_scale.shape[1]
    check.group_size("weight_scale", k, groups)
    codes = nibbles.split(tensors.weight_packed)[:, :k].t()
    if tensors.weight_zero_point is None:
        zeros = torch.full((groups, n), 8, dtype=torch.uint8, device=codes.device)
    else:
        check.codes("weight_zero_point", tensors.weight_zero_point, -(-n // 8), groups)
        zeros = nibbles.split(tensors.weight_zero_point.t())[:, :n]
    index = tensors.weight_g_idx
    if index is not None and bool((index == -1).all()):
        index = None
    if index is not None:
        check.group_index("weight_g_idx", index, k, groups)
    return check.weight(codes, zeros, tensors.weight_scale.t(), index, name, input_scale)


def _join(values: Tensor) -> Tensor:
    return nibbles.join(pad(values, (0, -values.shape[-1] % 8)))


def _shape(check: checks.Tensors, weight_shape: Tensor) -> tuple[int, int]:
    if weight_shape.shape != (2,) or weight_shape.dtype not in (torch.int64, torch.int32):
        kind = str(weight_shape.dtype).removeprefix("torch.")
        check.refuse(f"weight_shape must be int64 [2] holding N and K, not {kind} {list(weight_shape.shape)}")
    n, k = (int(i) for i in weight_shape)
    if n <= 0 or k <= 0:
        check.refuse(f"weight_shape must hold positive N and K, not {n} and {k}")
    return n, k
