"""What vLLM's linear layers computed, row by row: calls with the M that the kernel saw, tapped rows, digests.

A recorder lives in each of vLLM's worker processes. It is told each step's layout and each layer's call, and answers in plain
lists and tensors, which travel between processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from qlab.engine.run import Tap, row_digest
from qlab.errors import QlabError


@dataclass
class Record:
    """The answer of one worker for one request."""

    linears: list[str] = field(default_factory=list)
    """In the order in which the model called them."""
    steps: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """Per step, in the order of the batch's rows: sequence, start, stop."""
    calls: list[tuple[str, int, str, int]] = field(default_factory=list)
    """Linear, M, kernel, count."""
    rows: list[tuple[Tap, int, int, str, Tensor, Tensor]] = field(default_factory=list)
    """Tap, row, M, kernel, x [K], y [N]."""
    digests: list[tuple[str, int, int, int]] = field(default_factory=list)
    """Linear, sequence, position, digest."""


class Recorder:
    """Records between ``begin`` and ``end``, and only steps that hold requests: vLLM's dummy runs at its start are none."""

    def __init__(self) -> None:
        self.active = False
        """Whether a layer's call is to be told; False costs a layer one look at this."""
        self._record = Record()

    def begin(self, taps: Iterable[Tap] = (), digests: bool = False) -> None:
        self._record = Record()
        self._wanted: dict[tuple[int, int], set[str]] = {}
        for tap in taps:
            self._wanted.setdefault((tap.sequence, tap.position), set()).add(tap.linear)
        self._digests = digests
        self._counts: Counter[tuple[str, int, str]] = Counter()
        self._places: list[tuple[int, int]] = []
        self._tapped: dict[str, list[int]] = {}
        self.active = True

    def step(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """The rows of the calls that follow are these tokens: sequence, start, stop of each."""
        self._record.steps.append(list(spans))
        self._places = [(s, position) for s, start, stop in spans for position in range(start, stop)]
        self._tapped = {}
        for row, place in enumerate(self._places):
            for linear in self._wanted.get(place, ()):
                self._tapped.setdefault(linear, []).append(row)

    def call(self, linear: str, kernel: str, x: Tensor, y: Tensor) -> None:
        """One call: x [M, K], y [M, N]. Rows beyond the step's tokens are padding."""
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        m = len(x)
        if m < len(self._places):
            raise QlabError(
                f"{linear} was called with {m} rows in a step of {len(self._places)} tokens: not one batch at a time"
            )
        key = (linear, m, kernel)
        if not self._counts[key] and linear not in self._record.linears:
            self._record.linears.append(linear)
        self._counts[key] += 1
        for row in self._tapped.get(linear, ()):
            place = Tap(linear, *self._places[row])
            self._record.rows.append((place, row, m, kernel, x[row].detach().cpu().clone(), y[row].detach().cpu().clone()))
        if self._digests:
            found = row_digest(y[: len(self._places)]).tolist()
            self._record.digests += [(linear, *place, d) for place, d in zip(self._places, found, strict=True)]

    def end(self) -> Record:
        """What was recorded since ``begin``."""
        made, self._record = self._record, Record()
        if self.active:
            made.calls = [(*key, count) for key, count in self._counts.items()]
        self.active = False
        return made
