"""What a run of the built-in engine keeps: tapped rows, digests, counts of calls."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from qlab.engine.flip import Flip
from qlab.engine.linear import Linear
from qlab.engine.run import Call, Request, Row, Tap, row_digest
from qlab.engine.schedule import Step


class Collector:
    """Watches the linears of one run; ``fed`` tokens of each sequence go through the model."""

    def __init__(self, request: Request, names: Sequence[str], fed: Sequence[int], flip: Flip | None) -> None:
        self.flip, self._first = flip, request.first
        self.order = {name: i for i, name in enumerate(names)}
        self.digests: list[Tensor] | None = None
        if request.digests:
            self.digests = [torch.zeros((len(names), n), dtype=torch.int64) for n in fed]
        self._wanted: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for tap in request.taps:
            self._wanted[tap.linear].add((tap.sequence, tap.position))
        self._counts: Counter[tuple[str, int]] = Counter()
        self._rows: list[Row] = []
        self._calls: dict[tuple[str, int], Call] = {}
        self._places: list[tuple[int, int]] = []

    def begin(self, step: Step) -> None:
        """The rows of the calls that follow are the step's tokens."""
        self._places = [(s.sequence, position) for s in step for position in range(s.start, s.stop)]

    def enter(self, linear: Linear, x: Tensor) -> Tensor:
        if self.flip is None or not linear.name.endswith(".o_proj"):
            return x
        layer = next(int(part) for part in linear.name.split(".") if part.isdecimal())
        return self.flip.apply(x, layer, [(self._first + s, position) for s, position in self._places])

    def leave(self, linear: Linear, x: Tensor, y: Tensor) -> None:
        m, name = len(x), linear.name
        if (name, m) not in self._calls:
            form = linear.form(m)
            self._calls[name, m] = Call(name, m, form.kernel, form.origin, form.recipe, 0)
        self._counts[name, m] += 1
        if self.digests is not None:
            for (sequence, position), digest in zip(self._places, row_digest(y).tolist(), strict=True):
                self.digests[sequence][self.order[name], position] = digest
        wanted = self._wanted.get(name)
        if wanted:
            kernel = self._calls[name, m].kernel
            for row, place in enumerate(self._places):
                if place in wanted:
                    self._rows.append(Row(Tap(name, *place), row, m, kernel, x[row].cpu().clone(), y[row].cpu().clone()))

    def calls(self) -> tuple[Call, ...]:
        """Every kind of call with its count, in the order of linears and M."""
        found = [Call(c.linear, c.M, c.kernel, c.origin, c.recipe, self._counts[key]) for key, c in self._calls.items()]
        return tuple(sorted(found, key=lambda c: (self.order[c.linear], c.M)))

    def rows(self) -> tuple[Row, ...]:
        """The tapped rows, by sequence, position and linear."""
        return tuple(sorted(self._rows, key=lambda r: (r.tap.sequence, r.tap.position, self.order[r.tap.linear])))
