"""AWQ's input scales between two checkpoints of one model: what one calls x / s is x to the other.

``x W = (x / s) (diag(s) W)``: AWQ divides a linear's input by s, and whatever makes that input with it. For qkv and gate_up
that is a norm. For down it is the up projection, the last columns of gate_up; for o, where every query head has a value head
of its own, the last columns of qkv. There two checkpoints give one value in two units, as they take it in two at an input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlab.weights import Int4Weight, round_once

CONSUMERS = {"self_attn.qkv_proj": "self_attn.o_proj", "mlp.gate_up_proj": "mlp.down_proj"}
"""A linear whose last columns may be the channels of another's input, to that one."""


def consumer(linear: str, *, own_values: bool) -> str:
    """Whose input the last columns of ``linear`` are, channel by channel; empty where they are none's.

    ``own_values``: whether every query head has a value head of its own.
    """
    for name, other in CONSUMERS.items():
        if linear.endswith(name) and (own_values or "self_attn" not in name):
            return linear.removesuffix(name) + other
    return ""


def moved_input(x: Tensor, mine: Int4Weight, other: Int4Weight) -> Tensor:
    """x [M, K] for ``mine`` as ``other`` takes it: in float64, rounded once to its dtype."""
    if mine is other or (mine.input_scale is None and other.input_scale is None):
        return x
    wide = x.double() if mine.input_scale is None else x.double() * mine.input_scale.double().to(x.device)
    return round_once(wide if other.input_scale is None else wide / other.input_scale.double().to(x.device), other.dtype)


def moved_output(y: Tensor, mine: Int4Weight, other: Int4Weight) -> Tensor:
    """y [M, N] of the checkpoint of ``other`` in the units of that of ``mine``: float64, or y itself where they are the same.

    The two weights are those that take y's last columns as their input.
    """
    if mine is other or (mine.input_scale is None and other.input_scale is None):
        return y
    one, two = (1.0 if w.input_scale is None else w.input_scale.double().to(y.device) for w in (mine, other))
    wide = y.double()
    return torch.cat((wide[:, : -mine.K], wide[:, -mine.K :] * two / one), 1)
