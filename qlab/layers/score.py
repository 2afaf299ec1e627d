"""Hybrids' log-probabilities against A's, and what each swap adds on the way to B's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from qlab.engine.sampling import largest
from qlab.errors import UnsupportedError
from qlab.layers.pair import Pair
from qlab.layers.result import HEAD, SwapRow
from qlab.layers.walk import Swap, Walked


@dataclass(frozen=True, eq=False)
class Scores:
    """Differences from A's log-probabilities at the ids that A finds most probable: float64 [T, k] each."""

    ids: Tensor
    """int64 [T, k], the largest of A's float32 log-probabilities; all of the vocabulary for k = 0."""
    b: Tensor
    nested: tuple[Tensor, ...]
    """By swap."""
    single: Mapping[int, Tensor]
    """By swap; without single swaps of linears, that of the head alone."""


@torch.no_grad()
def scores(pair: Pair, walked: Walked, swaps: Sequence[Swap], top_k: int) -> Scores:
    """Raises UnsupportedError where a log-probability is not a number."""
    a, b = (side.blocks for side in pair.sides)
    last = walked.entered[-1]
    of_a, of_b = a.logprobs(last), b.logprobs(walked.last_b)
    size = of_a.shape[-1]
    ids = largest(of_a.float(), min(top_k, size)) if top_k else torch.arange(size, device=last.device).repeat(len(of_a), 1)
    at = of_a.gather(1, ids)

    def difference(logprobs: Tensor, what: str) -> Tensor:
        if bool(logprobs.isnan().any()):
            raise UnsupportedError(
                f"a log-probability of {what} is not a number: a linear left the range of "
                f"{str(pair.dtype).removeprefix('torch.')}; run the model in another dtype"
            )
        return logprobs.gather(1, ids) - at

    difference(of_a, str(pair.a.path))
    nested, single = [], {}
    for j, swap in enumerate(swaps):
        if swap.name == HEAD:
            nested.append(difference(of_b, str(pair.b.path)))
            single[j] = difference(b.logprobs(last), f"{pair.a.path} with {HEAD} of the other")
            continue
        nested.append(difference(a.logprobs(walked.nested[j]), f"the hybrid up to {swap.name}"))
        if j in walked.single:
            single[j] = difference(a.logprobs(walked.single[j]), f"{pair.a.path} with {swap.name} of the other")
    return Scores(ids, difference(of_b, str(pair.b.path)), tuple(nested), single)


def by_row(difference: Tensor) -> list[float]:
    """v of each row of differences [T, k]."""
    found: list[float] = difference.square().sum(-1).tolist()
    return found


def swap_rows(swaps: Sequence[Swap], found: Scores, responses: Mapping[int, float], singles: bool) -> tuple[SwapRow, ...]:
    """Each swap's share of v and of the projection on B's difference, in the order of the network."""
    project = _projection(found.b)
    before, v_before = torch.zeros_like(found.b), [0.0] * len(found.b)
    rows = []
    for j, (swap, difference) in enumerate(zip(swaps, found.nested, strict=True)):
        v = by_row(difference)
        alone = found.single.get(j)
        response = project(alone) if swap.name == HEAD and alone is not None else project(responses[j])
        rows.append(
            SwapRow(
                swap.name,
                tuple(f"model.layers.{swap.layer}.{tap}" for tap in swap.taps),
                math.fsum(v),
                float(Fraction(math.fsum(v)) - Fraction(math.fsum(v_before))),
                tuple(now - then for now, then in zip(v, v_before, strict=True)),
                project(difference - before),
                response,
                math.fsum(by_row(alone)) if singles and alone is not None else None,
            )
        )
        before, v_before = difference, v
    return tuple(rows)


def residual(rows: Sequence[SwapRow], total: float) -> Fraction:
    """``total`` minus the sum of all shares, none of them rounded."""
    ends = [Fraction(0), *(Fraction(r.nested) for r in rows)]
    return Fraction(total) - sum((now - then for then, now in pairwise(ends)), Fraction(0))


def _projection(b: Tensor) -> Callable[[Tensor | float], float]:
    """Of a difference, or of its scalar product with B's, on B's; 0 where B's is 0."""
    square = float(b.square().sum())

    def project(of: Tensor | float) -> float:
        product = float((of * b).sum()) if isinstance(of, Tensor) else of
        return product / square if square else 0.0

    return project
