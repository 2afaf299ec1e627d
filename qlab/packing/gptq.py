"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

Row k of the codes lies in int32 row k // 8, nibble k % 8; column n of the zero points in int32 n // 8, nibble n % 8. Version 1
stores a zero point less one, and readers add the one after unpacking, so stored 15 means 16; version 2 stores it as it is.
vLLM reads version 2 where the checkpoint says ``checkpoint_format: gptq_v2``. A symmetric version 1 layer has every
``qzeros`` at 0x77777777.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qlab.errors import PackingError
from qlab.packing import checks, nibbles
from qlab.weights import Int4Weight

LAYOUT = "gptq"

Version = Literal[1, 2]


@dataclass(frozen=True, eq=False)
class GptqTensors:
    """One layer."""

    qweight: Tensor
    """int32 [K/8, N]."""
    qzeros: Tensor
    """int32 [G, N/8]."""
    scales: Tensor
    """fp16 or bf16 [G, N]."""
    g_idx: Tensor
    """int32 [K], the group of each row; ``k // group_size`` without act-order."""
    version: Version = 1
    """How ``qzeros`` stores a zero point: less one (1) or as it is (2)."""


def pack(weight: Int4Weight, version: Version = 1) -> GptqTensors:
    """``weight`` as GPTQ stores it.

    Raises PackingError when K or N is not a multiple of 8, or for a zero point that the version cannot hold: 0 in version 1,
    16 in version 2.
    """
    checks.multiples(weight, LAYOUT, k=8, n=8)
    qzeros = pack_zeros(weight, version, LAYOUT)
    codes = nibbles.join_rows(weight.codes)
    return GptqTensors(codes, qzeros, checks.copied(weight.scales), checks.copied(weight.group_index), version)


def unpack(tensors: GptqTensors, *, name: str = "", input_scale: Tensor | None = None) -> Int4Weight:
    """The weight that ``tensors`` hold, the inverse of :func:`pack`. Raises PackingError naming the tensor that is wrong."""
    check = checks.Tensors(LAYOUT, name, tensors.qweight)
    check.codes("qweight", tensors.qweight)
    packed_k, n = tensors.qweight.shape
    check.scales("scales", tensors.scales, columns=n)
    groups = tensors.scales.shape[0]
    zeros = unpack_zeros(check, tensors.qzeros, tensors.version, groups, n)
    check.group_index("g_idx", tensors.g_idx, 8 * packed_k, groups)
    return check.weight(nibbles.split_rows(tensors.qweight), zeros, tensors.scales, tensors.g_idx, name, input_scale)


def pack_zeros(weight: Int4Weight, version: Version, layout: str) -> Tensor:
    """The zero points as ``qzeros`` int32 [G, N/8]; ``layout`` is named when the version cannot hold one."""
    offset = _offset(version)
    checks.zero_points(weight, f"{layout} version {version}", offset, 15 + offset, f"use version {3 - version}")
    return nibbles.join(weight.zeros - offset)


def unpack_zeros(check: checks.Tensors, qzeros: Tensor, version: Version, groups: int, n: int) -> Tensor:
    """The zero points uint8 [G, N] of ``qzeros``, whose shape and dtype are checked first."""
    if n % 8:
        check.refuse(f"qweight must have a multiple of 8 columns, not {n}, because qzeros packs eight to an int32")
    check.codes("qzeros", qzeros, groups, n // 8)
    return nibbles.split(qzeros) + _offset(version)


def _offset(version: int) -> int:
    """What readers add to a stored zero point."""
    if version not in (1, 2):
        raise PackingError(f"GPTQ has versions 1 and 2, not {version!r}")
    return 2 - version
