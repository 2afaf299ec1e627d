"""A Llama layer's units and how AWQ's input scales fold into the operation before each of them.

``x W = (x / s) (diag(s) W)``: the rows of W are multiplied by s, and whatever made x is divided by it. A layer is held as a
mapping from the module's path inside it to a tensor: projections [K, N], norms [K].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Unit(NamedTuple):
    """Projections that share one input, and with it one AWQ scale and one group index; vLLM runs them fused."""

    name: str
    members: tuple[str, ...]
    previous: str
    """What the unit's input comes from, channel by channel: a norm [K], or a projection whose columns are the channels."""


UNITS = (
    Unit("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Unit("o", ("self_attn.o_proj",), "self_attn.v_proj"),
    Unit("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Unit("down", ("mlp.down_proj",), "mlp.up_proj"),
)
PROJECTIONS = tuple(member for unit in UNITS for member in unit.members)
NORMS = ("input_layernorm", "post_attention_layernorm")


def foldable(unit: Unit, layer: Mapping[str, Tensor]) -> bool:
    """Whether every input channel has one channel of its own before it.

    Not so for o when query heads share value heads: v is then narrower than o's input, and o stays unscaled, as in AutoAWQ.
    """
    return layer[unit.previous].shape[-1] == layer[unit.members[0]].shape[0]


def fold(layer: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer with each named unit's scale [K] moved from its input into its weight: the same function of x.

    Attention mixes tokens and not channels, and ``silu(gate) * up`` acts channel by channel, so dividing v's and up's columns
    divides the inputs of o and down.
    """
    folded = dict(layer)
    for unit in UNITS:
        if unit.name not in scales:
            continue
        s = scales[unit.name]
        for member in unit.members:
            folded[member] = folded[member] * s.to(folded[member].dtype)[:, None]
        folded[unit.previous] = folded[unit.previous] / s.to(folded[unit.previous].dtype)
    return folded


def storable(scale: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 scale nearest ``scale`` [K] that a norm stored in ``dtype`` folds without a further error.

    The folded norm is ``RN(norm / s)``, which divides by ``norm / RN(norm / s)`` and not by s; that quotient is the scale to
    multiply the weight with. Channels whose norm is zero, or would become zero or infinite, keep scale 1.
    """
    norm = norm.double()
    stored = (norm / scale.double()).to(dtype).double()
    exact = norm / stored
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, 1.0).float()
