"""AWQ's input scales between two checkpoints: what one calls x / s is x to the other.

``x W = (x / s) (diag(s) W)``: AWQ divides a linear's input by s and folds the division into whatever makes that input. For qkv
and gate_up that is the norm before them, which changes sides with them. For down it is the up projection, for o the v
projection where every query head has its own: there a value that passes from one checkpoint to another is multiplied by
``s_from / s_to`` in float64, before it is rounded once as any input is. qlab's checkpoints keep s and GPTQ has none; of others
the quotient is estimated from the columns that s was folded into, which differ by it and by rounding to INT4 (on the shipped
model's AWQ and GPTQ checkpoints the estimate is 1% off on average). An error there is a part of the hybrids alone: both ends of
the way from A to B pass nothing between checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.attribution.input_scales import consumer, divided, quotient
from qlab.engine.blocks import Block
from qlab.lab import activations
from qlab.layers.pair import A, B, Pair

QKV, OUT, GATE_UP, DOWN = TAPS = tuple(activations.TAPS)
"""A decoder layer's linears in the order of the network."""
MADE_BY = {OUT: (QKV, "input_layernorm"), DOWN: (GATE_UP, "post_attention_layernorm")}
"""A linear whose input another one makes: that one, and the norm before it."""
KEPT, ESTIMATED = "kept", "estimated"
UNSCALED = ("gptq", "unquantised")
"""Methods whose inputs are the model's own."""


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Of one decoder layer: ``x_B = x_A * quotient``, channel by channel, float64 [K], for o and down where it is not 1."""

    quotients: Mapping[str, Tensor]

    def enter(self, tap: str, x: Tensor, to: int) -> Tensor:
        """The input [..., K] of the other side's linear, as side ``to`` expects it."""
        q = self.quotients.get(tap)
        return x if q is None else x * q if to == B else x / q

    def leave(self, tap: str, y: Tensor) -> Tensor:
        """B's output [T, N] as A would have it: the columns that become a scaled input are the last ones."""
        q = self.quotients.get(consumer(tap, own_values=True))
        return y if q is None else divided(y, q)


def known(pair: Pair) -> bool:
    """Whether the scales of both checkpoints are known, and need not be estimated."""
    return all(side.blocks.files.method in UNSCALED or side.blocks.files.keeps_input_scales for side in pair.sides)


def how(pair: Pair) -> str:
    """``kept`` or ``estimated``; empty for one checkpoint."""
    return "" if pair.one_checkpoint else KEPT if known(pair) else ESTIMATED


def coordinates(pair: Pair, blocks: tuple[Block, Block]) -> Coordinates:
    """Of a decoder layer, from its blocks on either side."""
    found: dict[str, Tensor] = {}
    if pair.one_checkpoint:
        return Coordinates(found)
    for tap in (OUT, DOWN) if pair.a.blocks.own_values else (DOWN,):
        q = quotient(*(b.linears[tap].weight for b in blocks)) if known(pair) else _estimated(tap, blocks)
        if q is not None and bool((q != 1).any()):
            found[tap] = q.to(pair.device)
    return Coordinates(found)


def _estimated(tap: str, blocks: tuple[Block, Block]) -> Tensor:
    """From the columns that make the input, as they act on the normalised residual stream: the quotient of their lengths.

    1 where most of a column's entries are equal: a copy, changed here and there, was scaled alike.
    """
    producer, norm = MADE_BY[tap]
    columns = []
    for b in blocks:
        made = b.linears[producer].weight
        w = made.columns(made.N - b.linears[tap].K, made.N).dequantize(torch.float32).cpu()
        columns.append(w * b.module.get_submodule(norm).weight.float().cpu()[:, None])
    q = columns[B].norm(dim=0).double() / columns[A].norm(dim=0).double()
    alike = (columns[A] == columns[B]).float().mean(0) > 0.5
    return torch.where(torch.isfinite(q) & (q > 0) & ~alike, q, 1.0)
