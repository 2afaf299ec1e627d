"""How far a hybrid lies from A: in the linears' outputs, along the way to B, and in the final log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.attribution.result import LOGPROBS, OUTPUT, PROJECTION
from qlab.attribution.subject import Call
from qlab.compare import differing
from qlab.errors import UnsupportedError

LAYER, PROMPT = "layer ", "prompt "
"""What the name of one linear's own measure begins with, and what one of a single prompt."""


@dataclass(frozen=True, eq=False)
class Results:
    """What a hybrid computed."""

    outputs: Sequence[Tensor]
    """y [M, N] of every call, in A's units."""
    logprobs: Tensor | None
    """float32 [rows, k]."""


class Measures:
    """Distances from A's results, relative to A's outputs and to the way to B. Sums are taken in float64 and rounded once.

    Raises UnsupportedError where an end is not finite.
    """

    def __init__(self, calls: Sequence[Call], rows: Sequence[int], a: Results, b: Results) -> None:
        self._calls, self._rows, self._a, self._b = calls, rows, a, b
        for side, results in (("A", a), ("B", b)):
            if bad := next((c.linear for c, y in zip(calls, results.outputs, strict=True) if not y.isfinite().all()), None):
                raise UnsupportedError(f"{side}'s output of {bad} is not finite: its values leave the range of the dtype")
        self._from = [y.double() for y in a.outputs]
        self._ways = [q.double() - p for p, q in zip(self._from, b.outputs, strict=True)]
        self._norms = self._by_linear([float(y.square().sum()) for y in self._from])
        if zero := next((n for n, v in self._norms.items() if not v), None):
            raise UnsupportedError(f"A's output of {zero} is zero throughout, so that no distance is relative to it")
        self._way = math.fsum(v / self._norms[n] for n, v in self._by_linear([_dot(w, w) for w in self._ways]).items())

    def of(self, found: Results) -> dict[str, float]:
        """Every measure by name: those of qlab.attribution.result, and each linear's own share of the output's."""
        apart = [q.double() - p for p, q in zip(self._from, found.outputs, strict=True)]
        layers = {n: v / self._norms[n] for n, v in self._by_linear([_dot(d, d) for d in apart]).items()}
        along = self._by_linear([_dot(d, w) for d, w in zip(apart, self._ways, strict=True)])
        measures = {OUTPUT: math.fsum(layers.values()), PROJECTION: 0.0}
        if self._way:
            measures[PROJECTION] = math.fsum(v / self._norms[n] for n, v in along.items()) / self._way
        if found.logprobs is not None and self._a.logprobs is not None:
            measures[LOGPROBS] = _distance(self._a.logprobs, found.logprobs)
        return measures | {LAYER + n: v for n, v in layers.items()} | self._by_prompt(apart, found.logprobs)

    def _by_prompt(self, apart: Sequence[Tensor], logprobs: Tensor | None) -> dict[str, float]:
        """The output's measure and the log-probabilities' of each prompt, in the units of the whole."""
        found: dict[str, list[float]] = {}
        for call, d in zip(self._calls, apart, strict=True):
            found.setdefault(f"{PROMPT}{call.prompt} {OUTPUT}", []).append(_dot(d, d) / self._norms[call.linear])
        if logprobs is not None and self._a.logprobs is not None:
            both = zip(self._a.logprobs.split(list(self._rows)), logprobs.split(list(self._rows)), strict=True)
            for i, (p, q) in enumerate(both):
                found[f"{PROMPT}{i} {LOGPROBS}"] = [_distance(p, q)]
        return {name: math.fsum(v) for name, v in found.items()}

    def differing(self) -> dict[str, tuple[int, int, int]]:
        """By linear: rows of its calls, elements of B's outputs whose bits differ from A's, all elements."""
        found: dict[str, tuple[int, int, int]] = {}
        for call, p, q in zip(self._calls, self._a.outputs, self._b.outputs, strict=True):
            rows, count, every = found.get(call.linear, (0, 0, 0))
            found[call.linear] = rows + call.M, count + differing(p.double(), q.double()), every + p.numel()
        return found

    def _by_linear(self, values: Sequence[float]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for call, v in zip(self._calls, values, strict=True):
            found.setdefault(call.linear, []).append(v)
        return {name: math.fsum(v) for name, v in found.items()}


def _dot(p: Tensor, q: Tensor) -> float:
    return float(torch.dot(p.flatten(), q.flatten()))


def _distance(a: Tensor, b: Tensor) -> float:
    """Squared L2; equal infinities have no difference."""
    d = torch.where(a == b, 0.0, a.double() - b.double())
    return math.fsum(d.square().flatten().tolist())
