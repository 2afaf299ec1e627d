"""Llama's and Qwen2's linears in vLLM's unit: one fused qkv, o, one fused gate_up, down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlab.errors import CheckpointError, QlabError
from qlab.weights import Int4Weight, fuse

if TYPE_CHECKING:
    from qlab.checkpoint.read import Checkpoint

FUSED: dict[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Fused linear to its shards, in the order of their columns; names are the last part of the module's."""
_FUSED_OF = {shard: whole for whole, shards in FUSED.items() for shard in shards}
_FORWARD = ("qkv_proj", *FUSED["qkv_proj"], "o_proj", "gate_up_proj", *FUSED["gate_up_proj"], "down_proj")


def forward_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key of module names: layers by number, inside a layer in the order in which the model runs them."""
    parts = name.split(".")
    depth = max((i + 1 for i, p in enumerate(parts) if p.isdecimal()), default=0)
    layer = tuple((1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts[:depth])
    rank = _FORWARD.index(parts[-1]) if parts[-1] in _FORWARD else len(_FORWARD)
    return (*layer, (2, rank, name))


def fused_name(name: str) -> str:
    """The vLLM linear that a module is part of; its own name when it is not fused."""
    parent, dot, last = name.rpartition(".")
    return f"{parent}{dot}{_FUSED_OF.get(last, last)}"


def shard_names(name: str) -> tuple[str, ...]:
    """The checkpoint's modules that a vLLM linear is made of, in the order of their columns."""
    parent, dot, last = name.rpartition(".")
    return tuple(f"{parent}{dot}{s}" for s in FUSED.get(last, (last,)))


def fused(checkpoint: Checkpoint) -> Iterator[Int4Weight]:
    """Every quantised linear as vLLM runs it, in the order of the forward pass, one in memory at a time.

    Raises CheckpointError when a shard is missing or the shards cannot be one layer (another group index, input scale).
    """
    for whole in dict.fromkeys(fused_name(n) for n in checkpoint.names()):
        yield fused_weight(checkpoint, whole)


def fused_weight(checkpoint: Checkpoint, name: str) -> Int4Weight:
    """One linear by vLLM's name (``...self_attn.qkv_proj``); errors as for :func:`fused`."""
    known = checkpoint.names()
    shards = (name,) if name in known else shard_names(name)
    for shard in shards:
        if shard not in known:
            raise CheckpointError(
                f"{checkpoint.directory}: module {shard!r}, a part of {name!r}, is not quantised here; "
                "quantise all or none of a fused layer"
            )
    weights = [checkpoint.weight(s) for s in shards]
    if len(weights) == 1:
        return weights[0]
    try:
        return fuse(weights, name)
    except QlabError as e:
        raise CheckpointError(f"{checkpoint.where(shards[-1])}: {e}; quantise the shards together") from None
