"""Planted faults as ground truth: what was planted, what was named, and how the two compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlab.attribution.fault import Fault
from qlab.attribution.faults import EQUAL, NAMED, Named
from qlab.environment import Environment

SCHEMA = "qlab.planted/1"
RIGHT, MISSED, WRONG, EQUIVALENT = "right", "missed", "wrong", "equivalent"
NOTHING = "nothing"
"""What stands for the planted or the named fault where the other side has one more."""


@dataclass(frozen=True)
class Case:
    """One kernel with faults, and the answer."""

    name: str
    """The clean kernel, GPU, shape and form of the weight; or the real case that it rebuilds, with its source."""
    planted: tuple[Fault, ...]
    truth: tuple[Fault, ...]
    """Those of the planted faults that change a bit of the probes, given the others; empty where none does."""
    verdict: str
    named: tuple[Fault, ...]
    """The answer; where it names several hypotheses that no probe tells apart and one is the truth, that one."""
    equals: int
    """Other hypotheses that the answer names with it."""
    first: bool
    """Whether the answer names ``named`` first."""
    result: str
    """``right``, ``missed`` (equal or unnamed), ``wrong``; ``equivalent`` where nothing planted acts and the answer says so."""
    calls: int
    tried: int
    seconds: float
    seed: int


@dataclass(frozen=True)
class KindRow:
    """How one kind of fault fared among the cases with ``faults`` of them."""

    kind: str
    faults: int
    cases: int
    right: int
    missed: int
    wrong: int
    named: int
    """Answers that name it."""

    @property
    def precision(self) -> float:
        """Share of the answers that name the kind which are right; 1 where none does."""
        return self.right / self.named if self.named else 1.0

    @property
    def recall(self) -> float:
        """Share of the cases that are named rightly; 1 of none."""
        return self.right / self.cases if self.cases else 1.0


@dataclass(frozen=True)
class Confusion:
    """How often a planted kind was named as another, or as itself."""

    faults: int
    planted: str
    named: str
    cases: int


@dataclass(frozen=True)
class Planted:
    """The whole suite."""

    schema: str
    environment: Environment
    command: str
    seed: int
    cases: tuple[Case, ...]
    kinds: tuple[KindRow, ...]
    confusion: tuple[Confusion, ...]
    seconds: float

    def of(self, faults: int) -> tuple[Case, ...]:
        """The cases whose truth has so many faults; 0 for those in which nothing acts."""
        return tuple(c for c in self.cases if len(c.truth) == faults)

    def precision(self, faults: int) -> float:
        """Share of right answers among those that name something, for cases with so many faults."""
        answers = [c for c in self.of(faults) if c.verdict == NAMED]
        return sum(c.result == RIGHT for c in answers) / len(answers) if answers else 1.0

    def recall(self, faults: int) -> float:
        """Share of right answers among all cases with so many faults."""
        cases = self.of(faults)
        return sum(c.result == RIGHT for c in cases) / len(cases) if cases else 1.0


def judged(name: str, planted: Sequence[Fault], truth: Sequence[Fault], answer: Named, seconds: float, seed: int) -> Case:
    """An answer held against the truth; a planted fault without a place is any of its kind."""
    answers = (answer.faults, *answer.equals) if answer.verdict == NAMED else ()
    found = next((a for a in answers if _same(a, truth)), None)
    if truth:
        result = RIGHT if found is not None else WRONG if answers else MISSED
    else:
        result = EQUIVALENT if answer.verdict == EQUAL else WRONG
    return Case(
        name,
        tuple(planted),
        tuple(truth),
        answer.verdict,
        found if found is not None else answer.faults,
        len(answer.equals),
        found is not None and found == answer.faults,
        result,
        answer.calls,
        answer.tried,
        seconds,
        seed,
    )


def _same(named: Sequence[Fault], truth: Sequence[Fault]) -> bool:
    left = list(named)
    for t in truth:
        match = next((f for f in left if f.kind == t.kind and _same_place(f.place, t.place)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _same_place(named: str, truth: str) -> bool:
    """A truth without a place is any; one that is a number, such as a count of SMs, is one of those named."""
    return truth in ("", named) or (truth.isdigit() and truth in named.split(" for ")[0].split(" or "))


def kind_rows(cases: Iterable[Case]) -> tuple[KindRow, ...]:
    """By number of faults and kind, the most cases first."""
    counts: dict[tuple[int, str], Counter[str]] = {}
    for c in cases:
        for f in c.truth:
            counts.setdefault((len(c.truth), f.kind), Counter()).update(["cases", c.result])
        for f in c.named if c.truth else ():
            counts.setdefault((len(c.truth), f.kind), Counter()).update(["named"])
    rows = [KindRow(k, n, c["cases"], c[RIGHT], c[MISSED], c[WRONG], c["named"]) for (n, k), c in counts.items()]
    return tuple(sorted(rows, key=lambda r: (r.faults, -r.cases, r.kind)))


def confusion(cases: Iterable[Case]) -> tuple[Confusion, ...]:
    """Planted against named kinds. Of a case's faults equal kinds are paired first, then what is left, in order."""
    counts: Counter[tuple[int, str, str]] = Counter()
    for c in cases:
        truth, named = [f.kind for f in c.truth], [f.kind for f in c.named]
        for kind in list(truth):
            if kind in named:
                truth.remove(kind)
                named.remove(kind)
                counts[len(c.truth), kind, kind] += 1
        for i in range(max(len(truth), len(named))):
            pair = [side[i] if i < len(side) else NOTHING for side in (truth, named)]
            counts[len(c.truth), pair[0], pair[1]] += 1
        if not c.truth and not c.named:
            counts[0, NOTHING, NOTHING] += 1
    return tuple(Confusion(*key, count) for key, count in sorted(counts.items()))


def part(kind: str) -> str:
    """The part of a kernel that a kind of fault is in: what stands before its colon."""
    return kind.split(":")[0]
