"""One decoder layer of both paths in memory, run with each linear from either of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab.engine.attention import Placed
from qlab.engine.linear import Linear
from qlab.layers.coordinates import GATE_UP, QKV, TAPS, coordinates
from qlab.layers.pair import A, B, Pair
from qlab.weights import Int4Weight, round_once

Sides = tuple[int, int, int, int]
"""Which side each linear comes from, in the order of :data:`TAPS`. A norm comes with the linear behind it."""
ALL_A, ALL_B = (A,) * 4, (B,) * 4
PANEL = 1 << 26
"""Elements of a weight in float64 at once, for the way back."""


@dataclass(eq=False)
class Pass:
    """A run of the layer: the residual stream before attention, before the MLP and behind; what each linear got and gave."""

    hidden: Tensor
    middle: Tensor = field(init=False)
    out: Tensor = field(init=False)
    x: dict[str, Tensor] = field(default_factory=dict)
    """float64 [1, T, K], before it was rounded."""
    y: dict[str, Tensor] = field(default_factory=dict)
    """float64 [1, T, N], values of the weight's dtype."""


class Layer:
    """Decoder layer ``index`` of both sides, for one sequence of ``tokens``; gone with its last reference."""

    def __init__(self, pair: Pair, index: int, tokens: int, seed: int) -> None:
        self.pair, self.tokens, self.seed = pair, tokens, seed
        me = weakref.proxy(self)  # a block that held its layer would outlive it until the garbage is collected
        a = pair.a.blocks.block(index, pair.a.path, pair.a.native, partial(Layer._call, me, A))
        like = a if pair.one_checkpoint else None
        b = pair.b.blocks.block(index, pair.b.path, pair.b.native, partial(Layer._call, me, B), like)
        self.blocks = (a, b)
        self.names = {tap: a.linears[tap].name for tap in TAPS}
        self._taps = {name: tap for tap, name in self.names.items()}
        self._coordinates = coordinates(pair, self.blocks)
        for block in self.blocks:
            block.module.requires_grad_(False)
            block.module.self_attn.layer_idx = 0  # a cache of this layer alone
        self._sides: Sides = ALL_A
        self._pass = Pass(torch.empty(0))
        self._way_back = False

    def run(self, hidden: Tensor, sides: Sides, *, way_back: bool = False) -> Pass:
        """The layer on the residual stream [1, T, hidden], float64, with each linear from its side.

        ``way_back`` lets gradients pass: through a linear as through its dequantised weight in float64, through roundings as if
        there were none.
        """
        self._sides, self._way_back, self._pass = sides, way_back, Pass(hidden)
        seen = self._pass
        positions = torch.arange(self.tokens, device=hidden.device)
        cosine, sine = self.pair.a.blocks.turn(self.tokens)
        spans = [Placed(0, 0, self.tokens, self.pair.a.blocks.cache(1, self.tokens))]
        first, second = (self.blocks[sides[TAPS.index(tap)]].module for tap in (QKV, GATE_UP))
        mixed, _ = first.self_attn(
            hidden_states=first.input_layernorm(hidden),
            attention_mask=None,
            position_ids=positions[None],
            position_embeddings=(cosine[:, positions], sine[:, positions]),
            spans=spans,
        )
        seen.middle = hidden + mixed
        seen.out = seen.middle + second.mlp(second.post_attention_layernorm(seen.middle))
        self._pass = Pass(torch.empty(0))
        return seen

    def give(self, tap: str, side: int, seen: Pass) -> Tensor:
        """What ``side``'s linear gives for the input that the other side's run had: float64 [T, N], in A's coordinates."""
        module = self.blocks[side].module
        if tap == QKV:
            x = module.input_layernorm(seen.hidden)
        elif tap == GATE_UP:
            x = module.post_attention_layernorm(seen.middle)
        else:
            x = self._coordinates.enter(tap, seen.x[tap], side)
        return self.in_a(tap, side, _rounded_run(self.blocks[side].linears[tap], x, self.seed)[0])

    def in_a(self, tap: str, side: int, y: Tensor) -> Tensor:
        """A side's output [..., N] in A's coordinates."""
        return y if side == A else self._coordinates.leave(tap, y)

    def _call(self, own: int, linear: Linear, x: Tensor) -> Tensor:
        """What a module of side ``own`` calls in place of its linear."""
        tap = self._taps[linear.name]
        side = self._sides[TAPS.index(tap)]
        if side != own:
            x, linear = self._coordinates.enter(tap, x, side), self.blocks[side].linears[tap]
        y = _Straight.apply(x, linear, self.seed) if self._way_back else _rounded_run(linear, x, self.seed)
        self._pass.x[tap], self._pass.y[tap] = x, y
        return y


def _rounded_run(linear: Linear, x: Tensor, seed: int) -> Tensor:
    """y in float64 for float64 x [1, T, K]: rounded once, multiplied, widened, as :meth:`qlab.engine.llama.Llama.call`."""
    return linear.run(round_once(x[0], linear.dtype), seed).double()[None]


class _Straight(torch.autograd.Function):
    """A linear's own bits forward; backward the transposed weight, exact, and no rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear, seed: int) -> Tensor:
        ctx.weight = linear.weight
        return _rounded_run(linear, x, seed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _transposed(ctx.weight, gradients[0]), None, None


def _transposed(weight: Int4Weight, y: Tensor) -> Tensor:
    """``y @ W.T``, float64 [..., K] for y [..., N], a panel of columns at a time."""
    width = max(1, PANEL // weight.K)
    out = y.new_zeros((*y.shape[:-1], weight.K))
    for start in range(0, weight.N, width):
        stop = min(start + width, weight.N)
        out += y[..., start:stop] @ weight.columns(start, stop).to(y.device).dequantize(torch.float64).t()
    return out


def sides_with(taps: Sequence[str]) -> Sides:
    """These linears from B, the others from A."""
    found = tuple(B if tap in taps else A for tap in TAPS)
    return found  # type: ignore[return-value]
