"""Why two paths differ: every factor swapped in every admissible order, from A's end to B's, by replay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File

import numpy as np

from qlab import environment
from qlab.attribution.game import Attribution, Game, attribute
from qlab.attribution.hybrids import Hybrids
from qlab.attribution.measures import LAYER, PROMPT, Measures, Results
from qlab.attribution.parts import selected
from qlab.attribution.result import MEASURES, PACKING, SCHEMA, Explained, Factor, Interaction, LayerMeasure, Measure, Share
from qlab.attribution.subject import Choice, Layer, Model
from qlab.attribution.weights import WeightFactors
from qlab.engine.path import Path

RESAMPLES = 2000
"""Of prompts, for an interval."""
Advance = Callable[[int, int], None]
"""Called with how many hybrids ran and how many there will be."""


@dataclass(frozen=True)
class OneWeight:
    """In place of :class:`WeightFactors` where both paths have the same weight."""

    home: File = File()
    """The checkpoint; a layer is in none."""
    factors: tuple[Factor, ...] = ()
    notes: tuple[str, ...] = ()
    full: int = 0

    def admissible(self, mask: int) -> bool:
        """There is nothing to mix."""
        return mask == 0

    def directory(self, mask: int) -> File:
        """The checkpoint."""
        return self.home


def explain(
    subject: Layer | Model,
    a: Path,
    b: Path,
    weights: WeightFactors | OneWeight,
    *,
    where: str,
    samples: int | None = None,
    seed: int = 0,
    arguments: Mapping[str, str] | None = None,
    advance: Advance = lambda done, of: None,
) -> Explained:
    """Split the divergence of ``b`` from ``a`` on ``subject`` among the factors in which the two differ.

    ``where`` says in words what the subject is. All orders of swapping are averaged, or ``samples`` draws of them.
    Raises UnsupportedError where an end cannot be replayed, QlabError where no order of swapping can be built.
    """
    started = time.perf_counter()
    hybrids = Hybrids(subject, a, b, weights.full)
    game, notes = _game(weights, hybrids)
    runner = _Runner(subject, hybrids, weights)
    splits = attribute(game, runner.value, samples=samples, seed=seed, advance=advance)
    ends = tuple(subject.end(side, runner.choice(mask)) for side, mask in enumerate((0, game.full)))
    return Explained(
        schema=SCHEMA,
        arguments=dict(arguments or {}),
        environment=environment.collect(details=False),
        a=str(a),
        b=str(b),
        where=where,
        rows=sum(subject.rows),
        tokens=subject.tokens,
        ends=ends,
        factors=tuple(_factors(weights, hybrids)),
        measures=tuple(
            measure(name, game.names, splits[name], _over_prompts(name, splits, seed)) for name in MEASURES if name in splits
        ),
        layers=tuple(_layers(runner.measures, game, splits)),
        notes=(*weights.notes, *notes),
        evaluations=runner.evaluations,
        seconds=round(time.perf_counter() - started, 2),
    )


def _game(weights: WeightFactors | OneWeight, hybrids: Hybrids) -> tuple[Game, list[str]]:
    """The weights' factors, then the kernels' parts; and what had to be given up so that an order of swapping exists."""
    count, full = len(weights.factors), weights.full
    asked = Game(
        (*(f.name for f in weights.factors), *(p.name for p in hybrids.parts)),
        (tuple(range(count)), *(tuple(i + count for i in members) for members in hybrids.unions.members)),
        lambda mask: weights.admissible(mask & full) and hybrids.admissible(mask >> count),
    )
    game = asked.loosened()
    lost = [union for union in asked.unions if union not in game.unions]
    return game, [f"{' and '.join(asked.names[i] for i in u)} cannot be swapped one after the other" for u in lost]


class _Runner:
    """Runs hybrids; coalitions whose linears have the same weights and recipes are one hybrid."""

    def __init__(self, subject: Layer | Model, hybrids: Hybrids, weights: WeightFactors | OneWeight) -> None:
        self._subject, self._hybrids, self._weights = subject, hybrids, weights
        full = (1 << len(weights.factors) + len(hybrids.parts)) - 1
        a, b = self._results(0), self._results(full)
        self.measures = Measures(subject.calls, subject.rows, a, b)
        self._known = {self._key(mask): self.measures.of(found) for mask, found in ((0, a), (full, b))}

    @property
    def evaluations(self) -> int:
        """Hybrids that ran."""
        return len(self._known)

    def choice(self, mask: int) -> Choice:
        """The recipes of a coalition."""
        rest = mask >> len(self._weights.factors)
        return self._hybrids.choice(self._state(mask), selected(self._hybrids.parts, rest))

    def value(self, mask: int) -> dict[str, float]:
        """Every measure of a coalition."""
        key = self._key(mask)
        if key not in self._known:
            self._known[key] = self.measures.of(self._results(mask))
        return self._known[key]

    def _state(self, mask: int) -> int:
        return mask & self._weights.full

    def _key(self, mask: int) -> Hashable:
        choice = self.choice(mask)
        return self._weights.directory(self._state(mask)), tuple(choice(*at).hash for at in self._hybrids.calls)

    def _results(self, mask: int) -> Results:
        state, choice = self._state(mask), self.choice(mask)
        return Results(self._subject.outputs(state, choice), self._subject.logprobs(state, choice))


def _factors(weights: WeightFactors | OneWeight, hybrids: Hybrids) -> Iterator[Factor]:
    """Those that were swapped, in the game's order, then those that are equal on both sides."""
    together = "weights" if len(weights.factors) > 1 else ""
    for w in weights.factors:
        yield replace(w, union=together)
    names, members = hybrids.unions
    unions = {i: name for name, union in zip(names, members, strict=True) for i in union if len(union) > 1}
    for i, part in enumerate(hybrids.parts):
        yield Factor(part.name, part.category, unions.get(i, ""), *hybrids.texts(part))
    if not any(w.category == PACKING for w in weights.factors):
        yield Factor("packing", PACKING, "", *hybrids.packing(), same=True)
    for part in hybrids.same:
        yield Factor(part.name, part.category, "", *hybrids.texts(part), same=True)


def measure(
    name: str, factors: Sequence[str], split: Attribution, intervals: Sequence[tuple[float, float]] | None = None
) -> Measure:
    """One value function's split, by the names of the game's factors; ``intervals`` of the parts where no order was drawn."""
    total = float(split.total)
    parts = []
    for i, factor in enumerate(factors):
        alone, removed = split.alone[i], split.removed[i]
        interval = split.intervals[i] or (intervals[i] if intervals else None)
        parts.append(
            Share(
                factor,
                float(split.values[i]),
                float(split.values[i] / split.total) if split.total else math.nan,
                None if alone is None else float(alone),
                None if removed is None else float(removed),
                *(interval or (None, None)),
            )
        )
    interactions = [Interaction(factors[i], factors[j], float(v)) for (i, j), v in split.interactions.items() if v is not None]
    return Measure(name, total, tuple(parts), tuple(interactions), float(split.residual), split.samples)


def _over_prompts(name: str, splits: Mapping[str, Attribution], seed: int) -> list[tuple[float, float]] | None:
    """95% interval of each factor's part: its share in resampled prompts, times the total. None for one prompt."""
    mine = [s for key, s in splits.items() if key.startswith(PROMPT) and key.endswith(f" {name}")]
    if len(mine) < 2 or not splits[name].total:
        return None
    parts = np.array([[float(v) for v in s.values] for s in mine])  # [prompts, factors]
    totals = np.array([float(s.total) for s in mine])
    drawn = np.random.default_rng(seed).integers(0, len(mine), (RESAMPLES, len(mine)))
    whole = totals[drawn].sum(1, keepdims=True)
    shares = (parts[drawn].sum(1) / np.where(whole, whole, np.nan))[whole[:, 0] > 0]
    low, high = np.quantile(shares, (0.025, 0.975), axis=0) * float(splits[name].total)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _layers(measures: Measures, game: Game, splits: Mapping[str, Attribution]) -> Iterator[LayerMeasure]:
    for linear, (rows, differing, elements) in measures.differing().items():
        split = splits[LAYER + linear]
        values = {name: float(v) for name, v in zip(game.names, split.values, strict=True)}
        yield LayerMeasure(linear, rows, math.sqrt(split.total), differing, elements, values)
