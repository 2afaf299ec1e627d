"""The experiment: every path generates, and every path re-executes what every other generated.

A re-execution is a run of its own: atomics add in another order than they did for the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qlab import environment
from qlab.engine.path import Path
from qlab.engine.run import ALONE, GREEDY, Advance, Request, Sampling, Scored
from qlab.engine.schedule import Batching
from qlab.logprobs.cells import Bench, Sequences, Store, attempt, decode_of, prefill_of
from qlab.logprobs.maker import Maker
from qlab.logprobs.manifest import input_digest
from qlab.logprobs.tables import SCHEMA, Cells, Dispatched, ExperimentResult, Prompts
from qlab.logprobs.tabulate import tabulate

KEPT = 20
"""Log-probabilities kept of a re-execution, so that the generator's few are among them."""
Wanted = dict[tuple[int, tuple[int, ...]], Tensor]
"""Ids per row, by the place of a sequence and its tokens."""


@dataclass(frozen=True)
class Plan:
    """What to compute: chosen once, the same for every path."""

    paths: tuple[Path, ...]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int = 32
    top_k: int = 5
    batching: Batching = ALONE
    sampling: Sampling = GREEDY
    seed: int = 0
    batches: Mapping[str, Batching] = field(default_factory=dict)
    """Other schedules for the same tokens, by name."""

    def request(self) -> Request:
        """The recording that every path makes."""
        return Request(
            self.prompts,
            self.new_tokens,
            batching=self.batching,
            sampling=self.sampling,
            top_k=max(self.top_k, KEPT),
            seed=self.seed,
        )

    @property
    def tokens(self) -> int:
        """Tokens that the whole experiment feeds to models, for a progress bar."""
        n = len(self.paths)
        return self.fed * (2 * n + 2 * n * n + n * len(self.batches))

    @property
    def fed(self) -> int:
        """Tokens that one cell feeds to a model: each sequence but for its last token."""
        return sum(len(p) + self.new_tokens - 1 for p in self.prompts)


def other_batches(batching: Batching, longest: int, prompts: int = 4) -> dict[str, Batching]:
    """The schedules that a server mixes: a prompt whole, token by token, with three others beside it, or what there is."""
    found = {"whole": Batching(max(longest, batching.budget), 1), "token by token": Batching(1, 1)}
    together = min(4, prompts)
    if together > 1:
        others = f"{together - 1} others" if together > 2 else "another"
        found[f"beside {others}"] = Batching(max(batching.budget, together), together)
    return found


def compute(plan: Plan, bench: Callable[[Path], Bench], store: Store, advance: Advance = lambda tokens: None) -> Cells:
    """Every cell of the tables; a cell that cannot be computed here holds its reason. ``store`` keeps what was finished."""
    request = plan.request()
    again = replace(request, seed=plan.seed + 1)
    benches = {p: bench(p) for p in plan.paths}
    progress = _Progress(advance, plan.fed)

    def run(path: Path, asked: Request) -> Sequences | str:
        with progress.cell():
            return attempt(lambda: store.run(benches[path], asked, progress.advance))

    def refuse(reason: str) -> str:
        with progress.cell():
            return reason

    cells = Cells()
    for p in plan.paths:
        cells.recordings[p] = run(p, request)
        cells.again[p] = run(p, again)
    made = {p: s for p, s in cells.recordings.items() if not isinstance(s, str)}
    wanted = _wanted(list(made.values()), plan.top_k)
    for g in plan.paths:
        generated = cells.recordings[g]
        for r in plan.paths:
            if isinstance(generated, str):
                cells.prefill[g, r] = refuse(generated)
                cells.decode[g, r] = generated if g == r else refuse(generated)
                continue
            asked = replace(request if g == r else again, wanted=_of(wanted, generated))
            cells.prefill[g, r] = run(r, prefill_of(generated, asked))
            cells.decode[g, r] = cells.recordings[g] if g == r else run(r, decode_of(generated, asked))
        if isinstance(generated, str):
            cells.prefill_again[g] = refuse(generated)
            cells.batches.update({(g, name): refuse(generated) for name in plan.batches})
            continue
        once_more = prefill_of(generated, replace(again, wanted=_of(wanted, generated)))
        cells.prefill_again[g] = run(g, once_more)
        for name, batching in plan.batches.items():
            cells.batches[g, name] = run(g, replace(once_more, batching=batching))
    return cells


def _identity(i: int, s: Scored) -> tuple[int, tuple[int, ...]]:
    return i, tuple(s.tokens.tolist())


def _of(wanted: Wanted, sequences: Sequences) -> tuple[Tensor, ...]:
    return tuple(wanted[_identity(i, s)] for i, s in enumerate(sequences))


def _wanted(recordings: Sequence[Sequences], k: int) -> Wanted:
    """For each sequence of tokens, per row, the ids that some generator of these tokens has among its k largest."""
    found: dict[tuple[int, tuple[int, ...]], list[Tensor]] = {}
    for sequences in recordings:
        for i, s in enumerate(sequences):
            found.setdefault(_identity(i, s), []).append(s.ids[:, :k])
    return {key: _union(parts) for key, parts in found.items()}


def _union(parts: Sequence[Tensor]) -> Tensor:
    """int64 [rows, w]: each row's distinct ids, the first one repeated where there are fewer than w."""
    rows = [list(dict.fromkeys(row)) for row in torch.cat(list(parts), 1).tolist()]
    width = max(map(len, rows))
    return torch.tensor([row + row[:1] * (width - len(row)) for row in rows])


class _Progress:
    """Counts each cell as the same number of tokens, computed, found or refused."""

    def __init__(self, advance: Advance, each: int) -> None:
        self._advance, self._each, self._left = advance, each, 0

    def advance(self, tokens: int) -> None:
        step = min(tokens, self._left)
        self._left -= step
        self._advance(step)

    @contextmanager
    def cell(self) -> Iterator[None]:
        self._left = self._each
        yield
        self.advance(self._left)


def summarise(
    plan: Plan, cells: Cells, store: Store, maker: Maker, arguments: Mapping[str, str], seconds: float
) -> ExperimentResult:
    """The tables with what they were measured on."""
    reasons = {p: found for p, found in cells.recordings.items() if isinstance(found, str)}
    return ExperimentResult(
        schema=SCHEMA,
        arguments=dict(arguments),
        environment=environment.collect(details=False),
        engine=maker.engine,
        models=tuple(f"{m.name} ({m.method}, {m.digest[:16]})" for m in maker.models.values()),
        prompts=Prompts(len(plan.prompts), sum(map(len, plan.prompts)), plan.new_tokens, input_digest(plan.prompts)),
        top_k=plan.top_k,
        dispatched=tuple(Dispatched(str(p), store.called(str(p)), reasons.get(p, "")) for p in plan.paths),
        tables=tabulate(cells, plan.paths, top_k=plan.top_k),
        seconds=round(seconds, 1),
        notes={},
    )
