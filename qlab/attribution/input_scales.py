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


def quotient(mine: Int4Weight, other: Int4Weight) -> Tensor | None:
    """By what an input of ``mine`` becomes one of ``other``: a factor, float64 [K] on the CPU; None where they are the same."""
    if mine is other or (mine.input_scale is None and other.input_scale is None):
        return None
    one, two = (torch.ones(w.K).double() if w.input_scale is None else w.input_scale.double().cpu() for w in (mine, other))
    return one / two


def divided(y: Tensor, quotient: Tensor) -> Tensor:
    """y [..., N], its last columns divided by ``quotient``, which is as long as they are many."""
    count = len(quotient)
    return torch.cat((y[..., :-count], y[..., -count:] / quotient), -1)


def moved_input(x: Tensor, mine: Int4Weight, other: Int4Weight) -> Tensor:
    """x [M, K] for ``mine`` as ``other`` takes it: in float64, rounded once to its dtype."""
    q = quotient(mine, other)
    return x if q is None else round_once(x.double() * q.to(x.device), other.dtype)


def moved_output(y: Tensor, mine: Int4Weight, other: Int4Weight) -> Tensor:
    """y [M, N] of the checkpoint of ``other`` in the units of that of ``mine``: float64, or y itself where they are the same.

    The two weights are those that take y's last columns as their input.
    """
    q = quotient(mine, other)
    return y if q is None else divided(y.double(), q.to(y.device))
