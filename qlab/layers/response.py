"""The linear response: which part of the final difference each linear's local difference would make, were the network linear.

One backward pass through A's network, one decoder layer in memory at a time, each run again from the residual stream that is
kept from the way forward. Gradients pass a linear through its dequantised weight in float64, and roundings as if there were
none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlab.engine.blocks import Blocks
from qlab.layers.coordinates import TAPS
from qlab.layers.layer import ALL_A, Layer
from qlab.layers.pair import B, Pair
from qlab.layers.result import EMBEDDING
from qlab.layers.walk import Advance, Swap, Walked


def responses(
    pair: Pair,
    tokens: Sequence[int],
    walked: Walked,
    swaps: Sequence[Swap],
    ids: Tensor,
    difference: Tensor,
    seed: int,
    advance: Advance = lambda n: None,
) -> dict[int, float]:
    """By swap with linears, and for the embedding: the first-order change of ``<logp, difference>`` at ``ids``.

    ``ids`` int64 [T, k], ``difference`` float64 [T, k].
    """
    by_name: dict[str, float] = {}
    gradient = _from_head(pair.a.blocks, walked.entered[-1], ids, difference)
    for index in reversed(range(pair.a.blocks.depth)):
        layer = Layer(pair, index, len(tokens), seed)
        hidden = walked.entered[index].clone().requires_grad_()
        seen = layer.run(hidden, ALL_A, way_back=True)
        gradient, *of_y = torch.autograd.grad(seen.out, [hidden, *(seen.y[tap] for tap in TAPS)], gradient)
        with torch.no_grad():
            for tap, g in zip(TAPS, of_y, strict=True):
                local = layer.give(tap, B, seen) - seen.y[tap][0]
                by_name[layer.names[tap]] = float((g[0] * local).sum())
        advance(2)
        del layer, seen
    first = pair.b.blocks.embed(tokens) - walked.entered[0]
    by_name[EMBEDDING] = float((gradient * first).sum())
    names = {j: [f"model.layers.{s.layer}.{tap}" for tap in s.taps] or [s.name] for j, s in enumerate(swaps)}
    return {j: sum(by_name[n] for n in found) for j, found in names.items() if all(n in by_name for n in found)}


def _from_head(blocks: Blocks, hidden: Tensor, ids: Tensor, difference: Tensor) -> Tensor:
    """Gradient [1, T, hidden] of ``<logp, difference>`` with respect to the residual stream behind the last layer."""
    with torch.no_grad():
        of_logits = -blocks.logprobs(hidden).exp() * difference.sum(-1, keepdim=True)
        of_logits.scatter_add_(1, ids, difference)
        behind, start = torch.zeros_like(hidden[0]), 0
        for part in blocks.heads():
            behind += of_logits[:, start : start + len(part)] @ part
            start += len(part)
    leaf = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(blocks.norm(leaf), leaf, behind[None])
    return gradient
