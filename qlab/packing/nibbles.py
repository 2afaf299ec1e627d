"""Eight 4-bit values in one int32, along the last dimension; nibble i is bits 4i to 4i+3.

Values travel as uint8 bytes and the int32 is a view of four of them (little-endian, as every machine with a GPU is), so no
shift ever meets the sign bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join(values: Tensor) -> Tensor:
    """uint8 [..., 8c] of 0 to 15 to int32 [..., c], contiguous: nibble i of element j is value 8j + i."""
    low, high = values.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | (high << 4)).contiguous().view(torch.int32)


def split(packed: Tensor) -> Tensor:
    """int32 [..., c] to uint8 [..., 8c], the inverse of :func:`join`."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def join_rows(values: Tensor) -> Tensor:
    """uint8 [8r, n] to int32 [r, n], contiguous: nibble i of element (j, n) is value (8j + i, n)."""
    return join(values.t()).t().contiguous()


def split_rows(packed: Tensor) -> Tensor:
    """int32 [r, n] to uint8 [8r, n], contiguous, the inverse of :func:`join_rows`."""
    return split(packed.t()).t().contiguous()


def even_then_odd(values: Tensor) -> Tensor:
    """Reorder every eight values as 0, 2, 4, 6, 1, 3, 5, 7.

    In this order one mask, ``0x000f000f`` shifted by 0, 4, 8 or 12, yields two neighbours in the two halves of a register,
    ready for 16-bit pair arithmetic. AWQ's columns, ExLlama's rows and Marlin's tiles and zero points all use it.
    """
    return values.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)


def undo_even_then_odd(values: Tensor) -> Tensor:
    """The inverse of :func:`even_then_odd`."""
    return values.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).flatten(-3)
