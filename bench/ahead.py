"""An experiment whose engines run at the same time: each in a process of its own, driven by a thread of its own.

``compute`` of ``qlab.logprobs.experiment`` asks for one run after another. Here it is called again and again with a store that
only notes what is missing; what it noted is then run, every engine's part by its own thread, until nothing is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from qlab.engine.path import Path
from qlab.engine.run import Advance, Request, Run
from qlab.errors import QlabError, UnsupportedError
from qlab.logprobs.cells import Bench, Sequences, Store
from qlab.logprobs.experiment import Plan, compute
from qlab.logprobs.tables import Cells

ROUNDS = 8
"""Rounds until all is found: recordings, then what is made of them; the rest is room."""


class Pending(UnsupportedError):
    """The run was not made yet."""


@dataclass(frozen=True)
class Noting:
    """An engine's stand-in that computes nothing."""

    engine: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, request: Request, advance: Advance = lambda tokens: None) -> Run:
        raise Pending("not computed yet")


@dataclass
class Ahead(Store):
    """A store that notes missing runs instead of making them, and remembers those that failed, with the reason."""

    missing: list[tuple[Bench, Request]] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    """Reason by the bench's place in memory: an engine that failed is not asked again."""

    def run(self, bench: Bench, request: Request, advance: Advance = lambda tokens: None) -> Sequences:
        try:
            return super().run(replace(bench, engine=Noting(bench.engine)), request, advance)
        except Pending:
            if reason := self.failed.get(id(bench)):
                raise UnsupportedError(reason) from None
            self.missing.append((bench, request))
            raise
        except QlabError as e:  # an engine that could not be made costs its own cells alone
            raise UnsupportedError(str(e)) from None

    def make(self, told: Callable[[str], None] = print) -> None:
        """Make the missing runs, each engine's in order, engines at the same time."""
        queues: dict[int, list[tuple[Bench, Request]]] = {}
        for bench, request in self.missing:
            queues.setdefault(id(bench), []).append((bench, request))
        self.missing = []
        if queues:
            with ThreadPoolExecutor(len(queues), "engine") as pool:
                list(pool.map(lambda queue: self._work(queue, told), queues.values()))

    def _work(self, queue: list[tuple[Bench, Request]], told: Callable[[str], None]) -> None:
        for bench, request in queue:
            try:
                super().run(bench, request)
            except QlabError as e:
                self.failed[id(bench)] = str(e)
                told(f"{bench.engine.path}: {e}")
                return


def compute_ahead(plan: Plan, bench: Callable[[Path], Bench], store: Ahead, told: Callable[[str], None] = print) -> Cells:
    """The cells that ``compute`` gives, with every engine busy at the same time."""
    for n in range(ROUNDS):
        cells = compute(plan, bench, store)
        if not store.missing:
            break
        told(f"round {n}: {len(store.missing)} cells to compute")
        store.make(told)
    return cells
