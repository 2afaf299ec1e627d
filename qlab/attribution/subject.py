"""What two paths are compared on: a model on real text, or one random layer. Their hybrids run by replay.

A *state* says which weight factors come from B, as a bit mask: 0 is A's checkpoint. A *choice* names the recipe of each linear
for each number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as Directory
from typing import Protocol

import torch
from torch import Tensor

from qlab import compare
from qlab.attribution.input_scales import consumer, moved_input, moved_output
from qlab.attribution.result import End
from qlab.backends.registry import Problem
from qlab.engine.builtin import SOURCES, Builtin, runs_natively
from qlab.engine.linear import Linear
from qlab.engine.path import Path
from qlab.engine.run import Request, Run, Tap
from qlab.engine.schedule import Batching
from qlab.lab.model_files import ModelFiles
from qlab.lab.outputs import NATIVE, REPLAY
from qlab.recipe import Recipe
from qlab.weights import Int4Weight

Choice = Callable[[str, int], Recipe]
"""The recipe of a linear for a number of tokens."""


class Checkpoints(Protocol):
    """Which checkpoint stands for which state."""

    @property
    def full(self) -> int:
        """B's state."""
        ...

    def directory(self, mask: int) -> Directory:
        """A state's checkpoint."""
        ...


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a linear in A's own run."""

    linear: str
    x: Tensor
    """[M, K] in the activations' dtype, as A's weight expects it."""
    prompt: int = 0
    """Which of the inputs, drawn independently of each other, it belongs to."""

    @property
    def M(self) -> int:
        """Rows of x."""
        return len(self.x)


class Layer:
    """One weight and one input x [T, K] for both paths, in calls of ``m`` rows each (all of them in one unless it is named).

    ``native`` as :class:`qlab.engine.builtin.Builtin` takes it, for the ends.
    """

    rows: tuple[int, ...] = ()
    """Of log-probabilities, by prompt: there is no model around the linear."""

    def __init__(
        self, weight: Int4Weight, x: Tensor, a: Path, b: Path, *, m: int | None = None, native: bool | None = None
    ) -> None:
        self.calls: tuple[Call, ...] = tuple(Call(weight.name, part, i) for i, part in enumerate(x.split(m or len(x))))
        self.tokens = len(x)
        self._ends = tuple(Linear(weight, p, x.device, native=_native(p, x.device, native)) for p in (a, b))
        self._hybrid = Linear(weight, a, x.device, native=False)

    def end(self, side: int, choice: Choice) -> End:
        """A's (0) or B's (1) kernel against the hybrid at that end."""
        linear = self._ends[side]
        forms = [linear.form(c.M) for c in self.calls]
        mine, others = [linear.run(c.x) for c in self.calls], self.outputs(0, choice)
        fixed = all(f.origin == REPLAY or choice(c.linear, c.M).ordered for c, f in zip(self.calls, forms, strict=True))
        differing = sum(_differing_bits(y, other) for y, other in zip(mine, others, strict=True)) if fixed else None
        kernels = tuple(sorted({f.kernel for f in forms}))
        return End(str(linear.path), forms[0].origin, kernels, sum(y.numel() for y in mine), differing)

    def weight(self, state: int, call: Call) -> Int4Weight:
        """The call's weight."""
        return self._hybrid.weight

    def problem(self, state: int, call: Call) -> Problem:
        """The call's problem."""
        return replace(self._hybrid.problem, M=call.M)

    def outputs(self, state: int, choice: Choice) -> list[Tensor]:
        """y [M, N] of every call."""
        self._hybrid.follow(partial(choice, self._hybrid.name))
        return [self._hybrid.run(call.x) for call in self.calls]

    def logprobs(self, state: int, choice: Choice) -> None:
        """None."""


class Model:
    """A language model under teacher forcing: the same tokens on every path.

    Args:
        weights: which checkpoint stands for which state.
        prompts: token ids; all but the last ``forced`` of each are prefilled in one step, the others are fed one by one. The
            last one is predicted and not fed.
        top_k: log-probabilities compared per row, those that A finds most probable; 0 takes the whole vocabulary.
        native: as :class:`qlab.engine.builtin.Builtin` takes it, for the two ends.

    Raises as Builtin does.
    """

    def __init__(
        self,
        weights: Checkpoints,
        a: Path,
        b: Path,
        prompts: Sequence[Sequence[int]],
        *,
        forced: int = 1,
        top_k: int = 5,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
        native: bool | None = None,
        seed: int = 0,
    ) -> None:
        self._paths, self._native = (a, b), native
        self._weights, self._device, self._dtype, self._top_k = weights, device, dtype, top_k
        fed, last = [tuple(p[:-forced]) for p in prompts], [tuple(p[-forced:]) for p in prompts]
        batching = Batching(budget=max(map(len, fed)))
        self._request = Request(tuple(fed), forced, tuple(last), batching, top_k=top_k, seed=seed)
        self._taps: frozenset[Tap] = frozenset()
        self._engines: dict[Directory, Builtin] = {}
        own = self._own(0)
        if not own.native:  # its linears can follow a choice as well as run A's path
            self._engines[own.directory] = own
        names = list(own.model.linears)
        self._taps = frozenset(Tap(name, s, i) for name in names for s, p in enumerate(fed) for i in range(len(p) + forced - 1))
        first = own.run(replace(self._request, taps=self._taps))
        self._wanted = tuple(s.ids for s in first.sequences)
        self._ran = {0: (own, first)}
        own_prompts = [step[0].sequence for step in first.steps for _ in names]
        found = zip(_calls(first, names), own_prompts, strict=True)
        self.calls = tuple(Call(name, x.to(device), p) for (name, x, _), p in found)
        self.rows = tuple(len(ids) for ids in self._wanted)
        """Of log-probabilities, by prompt."""
        self.tokens = sum(len(p) + forced - 1 for p in fed)

    def _own(self, side: int) -> Builtin:
        directory = self._weights.directory(self._weights.full if side else 0)
        return Builtin(directory, self._paths[side], self._device, dtype=self._dtype, native=self._native)

    def end(self, side: int, choice: Choice) -> End:
        """A's (0) or B's (1) own run against the hybrid at that end."""
        state = self._weights.full if side else 0
        if side not in self._ran:
            engine = self._own(side)
            self._ran[side] = engine, engine.run(replace(self._at_ids(), taps=self._taps))
        engine, run = self._ran[side]
        names = list(engine.model.linears)
        mine = [self._logprobs(run), *(y for _, _, y in _calls(run, names))]
        hybrid = self._run(state, choice, self._taps)
        other = [self._logprobs(hybrid), *(y for _, _, y in _calls(hybrid, names))]
        ordered = all(choice(c.linear, c.M).ordered for c in self.calls)
        native = any(c.origin != REPLAY for c in run.calls)
        differing = None
        if ordered or not native:
            differing = sum(_differing_bits(p, q) for p, q in zip(mine, other, strict=True))
        kernels = tuple(sorted({c.kernel for c in run.calls}))
        return End(str(engine.path), NATIVE if native else REPLAY, kernels, sum(t.numel() for t in mine), differing)

    def weight(self, state: int, call: Call) -> Int4Weight:
        """The call's weight in the state's checkpoint."""
        return self._engine(state).model.linears[call.linear].weight

    def problem(self, state: int, call: Call) -> Problem:
        """The call's problem with the state's weight."""
        return replace(self._engine(state).model.linears[call.linear].problem, M=call.M)

    def outputs(self, state: int, choice: Choice) -> list[Tensor]:
        """y [M, N] of every call, each on A's input and in A's units: AWQ's input scales differ between checkpoints."""
        model = self._engine(state).model
        mine, other = self._engine(0).model.linears, model.linears
        found = []
        for call in self.calls:
            linear, behind = other[call.linear], consumer(call.linear, own_values=model.blocks.own_values)
            linear.follow(partial(choice, call.linear))
            y = linear.run(moved_input(call.x, mine[call.linear].weight, linear.weight), self._request.seed)
            found.append(moved_output(y, mine[behind].weight, other[behind].weight) if behind else y)
        return found

    def logprobs(self, state: int, choice: Choice) -> Tensor:
        """float32 [rows, k] at A's top-k ids of each row."""
        return self._logprobs(self._run(state, choice))

    def _run(self, state: int, choice: Choice, taps: frozenset[Tap] = frozenset()) -> Run:
        engine = self._engine(state)
        for name, linear in engine.model.linears.items():
            linear.follow(partial(choice, name))
        return engine.run(replace(self._at_ids(), taps=taps))

    def _engine(self, state: int) -> Builtin:
        """The state's model, whose linears follow a choice; its path only says which family of checkpoints it reads."""
        directory = self._weights.directory(state)
        if directory not in self._engines:
            method = ModelFiles(directory, self._dtype).method
            family = next(label for label, methods in SOURCES.items() if method in methods)
            path = next((p for p in self._paths if p.source in (family, "")), Path(family, self._paths[0].gpu))
            self._engines[directory] = Builtin(directory, path, self._device, dtype=self._dtype, native=False)
        return self._engines[directory]

    def _at_ids(self) -> Request:
        """The request for A's ids, which stand behind the one that is the run's own most probable."""
        return self._request if not self._top_k else replace(self._request, top_k=1, wanted=self._wanted)

    def _logprobs(self, run: Run) -> Tensor:
        """At A's ids, from a run of either request."""
        first = self._top_k and run.sequences[0].ids.shape[1] == self._wanted[0].shape[1] + 1
        return torch.cat([s.logprobs[:, 1:] if first else s.logprobs for s in run.sequences])


def _calls(run: Run, names: Sequence[str]) -> list[tuple[str, Tensor, Tensor]]:
    """(linear, x [M, K], y [M, N]) of every call of a run whose rows were all tapped, step by step."""
    rows = {(r.tap.linear, r.tap.sequence, r.tap.position): r for r in run.rows}
    found = []
    for step in run.steps:
        for name in names:
            mine = [rows[name, span.sequence, i] for span in step for i in range(span.start, span.stop)]
            found.append((name, torch.stack([r.x for r in mine]), torch.stack([r.y for r in mine])))
    return found


def _native(path: Path, device: torch.device, asked: bool | None) -> bool | None:
    """As a linear takes it: True insists, None may run natively, False replays."""
    return asked if runs_natively(path, device, asked) else False


def _differing_bits(a: Tensor, b: Tensor) -> int:
    if a.element_size() == 2:
        return compare.differing_bits(a, b)
    apart = a.contiguous().view(torch.int32) ^ b.contiguous().view(torch.int32)
    return sum(int(((apart >> i) & 1).sum()) for i in range(32))
