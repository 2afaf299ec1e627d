"""Causal attention in float64, sequence by sequence, over a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "qlab_float64"
"""What transformers knows :func:`attention` by."""
SCORES = 1 << 27
"""Float64 scores held at once (1 GiB)."""


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of one sequence, float64 [layers, kv_heads, tokens, head_dim] each."""

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, layers: int, heads: int, tokens: int, width: int, device: torch.device) -> Cache:
        shape = (layers, heads, tokens, width)
        return cls(*(torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2)))


@dataclass(frozen=True, eq=False)
class Placed:
    """Rows ``row:row + stop - start`` of a step: tokens ``start:stop`` of the sequence whose cache this is."""

    row: int
    start: int
    stop: int
    cache: Cache


def register() -> None:
    """Make :func:`attention` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    spans: Sequence[Placed],
    **others: Any,
) -> tuple[Tensor, None]:
    """Outputs [1, T, heads, head_dim] for query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim].

    The step's rows belong to ``spans``, which say where their keys and values go; each row attends to those up to its own.
    """
    _, heads, rows, width = query.shape
    out = query.new_empty((1, rows, heads, width))
    for s in spans:
        place = slice(s.row, s.row + s.stop - s.start)
        keys, values = s.cache.keys[module.layer_idx], s.cache.values[module.layer_idx]
        keys[:, s.start : s.stop], values[:, s.start : s.stop] = key[0, :, place], value[0, :, place]
        block = max(1, SCORES // (heads * s.stop))
        for first in range(s.start, s.stop, block):
            last = min(first + block, s.stop)
            part = slice(s.row + first - s.start, s.row + last - s.start)
            out[0, part] = _attend(query[0, :, part], keys[:, :last], values[:, :last], first, scaling)
    return out, None


def _attend(query: Tensor, keys: Tensor, values: Tensor, first: int, scaling: float) -> Tensor:
    """[rows, heads, width] for query [heads, rows, width] at positions ``first`` to the last of keys and values."""
    heads, rows, width = query.shape
    kv_heads, tokens = keys.shape[0], keys.shape[1]
    grouped = query.reshape(kv_heads, heads // kv_heads * rows, width)  # the heads that share a key
    scores = (grouped @ keys.transpose(1, 2)).view(heads, rows, tokens) * scaling
    if rows > 1:
        ahead = torch.ones((rows, tokens), dtype=torch.bool, device=query.device).triu(first + 1)
        scores.masked_fill_(ahead, -torch.inf)
    mixed = scores.softmax(-1).view(kv_heads, -1, tokens) @ values
    return mixed.view(heads, rows, width).transpose(0, 1)
