"""The layout of qlab's own CUDA kernels: the weight as a stream of blocks, each of which one thread block loads in one piece.

A block holds 64 columns and 128 rows of K, as int32 words:

* codes, 1,024 words: word ``((4c + t) * 32 + lane) * 2 + h`` belongs to rows 32c + 16h to 32c + 16h + 15 and columns 16t to
  16t + 15 of the block. It holds what ``lane`` of a warp multiplies in one m16n8k16 for these columns and one for the next
  eight: with k = 2 (lane % 4) + e + 8b and n = lane // 4 + 8u, code (k, n) is nibble 4e + 2u + b;
* scales, R rows of 64 16-bit values for groups of 128 / R rows: column 16t + 8u + r lies at place 16t + 2r + u. A group of
  more than 128 rows is repeated in each of its blocks (R = 1), as is a whole column;
* zero points, R rows of 64 bytes, placed as the scales; only where the weight is not symmetric.

N is padded to 64 and K to 128 with code 0, scale 1 and zero point 0. Act-order sorts the rows by group, and whoever calls the
kernel gathers the activations by ``perm``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlab.packing import act_order, checks, nibbles
from qlab.weights import ACTIVATION_DTYPES, Int4Weight

LAYOUT = "fragments"
COLUMNS, ROWS = 64, 128
"""Of a block."""
CODE_WORDS, SCALE_WORDS, ZERO_WORDS = 1024, 32, 16
"""int32 words of a block's codes, of one row of scales and of one row of zero points."""
STRETCH = 1 << 24
"""Codes packed at once, which bounds the memory for what lies between."""


@dataclass(frozen=True, eq=False)
class FragmentTensors:
    """One layer, ready for qlab's CUDA kernels."""

    blocks: Tensor
    """int32 [ceil(N/64), ceil(K/128), W]."""
    column_scales: Tensor
    """fp16 or bf16 [N]: the scales of a whole column once more, for kernels that multiply the sum by them; else [0]."""
    perm: Tensor
    """int32 [K], the original row of each sorted row, or [0] without act-order."""
    k: int
    n: int
    group_size: int
    """K for a whole column."""
    symmetric: bool
    """Whether every zero point is 8 and none is stored."""
    dtype: torch.dtype
    """Of the scales."""


def refusal(k: int, n: int, group_size: int) -> str:
    """Why the layout cannot hold a weight [k, n] with groups of ``group_size`` rows, one sentence; empty where it can."""
    if k % 32:
        return f"K={k} is not a multiple of 32"
    if n % 8:
        return f"N={n} is not a multiple of 8"
    if group_size not in (32, 64, k) and group_size % ROWS:
        return f"groups of {group_size} rows are neither 32, 64, a multiple of 128 nor the whole column"
    return ""


def scale_rows(k: int, group_size: int) -> int:
    """R, the rows of scales in a block: 4 for groups of 32, 2 for groups of 64, 1 for larger ones and for a whole column."""
    return 1 if group_size == k else max(1, ROWS // group_size)


def block_words(rows: int, symmetric: bool) -> int:
    """W, the int32 words of a block with that many rows of scales."""
    return CODE_WORDS + rows * (SCALE_WORDS + (0 if symmetric else ZERO_WORDS))


def pack(weight: Int4Weight, *, perm: Tensor | None = None) -> FragmentTensors:
    """``weight`` as qlab's CUDA kernels read it.

    ``perm`` int32 [K] sorts the rows by group; by default the stable sort of an act-order weight's group index. Raises
    PackingError when K is not a multiple of 32 or N not one of 8, for a group that is neither 32, 64, a multiple of 128 nor
    the whole column, and for a ``perm`` that does not sort.
    """
    k, n, symmetric = weight.K, weight.N, weight.symmetric
    if why := refusal(k, n, weight.group_size):
        checks.refuse(weight, LAYOUT, why)
    order = act_order.order(weight, perm, LAYOUT)
    rows = scale_rows(k, weight.group_size)
    scale_end = CODE_WORDS + rows * SCALE_WORDS
    words = block_words(rows, symmetric)
    blocks = torch.empty(-(-n // COLUMNS), -(-k // ROWS), words, dtype=torch.int32, device=weight.device)
    for place, columns in _stretches(k, n):
        into = blocks[place]
        into[..., :CODE_WORDS] = _pack_codes(act_order.sort(weight.codes[:, columns], order))
        scales = _per_block(weight.scales[:, columns], k, weight.group_size, 1)
        into[..., CODE_WORDS:scale_end] = scales.view(torch.int32).flatten(2)
        if not symmetric:
            zeros = _per_block(weight.zeros[:, columns], k, weight.group_size, 0)
            into[..., scale_end:] = zeros.view(torch.int32).flatten(2)
    whole = weight.scales[0] if weight.groups == 1 else weight.scales.new_empty(0)
    return FragmentTensors(blocks, checks.copied(whole), order, k, n, weight.group_size, symmetric, weight.dtype)


def unpack(tensors: FragmentTensors, *, name: str = "", input_scale: Tensor | None = None) -> Int4Weight:
    """The weight that ``tensors`` hold, the inverse of :func:`pack`. Raises PackingError naming the tensor that is wrong."""
    t, check = tensors, checks.Tensors(LAYOUT, name, tensors.blocks)
    _check(t, check)
    rows = scale_rows(t.k, t.group_size)
    scale_end = CODE_WORDS + rows * SCALE_WORDS
    codes = torch.empty(t.k, t.n, dtype=torch.uint8, device=t.blocks.device)
    scales = torch.empty(t.k // t.group_size, t.n, dtype=t.dtype, device=t.blocks.device)
    zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device=t.blocks.device)
    for place, columns in _stretches(t.k, t.n):
        part, width = t.blocks[place], columns.stop - columns.start
        codes[:, columns] = act_order.unsort(_unpack_codes(part[..., :CODE_WORDS])[: t.k, :width], t.perm)
        stored = part[..., CODE_WORDS:scale_end].contiguous().view(t.dtype)
        scales[:, columns] = _per_group(stored, rows, t.k, t.group_size)[:, :width]
        if not t.symmetric:
            stored = part[..., scale_end:].contiguous().view(torch.uint8)
            zeros[:, columns] = _per_group(stored, rows, t.k, t.group_size)[:, :width]
    if t.column_scales.numel() and not torch.equal(t.column_scales.view(torch.int16), scales[0].view(torch.int16)):
        check.refuse("column_scales differ from the scales in the blocks")
    index = act_order.group_index(t.perm, t.k, scales.shape[0])
    return check.weight(codes, zeros, scales, index, name, input_scale)


def _check(t: FragmentTensors, check: checks.Tensors) -> None:
    """Refuse tensors whose shapes, dtypes and numbers do not go together."""
    if t.dtype not in ACTIVATION_DTYPES:
        check.refuse(f"dtype must be fp16 or bf16, not {t.dtype}")
    if min(t.k, t.n, t.group_size) < 1 or t.k % t.group_size:
        check.refuse(f"k={t.k} must be a positive multiple of group_size={t.group_size}, and n={t.n} positive")
    if why := refusal(t.k, t.n, t.group_size):
        check.refuse(why)
    words = block_words(scale_rows(t.k, t.group_size), t.symmetric)
    shape = (-(-t.n // COLUMNS), -(-t.k // ROWS), words)
    if t.blocks.dtype != torch.int32 or tuple(t.blocks.shape) != shape:
        check.refuse(f"blocks must be int32 {list(shape)}, not {t.blocks.dtype} {list(t.blocks.shape)}")
    width = t.n if t.group_size == t.k else 0
    if t.column_scales.dtype != t.dtype or tuple(t.column_scales.shape) != (width,):
        check.refuse(f"column_scales must be {t.dtype} [{width}], not {t.column_scales.dtype} {list(t.column_scales.shape)}")
    if t.perm.numel():
        check.permutation("perm", t.perm, t.k)


def _stretches(k: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Blocks and columns that are packed together."""
    blocks = max(1, STRETCH // (COLUMNS * -(-k // ROWS) * ROWS))
    for first in range(0, -(-n // COLUMNS), blocks):
        last = min(first + blocks, -(-n // COLUMNS))
        yield slice(first, last), slice(first * COLUMNS, min(last * COLUMNS, n))


def _pack_codes(codes: Tensor) -> Tensor:
    """uint8 [K, n] to int32 [n/64, K/128, 1024], padded."""
    k, n = codes.shape
    if k % ROWS or n % COLUMNS:
        codes = pad(codes, (0, -n % COLUMNS, 0, -k % ROWS))
    parts = codes.reshape(-1, 4, 2, 2, 4, 2, codes.shape[1] // COLUMNS, 4, 2, 8)  # block c h b lane%4 e block t u lane//4
    words = nibbles.join(parts.permute(6, 0, 1, 7, 9, 4, 2, 5, 8, 3).flatten(-3))
    return words.flatten(2)


def _unpack_codes(words: Tensor) -> Tensor:
    """The inverse of :func:`_pack_codes`, padding included: uint8 [K, n]."""
    parts = nibbles.split(words).reshape(*words.shape[:2], 4, 4, 8, 4, 2, 2, 2, 2)  # block block c t lane//4 lane%4 h e u b
    k = parts.permute(1, 2, 6, 9, 5, 7, 0, 3, 8, 4)  # block c h b lane%4 e block t u lane//4
    return k.reshape(words.shape[1] * ROWS, words.shape[0] * COLUMNS)


def _per_block(values: Tensor, k: int, group_size: int, padding: int) -> Tensor:
    """[G, n] to [n/64, K/128, R, 64] in the places of the blocks, contiguous."""
    rows = scale_rows(k, group_size)
    starts = torch.arange(0, -(-k // ROWS) * ROWS, ROWS // rows, device=values.device)
    found = values[(starts // group_size).clamp(max=values.shape[0] - 1)]
    if k % ROWS and rows > 1:
        found[starts >= k] = padding
    found = pad(found, (0, -values.shape[1] % COLUMNS), value=padding)
    placed = found.reshape(-1, rows, found.shape[1] // COLUMNS, 4, 2, 8)  # block row block t u r
    return placed.permute(2, 0, 1, 3, 5, 4).reshape(placed.shape[2], placed.shape[0], rows, COLUMNS).contiguous()


def _per_group(stored: Tensor, rows: int, k: int, group_size: int) -> Tensor:
    """The inverse of :func:`_per_block`, each group from its first row: [G, n], with N's padding."""
    columns, blocks = stored.shape[:2]
    placed = stored.reshape(columns, blocks, rows, 4, 8, 2).permute(1, 2, 0, 3, 5, 4)  # block row block t u r
    flat = placed.reshape(blocks * rows, columns * COLUMNS)
    starts = torch.arange(0, k, group_size, device=stored.device)
    return flat[starts // (ROWS // rows)]
