"""Where the experiment's hardware noise comes from: one part of a model at a time is allowed to differ between two GPUs.

The linear layers differ by their kernels, pinned or as vLLM dispatches them. For the rest of the model, whose kernels are not
modelled, a share of attention's outputs is moved by one unit in the last place: a curve over all shares, since nobody knows
another GPU's attention kernel. Signal and noise are the experiment's, of prefilled tokens (qlab/logprobs/tables.py), the noise
in one direction, from the generator's GPU to the verifier's. As there, a re-execution is a run of its own: a verifier does not
know in which order the generator's atomics added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File

import numpy as np

from qlab.engine.flip import Flip
from qlab.engine.path import DispatchMode, Path
from qlab.engine.run import Advance, Request
from qlab.environment import Environment
from qlab.logprobs.cells import Bench, Sequences, Store, prefill_of
from qlab.logprobs.distance import distances
from qlab.logprobs.experiment import Plan
from qlab.logprobs.statistics import Array, Figure, mean, ratio
from qlab.serial import read_json

SCHEMA = "qlab.logprobs.causes/1"
SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Shares of attention's outputs that move by one unit in the last place."""
KERNELS, DISPATCH, REPLAY = SERIES = ("kernels", "dispatch", "replay")
"""What computes the verifier's linears: its own kernels, Marlin pinned; vLLM's choice there; the generator's, replayed."""


@dataclass(frozen=True)
class Setting:
    """One way in which generator and verifier may differ, and what is left of the detection of one method against another."""

    series: str
    share: float
    """Of attention's outputs moved by one unit in the last place on the verifier."""
    signal: Figure
    noise: Figure
    snr: Figure
    kernels: tuple[str, ...]
    """Per method, the generator's path and the verifier's."""


@dataclass(frozen=True)
class Causes:
    """The answer of ``python -m qlab.logprobs causes``."""

    schema: str
    arguments: dict[str, str]
    environment: Environment
    models: tuple[str, ...]
    methods: tuple[str, ...]
    generator: str
    """GPU on which the tokens were generated."""
    verifier: str
    """GPU on which they are re-executed."""
    prompts: int
    tokens: int
    """Rows that are compared, over all prompts."""
    settings: tuple[Setting, ...]
    seconds: float

    def series(self, name: str) -> tuple[Setting, ...]:
        """The settings of one series, by share."""
        return tuple(sorted((s for s in self.settings if s.series == name), key=lambda s: s.share))

    @classmethod
    def read(cls, path: File) -> Causes:
        """Raises QlabError naming the file when it is missing, damaged or of another schema."""
        return read_json(cls, path, SCHEMA)


@dataclass
class Study:
    """Two methods, a generator's GPU and a verifier's. ``bench`` gives a path's engine, its attention moved or not."""

    plan: Plan
    methods: tuple[str, str]
    generator: str
    verifier: str
    bench: Callable[[Path, Flip | None], Bench]
    store: Store
    advance: Advance = lambda tokens: None
    _generated: dict[Path, Sequences] = field(default_factory=dict)

    def settings(self, shares: Sequence[float] = SHARES) -> tuple[Setting, ...]:
        """Every series without noise of attention, then at each share. Raises UnsupportedError where a path cannot run."""
        return tuple(self._setting(series, share) for share in (0.0, *shares) for series in SERIES)

    @staticmethod
    def cells(shares: Sequence[float] = SHARES) -> int:
        """Runs of all prompts that :meth:`settings` asks for, kept ones included, for a progress bar."""
        return (1 + len(shares)) * len(SERIES) * 3 * (4 + 2)

    def _setting(self, series: str, share: float) -> Setting:
        mode: DispatchMode = "vllm" if series == DISPATCH else "pinned"
        there = self.generator if series == REPLAY else self.verifier
        pairs = [(Path(m, self.generator, mode), Path(m, there, mode)) for m in self.methods]
        noise = np.mean([self._apart(a, b, share) for a, b in pairs], axis=0)
        signal = self._signal(mode)
        return Setting(series, share, mean(signal), mean(noise), ratio(signal, noise), tuple(f"{a} to {b}" for a, b in pairs))

    def _signal(self, mode: DispatchMode) -> Array:
        """Per prompt: the two methods on one GPU, in both directions, on either GPU."""
        parts = []
        for gpu in (self.generator, self.verifier):
            one, other = (Path(m, gpu, mode) for m in self.methods)
            parts += [self._apart(one, other), self._apart(other, one)]
        return np.asarray(np.mean(parts, axis=0))

    def _apart(self, generator: Path, verifier: Path, share: float = 0.0) -> Array:
        """Distance per prompt of the verifier's prefill of the generator's tokens from the generator's own prefill."""
        if generator not in self._generated:
            self._generated[generator] = self._run(generator, 0.0, self.plan.request())
        else:
            self.advance(self.plan.fed)
        request = prefill_of(self._generated[generator], self.plan.request())
        again = replace(request, seed=request.seed + 1)
        own, other = self._run(generator, 0.0, request), self._run(verifier, share, again)
        return np.asarray(distances(own, other, top_k=self.plan.top_k))

    def _run(self, path: Path, share: float, request: Request) -> Sequences:
        flip = Flip(share, self.plan.seed) if share else None
        return self.store.run(self.bench(path, flip), request, self.advance)
