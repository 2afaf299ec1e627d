"""From the outputs of a kernel alone: which faults does it have, given what it should compute?

:func:`name_faults` reads the weight by one-hot rows, solves for the faults of packing and group layout that explain it, and
replays the clean recipe with one or two changes on inputs in which sums cancel. What it names gives every output of every
probe bit for bit; where several hypotheses do, it asks the kernel about inputs that tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.attribution.fault import Fault, distinct
from qlab.attribution.faults_probe import Probe, one_hot, one_hot_power, probes, slab
from qlab.attribution.faults_recipe import OTHER_GPU, OTHER_KERNEL, Variant, variants
from qlab.attribution.faults_search import Candidate, Hypothesis, Replays, Seen, Weights
from qlab.attribution.faults_weight import Reading, same
from qlab.backends.registry import Problem
from qlab.errors import QlabError, UnsupportedError
from qlab.recipe import Recipe
from qlab.replay.operands import DTYPES, check
from qlab.replay.prepared import missing
from qlab.weights import Int4Weight

SCHEMA = "qlab.named_faults/1"
ONE_HOT = "one-hot rows"
EQUAL, NAMED, UNNAMED = "equal", "named", "unnamed"
ADAPTED = 3
"""Weights that inputs are solved for anew, at most."""
SHARP = 5
"""Kinds of probes, the first ones, that are made for another weight and to tell hypotheses apart."""


@dataclass(frozen=True)
class Shown:
    """One kind of probe: how many outputs of the kernel are not those of the clean replay."""

    kind: str
    outputs: int
    differing: int


@dataclass(frozen=True)
class Named:
    """What :func:`name_faults` found."""

    schema: str
    verdict: str
    """``equal``: no output of any probe differs from the clean replay; ``named``; ``unnamed``."""
    faults: tuple[Fault, ...]
    """The fewest that give every bit of every probe; empty unless named."""
    equals: tuple[tuple[Fault, ...], ...]
    """Other names, of as many faults: one and the same function, or none of the probes could tell them apart."""
    known: tuple[str, ...]
    """What can be said of a difference without a name, one sentence each."""
    probes: tuple[Shown, ...]
    calls: int
    """Of the kernel."""
    tried: int
    """Hypotheses that were replayed."""

    def __str__(self) -> str:
        if self.verdict == EQUAL:
            return "equivalent here: no output of any probe differs from the clean replay"
        if self.verdict == UNNAMED:
            return " ".join(("unnamed:", *self.known))
        also = f" (or: {'; or '.join(' + '.join(map(str, e)) for e in self.equals)})" if self.equals else ""
        return " + ".join(map(str, self.faults)) + also


def name_faults(
    kernel: Callable[[Tensor], Tensor],
    recipe: Recipe,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    seed: int = 0,
    most: int = 2,
    rounds: int = 4,
) -> Named:
    """Name the faults of ``kernel``, which maps x [M, K] to y [M, N] in the recipe's dtype, on the weight's device.

    ``recipe``, ``weight`` and ``bias`` say what it should compute; of the kernel nothing is known. ``most`` is the number of
    faults that are looked for together, up to 2. ``rounds`` bounds the inputs that tell hypotheses apart: 5 a round. Needs the
    compiled replay engine. Raises QlabError for a recipe whose bits are not determined and a kernel that does not repeat.

    A real kernel, here vLLM's Marlin as a checkpoint's layer runs on this GPU::

        kernel = registry.kernel("vllm.marlin.awq")
        packed = kernel.pack(weight.to("cuda"))
        clean = recipes.recipe(kernel.name, Problem.of(weight, 16), hardware.detect())
        print(name_faults(lambda x: kernel.run(x, packed), clean, weight.to("cuda")))
    """
    return _Search(kernel, recipe, weight, bias, seed, min(most, 2), rounds).run()


class _Search:
    def __init__(
        self,
        kernel: Callable[[Tensor], Tensor],
        recipe: Recipe,
        weight: Int4Weight,
        bias: Tensor | None,
        seed: int,
        most: int,
        rounds: int,
    ) -> None:
        check(recipe, (recipe.M, recipe.K), DTYPES[recipe.dtype], weight, bias)
        if recipe.opaque or not recipe.ordered:
            why = recipe.opaque or "sums left to atomics in no fixed order"
            raise QlabError(f"the recipe does not determine its bits ({why}): faults can be named only where it does")
        if reason := missing("native"):
            raise UnsupportedError(f"naming faults needs the compiled engine: {reason}")
        self.kernel, self.device = kernel, weight.device
        self.recipe, self.weight, self.bias = recipe, weight.to("cpu"), None if bias is None else bias.cpu()
        self.seed, self.most, self.rounds = seed, most, rounds
        self.calls = self.tried = 0
        self.seen: list[Seen] = []
        self.replays = Replays(self.bias, slab(weight.N, seed))
        problem = replace(Problem.of(self.weight, recipe.M), bias=bias is not None)
        self.variants = variants(recipe, problem)
        self.adapted: list[Candidate] = []

    def run(self) -> Named:
        first = [self._ask(p) for p in probes(self.recipe, self.weight, self.seed)]
        if not torch.equal(self._bits(first[0].x), first[0].y):
            raise QlabError("the kernel gave other bits for the same input: faults can be named only of one that repeats")
        self.power = one_hot_power(self.weight, self.bias)
        self.rows = [Seen(ONE_HOT, x, self._bits(x)) for x in one_hot(self.recipe, self.power)]
        self.seen = first
        got = torch.cat([s.y for s in self.rows])[: self.recipe.K].view(DTYPES[self.recipe.dtype])
        self.weights = Weights(self.weight, got, self.seed)
        clean = Hypothesis(self.weights.none, self.variants.none)
        shown = self._shown(clean)
        if not any(s.differing for s in shown):
            return Named(SCHEMA, EQUAL, (), (), (), shown, self.calls, self.tried)
        for count in range(1, self.most + 1):
            if survivors := self._tell_apart(self._surviving(count)):
                # A compound is one name for what may be several changes: it comes after them.
                names = sorted((name for h in survivors for name in h.names), key=_compound)
                faults, *others = distinct(names)
                return Named(SCHEMA, NAMED, faults, tuple(others), (), shown, self.calls, self.tried)
        return Named(SCHEMA, UNNAMED, (), (), self._known(clean), shown, self.calls, self.tried)

    def _bits(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.kernel(x.to(self.device))
        want = [self.recipe.M, self.recipe.N]
        if not isinstance(y, Tensor):
            raise QlabError(f"the kernel gave a {type(y).__name__}; it must give a tensor {want}")
        if list(y.shape) != want or y.dtype != x.dtype:
            raise QlabError(f"the kernel gave {y.dtype} {list(y.shape)}, and the recipe says {x.dtype} {want}")
        return y.detach().cpu().contiguous().view(torch.int16)

    def _ask(self, probe: Probe) -> Seen:
        return Seen(probe.kind, probe.x, self._bits(probe.x))

    def _shown(self, clean: Hypothesis) -> tuple[Shown, ...]:
        def differing(s: Seen) -> int:
            return int((self.replays.run(clean, s.x) != s.y).sum())

        rows = Shown(ONE_HOT, self.recipe.K * self.recipe.N, sum(map(differing, self.rows)))
        return (rows, *(Shown(s.kind, s.y.numel(), differing(s)) for s in self.seen))

    def _reading(self, variant: Variant) -> Reading:
        return Reading(variant.recipe, self.bias, self.power)

    def _surviving(self, count: int) -> list[Hypothesis]:
        """Hypotheses of ``count`` faults that give every bit seen so far."""
        found: list[Hypothesis] = []
        for arithmetic in range(count + 1):
            for variant in self._changed(arithmetic):
                for candidate in self.weights.of(self._reading(variant), count - arithmetic):
                    self._adapt(candidate, variant)
                    found.append(Hypothesis(candidate, variant))
        return [h for h in found if self._survives(h)]

    def _changed(self, count: int) -> tuple[Variant, ...]:
        """Variants of so many changes; compounds count as two, for they may be several."""
        known = self.variants
        if count < 2:
            return known.single if count else (known.none,)
        clean = self._reading(known.none)
        if self.weights.of(clean, 0):
            return (*known.double, *known.compound)
        # One-hot rows show another weight than the clean one: a change of the recipe must be what they show.
        firsts = [v for v in known.single if v.striped or self._reading(v).key != clean.key]
        return (*known.after(firsts), *known.compound)

    def _survives(self, h: Hypothesis) -> bool:
        self.tried += 1
        return self.replays.agrees(h, self.seen)

    def _adapt(self, candidate: Candidate, variant: Variant) -> None:
        """Inputs whose sums cancel under the weight that was read: only they show the arithmetic behind it."""
        if not candidate.faults or len(self.adapted) >= ADAPTED or candidate in self.adapted:
            return
        self.adapted.append(candidate)
        made = probes(replace(self.recipe, weights=variant.recipe.weights), candidate.weight, self.seed + len(self.adapted))
        self.seen[:0] = [self._ask(p) for p, _ in zip(made, range(SHARP), strict=False)]

    def _tell_apart(self, found: list[Hypothesis]) -> list[Hypothesis]:
        """Those that give every bit of one-hot rows and of further inputs, too, chosen where they would differ."""
        found = [h for h in found if all(torch.equal(self.replays.run(h, s.x), s.y) for s in self.rows)]
        for number in range(self.rounds):
            groups = _functions(found)
            if len(groups) < 2:
                break
            h = groups[number % len(groups)][0]
            made = probes(h.variant.recipe, h.weight.weight, self.seed + 10 * (number + 1))
            for p, _ in zip(made, range(SHARP), strict=False):
                if len(groups) > 1 and self._differ(groups, p.x):
                    self.seen.append(self._ask(p))
                    groups = [g for g in groups if torch.equal(self.replays.run(g[0], p.x), self.seen[-1].y)]
            found = [h for g in groups for h in g]
        return found

    def _differ(self, groups: list[list[Hypothesis]], x: Tensor) -> bool:
        first, *others = (self.replays.run(g[0], x) for g in groups)
        return any(not torch.equal(first, y) for y in others)

    def _known(self, clean: Hypothesis) -> tuple[str, ...]:
        reading = self._reading(self.variants.none)
        wrong = ~same(reading.predict(self.weights.clean), self.weights.got)
        if not bool(wrong.any()):
            return (
                "one-hot rows show the clean weight, so packing, group layout and decoding are right.",
                "The sums differ, and no one or two known changes of the recipe give these bits.",
            )
        k, n = wrong.nonzero().unbind(1)
        groups = self.weight.group_index[k].unique()
        where = (
            f"One-hot rows differ in {int(wrong.sum())} of {wrong.numel()} elements: rows {int(k.min())} to {int(k.max())}, "
            f"columns {int(n.min())} to {int(n.max())}, {len(groups)} of {self.weight.groups} groups."
        )
        explained = next((c for count in (1, 2) for c in self.weights.of(reading, count)), None)
        if explained is None:
            return where, "No one or two known faults of the weight explain them."
        named = " + ".join(map(str, explained.faults))
        return where, f"They are those of: {named}.", "The sums differ in something more."


def _compound(faults: tuple[Fault, ...]) -> bool:
    return any(f.kind in (OTHER_GPU, OTHER_KERNEL) for f in faults)


def _functions(found: list[Hypothesis]) -> list[list[Hypothesis]]:
    """Hypotheses that are one function by construction, together."""
    groups: list[list[Hypothesis]] = []
    for h in found:
        mine = next((g for g in groups if g[0].equals(h)), None)
        if mine is None:
            groups.append([h])
        else:
            mine.append(h)
    return groups
