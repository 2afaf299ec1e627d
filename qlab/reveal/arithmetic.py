"""In which type each addition rounds, and how a tensor core cuts its addends.

Most questions have the form 2^e + 2^(e-t), with -2^e added later: the small one comes out unless a rounding on the way lost it.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlab.recipe import Type
from qlab.reveal.parts import UNCUT, Add, Core, Part, Walk, any_leaf, last_pair, visit, wide
from qlab.reveal.probe import FORMATS, Prober

FRACTION: dict[Type, int] = {"bf16": 7, "fp16": 10, "fp32": 23}
"""Bits of a significand behind its first one."""
E = 12
SAMPLED = 8
"""Additions whose direction of rounding is asked for."""
DIRECTIONS = {(1.0, 1.0): "toward zero", (2.0, 2.0): "to nearest", (1.0, 2.0): "down", (2.0, 1.0): "up"}


class Arithmetic:
    """Fills in the types of a parsed tree. ``outside`` is a leaf that is added to the whole, where there is one."""

    def __init__(self, prober: Prober, root: Part, outside: int | None = None) -> None:
        self.prober = prober
        self.visited = list(visit(root, outside))
        self.out = FORMATS[prober.target.out_dtype].type

    def measure(self) -> None:
        within = [(p, q) for p, _ in self.visited if isinstance(p, Walk) and (q := _within(p))]
        above = [(p, (*last_pair(p), c)) for p, c in self.visited if c is not None and wide(p)]
        types = self.types([q for _, q in (*within, *above)])
        for (walk, _), type in zip(within, types, strict=False):
            walk.accumulator = type
        for (part, _), type in zip(above, types[len(within) :], strict=True):
            part.leaves_as = type
        self._short_chains()
        self._additions()

    def types(self, triples: Sequence[tuple[int, int, int]]) -> list[Type]:
        """The widest type that keeps the sum of a small b and a large a until c cancels a."""
        found: list[Type] = ["fp32"] * len(triples)
        lost = list(range(len(triples)))
        narrower: tuple[Type, ...] = ("fp16", "bf16")
        for type in narrower:
            t = FRACTION[type] + 1
            rows = [{a: 2.0**E, b: 2.0 ** (E - t), c: -(2.0**E)} for a, b, c in (triples[i] for i in lost)]
            lost = [i for i, v in zip(lost, self.prober.values(rows), strict=True) if not v]
            for i in lost:
                found[i] = type
        return found

    def _short_chains(self) -> None:
        """A chain of one step shows its accumulator only where it leaves it: it is taken to be what longer chains have."""
        walks = [p for p, _ in self.visited if isinstance(p, Walk)]
        for several in (False, True):
            known = {w.accumulator for w in walks if w.accumulator and (w.terms > 1) == several}
            for walk in walks:
                if walk.accumulator is None and (walk.terms > 1) == several:
                    walk.accumulator = next(iter(known)) if len(known) == 1 else walk.leaves_as or "fp32"

    def _additions(self) -> None:
        """The type of each addition whose sum reaches the next one, or the output, in a narrower type than fp32.

        Either it rounds to that type at once, or to fp32 first. 2^p + 1 lies half way between two numbers of p bits, and a
        quarter of a last place of fp32 decides it if it is seen.
        """
        asked: list[tuple[Add, Type, float, dict[int, float]]] = []
        for part, outside in self.visited:
            if not isinstance(part, Add):
                continue
            narrow = self.out if outside is None else part.leaves_as
            if narrow is None or narrow == "fp32":
                continue
            holds = next((p for p in part.parts if wide(p) and (p.leaves_as or "fp32") == "fp32"), None)
            if holds is None:
                part.type = narrow  # RN(RN32(a + b)) of two such values is RN(a + b): fp32 has bits enough (Figueroa 1995)
                continue
            other = part.parts[1] if holds is part.parts[0] else part.parts[0]
            p = FRACTION[narrow] + 1
            a, b = last_pair(holds)
            row = {a: 2.0**p, b: 1.0, any_leaf(other): 2.0 ** (p - 25)}
            if outside is not None:
                row[outside] = -(2.0**p)
            asked.append((part, narrow, 2.0 if outside is not None else 2.0**p + 2, row))
        for (part, narrow, seen, _), value in zip(asked, self.prober.values([row for *_, row in asked]), strict=True):
            part.type = narrow if value == seen else "fp32"

    def chains(self) -> list[Walk]:
        """Chains of several terms a step, from the left."""
        return [p for p, _ in self.visited if isinstance(p, Walk) and p.terms > 2]

    def core(self, walk: Walk) -> Core:
        """The step of a chain; its rounding too where it has several steps."""
        a, b, c = walk.steps[0][:3]
        top = 15 if self.prober.format.type == "fp16" else 60
        pair = {a: 2.0**top, b: -(2.0**top)}
        reach = self.prober.values([pair | {c: 2.0 ** (top - t)} for t in range(UNCUT)])
        kept = sum(1 for v in reach if v)
        if kept in (0, UNCUT):
            return Core(None, walk.terms, "", self._accumulator(walk))
        # One and a half of the last bit kept.
        sides = [self.prober.values([pair | {c: s * 3.0 * 2.0 ** (top - kept)}])[0] for s in (1.0, -1.0)]
        cut = (sides[0] / 2.0 ** (top - kept + 1), -sides[1] / 2.0 ** (top - kept + 1))
        return Core(kept - 1, walk.terms, _direction(cut), self._accumulator(walk))

    def _accumulator(self, walk: Walk) -> str:
        """How a sum of 2^e + 2^e and one and a half of its last places is rounded, before both are taken away again."""
        if len(walk.steps) < 2 or walk.accumulator is None:
            return ""
        (a, b, c), (d, e), p = walk.steps[0][:3], walk.steps[1][:2], FRACTION[walk.accumulator]
        big = (2.0 ** (E - 1), -(2.0 ** (E - 1)))
        rows = [{a: s, b: s, c: s * 3 * 2.0**-p, d: -s, e: -s} for s in big]
        places = [v / (2 * s * 2.0**-p) for v, s in zip(self.prober.values(rows), big, strict=True)]
        return _direction((places[0], places[1]))

    def additions(self) -> tuple[int, tuple[str, ...]]:
        """How many additions in fp32 were asked for their rounding, and the directions found."""
        triples = [
            (any_leaf(p.parts[0]), any_leaf(p.parts[1]), c)
            for p, c in self.visited
            if isinstance(p, Add) and c is not None and p.leaves_as == "fp32"
        ]
        narrow = [p for p, _ in self.visited if isinstance(p, Walk) and p.terms == 1 and p.accumulator == "fp32"]
        triples += [q for p in narrow if (q := _within(p))]
        triples = triples[: SAMPLED // 2] + triples[SAMPLED // 2 :][-SAMPLED // 2 :]
        rows = [{a: s, b: s * 3 * 2.0**-24, c: -s} for a, b, c in triples for s in (2.0**E, -(2.0**E))]
        values = self.prober.values(rows)
        places = [v / s * 2.0**23 for v, s in zip(values, (2.0**E, -(2.0**E)) * len(triples), strict=True)]
        return len(triples), tuple(sorted({_direction((x, y)) for x, y in zip(places[::2], places[1::2], strict=True)}))


def _direction(places: tuple[float, float]) -> str:
    """By what became of one and a half last places, above and below zero."""
    return DIRECTIONS.get(places, f"to {places[0]:g} and {places[1]:g} last places, of 1.5 and of -1.5")


def _within(walk: Walk) -> tuple[int, int, int] | None:
    """Two leaves of a chain that are added, and one that it takes later."""
    steps = walk.steps
    if walk.terms > 1:
        return (steps[0][0], steps[0][1], steps[1][0]) if len(steps) > 1 else None
    return (steps[0][0], steps[1][0], steps[2][0]) if len(steps) > 2 else None
