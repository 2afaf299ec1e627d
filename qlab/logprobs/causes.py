"""Where the experiment's hardware noise comes from: one part of a model at a time is allowed to differ between two GPUs.

The linear layers differ by their kernels, pinned or as vLLM dispatches them. For the rest of the model, whose kernels are not
modelled, a share of attention's outputs is moved by one unit in the last place: every share at once, as a curve, since nobody
knows another GPU's attention kernel. Signal and noise are the experiment's (qlab/logprobs/tables.py): prefilled tokens of the
generator, root of summed squares over its top-k log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from qlab.engine.flip import Flip
from qlab.engine.path import DispatchMode, Path
from qlab.engine.run import Advance, Scored
from qlab.environment import Environment
from qlab.errors import QlabError
from qlab.logprobs.cells import Bench, Store, attempt, prefill_of
from qlab.logprobs.distance import distances
from qlab.logprobs.experiment import Plan
from qlab.logprobs.statistics import Array, Figure, mean, ratio

SCHEMA = "qlab.logprobs.causes/1"
SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Shares of attention's outputs that move by one unit in the last place."""
SIGNAL_DISPATCH: DispatchMode = "pinned"


@dataclass(frozen=True)
class Setting:
    """One way in which two GPUs may differ, and what it does to the detection of one method against another."""

    name: str
    """What differs between generator and re-executor."""
    series: str
    """``kernels`` (the re-executor's own GPU, Marlin pinned), ``dispatch`` (vLLM's choice), ``replay`` (the generator's)."""
    share: float
    """Of attention's outputs moved by one unit in the last place on the re-executor."""
    signal: Figure
    noise: Figure
    snr: Figure
    kernels: tuple[str, ...]
    """Generator's and re-executor's kernel of each method."""
    reason: str = ""
    """Why it was not computed; empty when it was."""


@dataclass(frozen=True)
class Causes:
    """The answer of ``python -m qlab.logprobs causes``."""

    schema: str
    arguments: dict[str, str]
    environment: Environment
    model: str
    methods: tuple[str, ...]
    generator: str
    """GPU on which the tokens were generated."""
    verifier: str
    """GPU on which they are re-executed."""
    prompts: int
    tokens: int
    settings: tuple[Setting, ...]
    seconds: float = 0.0

    def series(self, name: str) -> tuple[Setting, ...]:
        """The settings of one series, by share."""
        return tuple(sorted((s for s in self.settings if s.series == name and not s.reason), key=lambda s: s.share))


MakeBench = Callable[[Path, "Flip | None"], Bench]


@dataclass
class Study:
    """Runs of one study. ``bench`` gives a path's engine, with a share of flipped attention outputs or None."""

    plan: Plan
    methods: tuple[str, str]
    generator: str
    verifier: str
    bench: MakeBench
    store: Store
    advance: Advance = lambda tokens: None
    _benches: dict[tuple[Path, float], Bench] = field(default_factory=dict)
    _made: dict[Path, tuple[Scored, ...]] = field(default_factory=dict)

    def settings(self, shares: Sequence[float] = SHARES) -> tuple[Setting, ...]:
        """(a) to (d) of the study, then the curves over ``shares``."""
        found = []
        for share in (0.0, *shares):
            for series, dispatch, name in (
                ("kernels", "pinned", f"linear layers, Marlin pinned on {self.generator} and {self.verifier}"),
                ("dispatch", "vllm", f"linear layers as vLLM dispatches them on {self.generator} and {self.verifier}"),
                ("replay", "pinned", f"nothing: {self.verifier} replays {self.generator}'s kernels"),
            ):
                found.append(self._setting(name, series, dispatch, share))
        return tuple(found)

    def _setting(self, name: str, series: str, dispatch: str, share: float) -> Setting:
        nothing = Figure(float("nan"), float("nan"), float("nan"))
        mode: DispatchMode = "vllm" if dispatch == "vllm" else "pinned"
        there = self.generator if series == "replay" else self.verifier
        pairs = [(Path(m, self.generator, mode), Path(m, there, mode)) for m in self.methods]
        noise: list[Array] = []
        for a, b in pairs:
            noise.append(self._apart(a, b, share))
        signal = self._signal(mode)
        both = np.mean(noise, axis=0)
        kernels = tuple(f"{a} -> {b}" for a, b in pairs)
        full = name if not share else f"{name}, and {share:g} of attention's outputs"
        del nothing
        return Setting(full, series, share, mean(signal), mean(both), ratio(signal, both), kernels)

    def _signal(self, mode: DispatchMode) -> Array:
        """Per prompt: the two methods on one GPU, in both directions, on either GPU."""
        parts = []
        for gpu in dict.fromkeys((self.generator, self.verifier)):
            one, other = (Path(m, gpu, mode) for m in self.methods)
            parts += [self._apart(one, other, 0.0), self._apart(other, one, 0.0)]
        return np.mean(parts, axis=0)

    def _apart(self, generator: Path, verifier: Path, share: float) -> Array:
        """Distance per prompt of the verifier's prefill of the generator's tokens from the generator's own prefill."""
        tokens = self._generate(generator)
        request = prefill_of(tokens, self.plan.request())
        own = self._run(generator, 0.0, request)
        other = self._run(verifier, share, request)
        return np.asarray(distances(own, other, top_k=self.plan.top_k))

    def _generate(self, path: Path) -> tuple[Scored, ...]:
        if path not in self._made:
            self._made[path] = self._run(path, 0.0, self.plan.request())
        return self._made[path]

    def _run(self, path: Path, share: float, request) -> tuple[Scored, ...]:  # type: ignore[no-untyped-def]
        key = (path, share)
        if key not in self._benches:
            self._benches[key] = self.bench(path, Flip(share, self.plan.seed) if share else None)
        found = attempt(lambda: self.store.run(self._benches[key], request, self.advance))
        if isinstance(found, str):
            raise QlabError(f"{path}: {found}")
        return found
