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

from qlab.engine.blocks import Block
from qlab.lab import activations
from qlab.layers.pair import A, B, Pair
from qlab.weights import Int4Weight

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
        for consumer, (producer, _) in MADE_BY.items():
            if tap == producer and consumer in self.quotients:
                q = self.quotients[consumer]
                y = torch.cat((y[..., : -len(q)], y[..., -len(q) :] / q), -1)
        return y


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
    config = pair.a.blocks.config
    own_values = config.num_attention_heads == config.num_key_value_heads
    for tap in (OUT, DOWN) if own_values else (DOWN,):
        q = _kept(*(b.linears[tap].weight for b in blocks)) if known(pair) else _estimated(tap, blocks)
        if bool((q != 1).any()):
            found[tap] = q.to(pair.device)
    return Coordinates(found)


def _kept(a: Int4Weight, b: Int4Weight) -> Tensor:
    scales = [torch.ones(w.K).double() if w.input_scale is None else w.input_scale.double().cpu() for w in (a, b)]
    return scales[A] / scales[B]


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
