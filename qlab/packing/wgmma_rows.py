"""Rows of the transposed weight as the left operand of wgmma takes them from registers: our Triton GEMM's layout.

A tile is 64 columns, a block 128 rows of K; each column of a block lies in 64 consecutive bytes. With the bits of a row k of
the block named, from the lowest, i0, c (two bits), C, B, A, i1, code (k, n) is in int32 4c + 2 i1 + A of column n % 64 in tile
n // 64 and block k // 128, nibble 4 i0 + 2 B + C: int32 4c to 4c + 3 are what thread 4r + c of a warp holds of column r in the
fragments of eight instructions of 16 k each, and one mask yields both halves of a register (nibbles.even_then_odd).

Scales lie beside each other by block: R = 1, 2 or 4 for groups whose largest common divisor with 128 is 128, 64 or 32, and rows
of 128 / R take the r-th. With R = 1 there is one row of them for each group, for whole columns one in all. An int32 has either
a scale in the low half and -(1024 + z) in fp16, -(128 + z) in bf16, in the high half, or, where every zero point is 8, the
scales of columns 16t + r and 16t + r + 8, as a thread needs them.

N is padded to 64 and K to 128 by codes that decode to zero; with a zero point of 16 in a whole column to -s. Act-order sorts
the rows by group; the kernel is given x with its columns in the order of ``perm``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlab.packing import act_order, checks, nibbles
from qlab.weights import ACTIVATION_DTYPES, Int4Weight, sequential_groups

LAYOUT = "wgmma_rows"
COLUMNS, ROWS = 64, 128
"""Of a block."""
LEAST_GROUP = 32
MINUS_MAGIC = {torch.float16: 0xE400, torch.bfloat16: 0xC300}
"""Bits of -1024 and -128, in whose lowest bits a zero point is what is subtracted."""


@dataclass(frozen=True, eq=False)
class WgmmaRowsTensors:
    """One layer."""

    codes: Tensor
    """int32 [ceil(N/64), ceil(K/128), 64, 16]."""
    scales: Tensor
    """int32 [ceil(N/64), S, 64, R] with zero points, [ceil(N/64), S, 32, R] without."""
    perm: Tensor
    """int32 [K], the original row of each sorted row, or [0] without act-order."""
    shape: tuple[int, int]
    """K and N."""
    group_size: int
    dtype: torch.dtype
    """Of the scales."""

    @property
    def symmetric(self) -> bool:
        return self.scales.shape[2] == COLUMNS // 2


def scales_per_block(k: int, group_size: int) -> int:
    """R, the scales of a column in a block of 128 rows."""
    return 1 if group_size == k else ROWS // gcd(group_size, ROWS)


def scale_rows(k: int, group_size: int) -> int:
    """S, the rows of scales: one for each group, or with R > 1 for each block."""
    return k // group_size if scales_per_block(k, group_size) == 1 else -(-k // ROWS)


def pack(weight: Int4Weight, *, perm: Tensor | None = None) -> WgmmaRowsTensors:
    """``weight`` in this layout. ``perm`` int32 [K] sorts the rows by group; by default a stable sort under act-order.

    Raises PackingError for groups that are neither a multiple of 32 nor the whole column and for a ``perm`` that does not sort.
    """
    k, n, size = weight.K, weight.N, weight.group_size
    if size % LEAST_GROUP and weight.groups > 1:
        checks.refuse(weight, LAYOUT, f"groups of {size} rows are neither a multiple of {LEAST_GROUP} nor the whole column")
    order = act_order.order(weight, perm, LAYOUT)
    blocks, columns = -(-k // ROWS), -n % COLUMNS
    per_block = scales_per_block(k, size)
    neutral = 8 if weight.symmetric else 0
    zeros, scales = pad(weight.zeros, (0, columns), value=neutral), pad(weight.scales, (0, columns), value=1)
    if per_block > 1:  # from groups to stretches of 128 / R rows
        group = torch.arange(blocks * per_block, device=weight.device) * (ROWS // per_block) // size
        beyond = (group >= weight.groups)[:, None]
        zeros, scales = zeros[group.clamp(max=weight.groups - 1)], scales[group.clamp(max=weight.groups - 1)]
        zeros, scales = zeros.masked_fill(beyond, neutral), scales.masked_fill(beyond, 1)
    codes = pad(act_order.sort(weight.codes, order), (0, columns), value=neutral)
    codes = torch.cat([codes, zeros[-1:].clamp(max=15).expand(blocks * ROWS - k, -1)])
    words = pack_scales(scales, None if weight.symmetric else zeros, per_block)
    return WgmmaRowsTensors(pack_codes(codes), words, order, (k, n), size, weight.dtype)


def unpack(tensors: WgmmaRowsTensors, *, name: str = "", input_scale: Tensor | None = None) -> Int4Weight:
    """The weight that ``tensors`` hold, the inverse of :func:`pack`. Raises PackingError naming the tensor that is wrong."""
    (k, n), size = tensors.shape, tensors.group_size
    check = checks.Tensors(LAYOUT, name, tensors.codes)
    if min(k, n, size) < 1 or k % size or (size % LEAST_GROUP and size != k):
        check.refuse(f"no weight has K={k}, N={n} and groups of {size} rows here")
    if tensors.dtype not in ACTIVATION_DTYPES:
        check.refuse(f"dtype must be fp16 or bf16, not {tensors.dtype}")
    tiles, per_block = -(-n // COLUMNS), scales_per_block(k, size)
    _shaped(check, "codes", tensors.codes, [(tiles, -(-k // ROWS), COLUMNS, ROWS // 8)])
    found: list[tuple[int, ...]] = [(tiles, scale_rows(k, size), columns, per_block) for columns in (COLUMNS, COLUMNS // 2)]
    _shaped(check, "scales", tensors.scales, found)
    if tensors.perm.numel():
        check.permutation("perm", tensors.perm, k)
    scales, zeros = unpack_scales(tensors.scales, tensors.dtype, symmetric=tensors.symmetric)
    if per_block > 1:  # the first stretch of each group
        first = torch.arange(k // size, device=scales.device) * size // (ROWS // per_block)
        scales, zeros = scales[first], zeros[first]
    codes = act_order.unsort(unpack_codes(tensors.codes)[:k, :n].contiguous(), tensors.perm)
    index = act_order.unsort(sequential_groups(k, size, codes.device), tensors.perm)
    return check.weight(codes, zeros[:, :n], scales[:, :n], index, name, input_scale)


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 [K, N] to int32 [N/64, K/128, 64, 16]; K a multiple of 128, N of 64."""
    k, n = codes.shape
    bits = codes.reshape(k // ROWS, 2, 2, 2, 2, 4, 2, n // COLUMNS, COLUMNS)  # block i1 A B C c i0 tile column
    return nibbles.join(bits.permute(7, 0, 8, 5, 1, 2, 6, 3, 4).reshape(n // COLUMNS, k // ROWS, COLUMNS, ROWS))


def unpack_codes(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_codes`."""
    tiles, blocks = words.shape[:2]
    bits = nibbles.split(words).reshape(tiles, blocks, COLUMNS, 4, 2, 2, 2, 2, 2)  # tile block column c i1 A i0 B C
    return bits.permute(1, 4, 5, 7, 8, 3, 6, 0, 2).reshape(blocks * ROWS, tiles * COLUMNS)


def pack_scales(scales: Tensor, zeros: Tensor | None, per_block: int) -> Tensor:
    """Scales [S * R, N] and zero points (None: all are 8) to int32 [N/64, S, 64, R] or [N/64, S, 32, R]; N a multiple of 64."""
    low = _by_tile(scales.view(torch.int16), per_block)
    if zeros is not None:
        high = _by_tile(zeros.to(torch.int32), per_block) | MINUS_MAGIC[scales.dtype]
    else:
        pairs = low.unflatten(2, (4, 2, 8))  # tile row t u r R
        low, high = pairs[:, :, :, 0].flatten(2, 3), pairs[:, :, :, 1].flatten(2, 3)
    return torch.stack((low.to(torch.int16), _int16(high)), -1).view(torch.int32).squeeze(-1)


def unpack_scales(words: Tensor, dtype: torch.dtype, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales [S * R, N] and zero points uint8 [S * R, N], the inverse of :func:`pack_scales`."""
    low, high = words.contiguous().view(torch.int16).unflatten(-1, (-1, 2)).unbind(-1)
    if symmetric:
        halves = torch.stack((low.unflatten(2, (4, 8)), high.unflatten(2, (4, 8))), 3)  # tile row t u r R
        scales = _by_row(halves.flatten(2, 4))
        return scales.view(dtype), torch.full_like(scales, 8, dtype=torch.uint8)
    return _by_row(low).view(dtype), _by_row((high & 31).to(torch.uint8))


def _by_tile(rows: Tensor, per_block: int) -> Tensor:
    """[S * R, N] to [N/64, S, 64, R]."""
    return rows.unflatten(0, (-1, per_block)).unflatten(2, (-1, COLUMNS)).permute(2, 0, 3, 1).contiguous()


def _by_row(tiles: Tensor) -> Tensor:
    """The inverse of :func:`_by_tile`."""
    return tiles.permute(1, 3, 0, 2).flatten(2).flatten(0, 1).contiguous()


def _int16(bits: Tensor) -> Tensor:
    """Values of 16 bits as int16, the highest bit as its sign."""
    return bits if bits.dtype == torch.int16 else torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16)


def _shaped(check: checks.Tensors, label: str, t: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if t.dtype != torch.int32 or tuple(t.shape) not in shapes or t.device != check.device:
        wanted = " or ".join(str(list(s)) for s in shapes)
        found = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"
        check.refuse(f"{label} must be int32 {wanted} on {check.device}, not {found}")
