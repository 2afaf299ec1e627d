"""One output element from outside: its tree, its arithmetic, and whether that is all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from qlab.recipe import (
    Chain,
    Join,
    Node,
    Opaque,
    Output,
    Round,
    Unordered,
    chain,
    join,
    nodes,
    rounded,
    unfold,
    unordered,
    value_type,
)
from qlab.reveal import blocks
from qlab.reveal import unordered as atomics
from qlab.reveal.arithmetic import Arithmetic
from qlab.reveal.blocks import Template
from qlab.reveal.check import differing, random_rows
from qlab.reveal.parts import Add, Core, Walk, parse, to_node
from qlab.reveal.probe import Prober
from qlab.reveal.result import Evidence, Found
from qlab.reveal.scale import scaling, unit_weight
from qlab.reveal.target import Model, Target
from qlab.reveal.topology import RevealError, Tree, leaves, together
from qlab.weights import ACTIVATION_DTYPES

BORNE_OUT = "so the blocks and chains that were not asked one by one are as those that were"
ASSUMED = "that blocks and chains which were not asked one by one are as those that were"
TABLE = "the exponent of a zero addend and the sign of a zero sum come from the hardware table: no probe here shows them"


class Finder:
    """Asks one target, whose weight is 1 at every k, and keeps the evidence."""

    def __init__(self, target: Target) -> None:
        self.target, self.prober = target, Prober(target)
        self.big = self.prober.format.big
        self.evidence: list[Evidence] = []
        self.counted = target.calls

    def note(self, question: str, answer: str) -> None:
        """One piece of evidence, with the calls since the last one."""
        self.evidence.append(Evidence(question, answer, self.target.calls - self.counted))
        self.counted = self.target.calls

    def withdraw(self, mark: int) -> None:
        """Takes back the evidence since ``mark``; its calls count towards the next piece."""
        self.counted -= sum(e.calls for e in self.evidence[mark:])
        del self.evidence[mark:]

    def find(self) -> Found:
        ordered = atomics.repeats(self.target)
        same = f"yes: {atomics.REPEATS} runs gave the same bits"
        self.note("Is the order fixed?", same if ordered else "no: the same input gave different bits (atomics)")
        if ordered:
            parts = [list(range(self.target.k))]
        else:
            parts = atomics.ordered_parts(self.prober)
            self.note("Which k are summed in a fixed order?", f"{len(parts)} parts, k {_cuts(parts)}")
        samples = self._sample(parts)
        small = len(parts) == 1 and len(samples) == 1 and len(list(leaves(samples[0]))) == self.target.k
        forms = [f for size in blocks.BLOCKS if (f := blocks.template(samples, size)) is not None]
        self._say_sampled(samples, forms)
        # The largest blocks first; where a replay of what was found differs, every chain's own step, then smaller blocks.
        plans = [(form, every) for form in [*([] if small else forms), None] for every in (False, True)]
        refused: Template | None = None
        for form, every in plans:
            if form is not None and form == refused:
                continue
            mark = len(self.evidence)
            try:
                node, core = self._attempt(parts, samples if small else [], form, every)
            except RevealError as e:
                if form is None:
                    raise
                refused = form
                self.withdraw(mark)
                self.note(f"Do blocks of {form.size} do?", f"no: {e}")
                continue
            wrong = self._check(node, parts)
            if not wrong or (form, every) == plans[-1]:
                break
            self.withdraw(mark)
            asked = "with every chain's own step" if every else "with one step for all chains"
            how = f"Do blocks of {form.size} do?" if form is not None else "Does this do?"
            self.note(how, f"{asked}, a replay differs on {wrong} random inputs")
        if wrong:
            self.note("Is that all?", f"no: a replay differs on {wrong} random inputs")
        exact = None if wrong is None else wrong == 0
        assumed = ([] if exact else [ASSUMED]) + ([] if core is None else [TABLE])
        return Found(node, core, ordered, exact, tuple(self.evidence), tuple(assumed))

    def _sample(self, parts: Sequence[Sequence[int]]) -> list[Tree]:
        ends = [parts[0]] if len(parts) == 1 else [parts[0], parts[-1]]
        found = [s for part in ends for s in blocks.stretches(part)]
        found = [found[0], found[-1]] if len(found) > 1 else found
        return self.prober.solve(blocks.sample(found, self.big))

    def _say_sampled(self, samples: Sequence[Tree], forms: Sequence[Template]) -> None:
        where = " and ".join(f"{min(leaves(t))}:{max(leaves(t)) + 1}" for t in samples)
        if not forms:
            how = "no two blocks lie alike"
        elif forms[0].steps:
            how = f"each aligned {forms[0].size} is {len(forms[0].steps)} steps of {len(forms[0].steps[0])} of one accumulator"
        else:
            how = f"each aligned {forms[0].size} is a sum of its own"
        self.note("How do neighbouring k lie?", f"asked leaf by leaf in k {where}: {how}")

    def _attempt(
        self, parts: Sequence[Sequence[int]], known: list[Tree], form: Template | None, every: bool
    ) -> tuple[Node, Core | None]:
        """The whole sum by blocks of one form; ``every`` asks each chain for its step."""
        trees = known or self.prober.solve(together([blocks.cover(p, form, self.big) for p in parts]))
        self.note("Which tree?", _asked(form, self.target.k, bool(known)))
        found: list[Node] = []
        core: Core | None = None
        for i, tree in enumerate(trees):
            by = parts[i][0] - parts[0][0]
            if i and not every and tree == blocks.shifted(trees[0], by):
                found.append(_moved(found[0], by))
                continue
            part = parse(tree)
            asked = Arithmetic(self.prober, part, parts[i - 1][0] if len(parts) > 1 else None)
            asked.measure()
            if not i:
                self.note("In which types?", _types(asked))
                core = self._core(asked)
            cores = [asked.core(w) for w in asked.chains()] if every else [core] if core else []
            found.append(to_node(part, cores))
        if every and core is not None:
            self.note("Has every chain this step?", "asked of each")
        if len(found) == 1:
            return found[0], core
        type = atomics.addition_type(self.prober, parts)
        self.note("In which type are the parts added?", type)
        if type != "fp32" and any(value_type(f) not in (type, None) for f in found):
            raise RevealError(
                f"parts seem to be added in {type} without being rounded to it first; on a quiet GPU atomics can come in one "
                "order all the time, and then these probes cannot tell them from joins: try a shape with more thread blocks"
            )
        return unordered(found, type), core

    def _core(self, asked: Arithmetic) -> Core | None:
        count, directions = asked.additions()
        if count:
            self.note("How do additions in fp32 round?", f"{', '.join(directions)} ({count} asked)")
        walk = min(asked.chains(), key=lambda w: len(w.steps) < 2, default=None)
        if walk is None:
            return None
        core = asked.core(walk)
        kept = f"F = {core.fraction_bits} bits below the largest, cut {core.cut}"
        kept = "no cut was seen" if core.fraction_bits is None else kept
        self.note("What does a fused sum keep?", f"L = {core.terms} addends and the accumulator; {kept}")
        if core.rounding:
            self.note("How is its accumulator rounded?", f"{core.rounding} (asked with the last)")
        return core

    def _check(self, node: Node, parts: Sequence[Sequence[int]]) -> int | None:
        """On how many random inputs a replay differs; None where there is no replay."""
        t = self.target
        if t.dtype not in ACTIVATION_DTYPES or t.out_dtype != t.dtype or any(isinstance(n, Opaque) for n in nodes(node)):
            return None
        weight = unit_weight(t.k, 1, t.k, t.dtype)
        if len(parts) == 1:
            rows = random_rows(range(t.k), t.k, t.dtype)
            wrong, count = differing(t, Model(node), weight, rows), len(rows)
        else:  # one part alone has a fixed order
            assert isinstance(node, Unordered)
            wrong = count = 0
            for part in node.parts:
                members = sorted(k for n in nodes(part) if isinstance(n, Chain) for k in unfold(n.walk).tolist())
                rows = random_rows(members, t.k, t.dtype)
                wrong, count = wrong + differing(t, Model(part), weight, rows), count + len(rows)
        if not wrong:
            where = "" if len(parts) == 1 else ", one part at a time"
            said = f"yes: a replay gives the same bits on {count} random inputs{where}; {BORNE_OUT}"
            self.note("Is that all?", said)
        return wrong


def add_scaling(found: Found, target: Target, group_size: int) -> Found:
    """The same with the place of the scale, asked of a target that has the weight of qlab.reveal.scale."""
    node = found.node
    two = isinstance(node, Join) and len(node.parts) == 2 and node.type != "fp32"
    parts = _starts(node) if isinstance(node, Unordered) or two else None
    before = target.calls
    s = scaling(target, group_size, parts)
    if s.each_part and isinstance(node, Unordered | Join):
        node = unordered(node.parts, node.type, scaled=True)
    evidence = (*found.evidence, Evidence("Where is the scale applied?", s.text, target.calls - before))
    return replace(found, node=node, weights=s.weights, output=Output(scale=s.after_sum), evidence=evidence)


def _starts(node: Node) -> tuple[int, int] | None:
    """An even k of each of the first two parts."""
    assert isinstance(node, Join | Unordered)
    first = [min((r.start for n in nodes(p) if isinstance(n, Chain) for r in n.walk), default=1) for p in node.parts[:2]]
    return None if any(k % 2 for k in first) else (first[0], first[1])


def _cuts(parts: Sequence[Sequence[int]]) -> str:
    shown = [f"{p[0]}:{p[-1] + 1}" for p in parts]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]])


def _asked(form: Template | None, k: int, whole: bool) -> str:
    if whole:
        return "known leaf by leaf"
    if form is None:
        return "asked leaf by leaf"
    each = "and of each step of a block whether it starts a sum and whether its k lie together"
    return f"one leaf of each of {k // form.size} blocks, {each}"


def _types(asked: Arithmetic) -> str:
    walks = Counter(p.accumulator for p, _ in asked.visited if isinstance(p, Walk))
    adds = Counter(p.type for p, _ in asked.visited if isinstance(p, Add))
    narrowed = Counter(p.leaves_as for p, _ in asked.visited if p.leaves_as not in (None, "fp32"))
    said = [f"chains in {t}: {n}" for t, n in walks.items()] + [f"additions in {t}: {n}" for t, n in adds.items()]
    return ", ".join([*said, *(f"partial sums that reach the next addition in {t}: {n}" for t, n in narrowed.items())])


def _moved(node: Node, by: int) -> Node:
    if isinstance(node, Chain):
        return chain(node.step, unfold(node.walk) + by)
    if isinstance(node, Round):
        return rounded(_moved(node.node, by), node.type)
    if isinstance(node, Join):
        return join([_moved(p, by) for p in node.parts], node.type)
    return node


def find(target: Target) -> Found:
    """What ``target`` computes, whose weight is 1 at every k. Raises RevealError where its answers fit no sum."""
    return Finder(target).find()
