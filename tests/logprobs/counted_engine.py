"""The engine without a model, counting what it is asked, and benches of it by path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from qlab.engine.path import Path
from qlab.engine.run import Request, Run
from qlab.engine.schedule import size
from qlab.errors import UnsupportedError
from qlab.logprobs.cells import Bench
from tests.logprobs.fake_engine import FakeEngine

REASON = "opaque: cuBLAS is not modelled"


@dataclass
class Counted(FakeEngine):
    """``most`` tokens of a step can be computed; ``before`` is called before each run and may raise."""

    most: int = 10**6
    before: Callable[[], None] = lambda: None
    requests: list[Request] = field(default_factory=list)

    def run(self, request: Request, advance=lambda tokens: None) -> Run:
        self.before()
        fed = [len(p) + request.new_tokens - 1 for p in request.prompts]
        if max(size(step) for step in request.batching.steps([len(p) for p in request.prompts], fed)) > self.most:
            raise UnsupportedError(REASON)
        self.requests.append(request)
        return super().run(request, advance)


SHIFTS = {"awq": 0.0, "awq_marlin": 0.5, "gptq": 1.0, "gptq_marlin": 2.0}


class Benches:
    """An engine per path (and share of flips), kept; ``stop_after`` runs of them all, the next one is interrupted."""

    def __init__(self, *, stop_after: int | None = None, most: dict[str, int] | None = None) -> None:
        self.made: dict[tuple[Path, object], Bench] = {}
        self.stop_after, self.most, self.runs = stop_after, most or {}, 0

    def __call__(self, path: Path, flip: object = None) -> Bench:
        if (path, flip) not in self.made:
            shift = SHIFTS[path.method] + 0.25 * (path.gpu == "a100") + (flip.share if flip else 0)
            engine = Counted(path, shift=shift, most=self.most.get(path.method, 10**6), before=self._count)
            self.made[path, flip] = Bench(engine, "model", "" if flip is None else str(flip))
        return self.made[path, flip]

    def _count(self) -> None:
        if self.stop_after is not None and self.runs >= self.stop_after:
            raise KeyboardInterrupt
        self.runs += 1

    @property
    def done(self) -> int:
        """Requests that were answered."""
        return sum(len(b.engine.requests) for b in self.made.values())
