"""Why two paths differ, in a sentence: the narrow answer first."""

from __future__ import annotations

import math
from typing import NamedTuple

from qlab.attribution.result import LOGPROBS, OUTPUT, PACKING, Explained, Factor, Interaction, Measure, Share
from qlab.report.terminal import short_kernel

OF = {LOGPROBS: "the log-probabilities", OUTPUT: "the layers' outputs", "projection": "the layers' outputs (projection)"}
SECOND = 0.1
"""Share of the total from which the second factor is named."""
APART = 0.2
"""Share that two measures give to other factors, from which they are said to disagree."""
WEIGHTS = "weights"
OPPOSED = "partly undo each other"
OVERLAP = "overlap"
TOGETHER = "go beyond their sum together"


def headline(e: Explained) -> Measure | None:
    """The measure that the sentence speaks of: the log-probabilities where they differ, else the layers' outputs."""
    found = [m for m in (e.measure(LOGPROBS), e.measure(OUTPUT)) if m is not None]
    return next((m for m in found if m.total), found[0] if found else None)


def sentence(e: Explained) -> str:
    """The answer, in one sentence where the measures agree and no two factors cancel."""
    m = headline(e)
    if m is None or not m.total:
        return f"{_equal(e)}; {_packing(e, m)}."
    if not m.parts:
        return f"{e.a} and {e.b} differ in {OF[m.name]}, but no factor between them differs; {_packing(e, m)}."
    first, *rest = _causes(e, m)
    named = [first, *(c for c in rest[:1] if abs(c.share) > SECOND)]
    answer = f"{first.amount} of the difference in {OF[m.name]} comes from {first.text}"
    answer += "".join(f", {c.amount} from {c.text}" for c in named[1:])
    if not any(c.packing for c in named):
        answer += f"; {_packing(e, m)}"
    before = [f"{OF[LOGPROBS].capitalize()} are equal, bit for bit."] if m.name != LOGPROBS and e.measure(LOGPROBS) else []
    return " ".join([*before, f"{answer}.", *_opposed(e, m), *_disagree(e, m)])


class Cause(NamedTuple):
    """What the sentence can name: a factor, or a union whose factors undo each other."""

    share: float
    amount: str
    text: str
    packing: bool


def _causes(e: Explained, m: Measure) -> list[Cause]:
    """The largest first. Members that undo each other by more than half are told as one: each alone would mislead."""
    unions: dict[str, list[Share]] = {}
    for p in m.parts:
        unions.setdefault(_factor(e, p.factor).union or p.factor, []).append(p)
    found = []
    for union, parts in unions.items():
        whole = sum(p.share for p in parts)
        if len(parts) > 1 and abs(whole) < 0.5 * max(abs(p.share) for p in parts):
            found.append(Cause(whole, percent(whole), _together(e, union, parts), False))
            continue
        for p in parts:
            f = _factor(e, p.factor)
            found.append(Cause(p.share, _share(p, m), _told(e, f), f.category == PACKING))
    return sorted(found, key=lambda c: -abs(c.share))


def _together(e: Explained, union: str, parts: list[Share]) -> str:
    """A union with its members' shares."""
    members = ", ".join(f"{_factor(e, p.factor).a} to {_factor(e, p.factor).b}: {percent(p.share)}" for p in parts)
    return f"{union.split(' (')[0]} as a whole ({members})"


def ranked(m: Measure) -> list[Share]:
    """The parts, those of the largest amount first."""
    return sorted(m.parts, key=lambda p: -abs(p.value))


def sides(e: Explained) -> tuple[str, str]:
    """Short names of A and B: their kernels, methods or GPUs, whatever tells them apart."""
    if e.a == e.b:
        return "A", "B"
    (one, _, here), (other, _, there) = e.a.partition("@"), e.b.partition("@")
    if one == other and here != there:
        return here, there
    if here == there and one != other:
        kernels = [{short_kernel(k) for k in end.kernels} for end in e.ends]
        if len(kernels) == 2 and all(len(k) == 1 for k in kernels) and kernels[0] != kernels[1]:
            return kernels[0].pop(), kernels[1].pop()
        return one, other
    return e.a, e.b


def brief(name: str) -> str:
    """A factor's name without what explains it: ``cut of K (split-K, stripes)`` is the cut of K."""
    return " + ".join(part.split(" (")[0].split(", ")[0] for part in name.split(" + "))


def percent(share: float, digits: int = 1) -> str:
    """``99.2%``; exactly none is ``0``, and what is not all of it never rounds to 100%."""
    if not math.isfinite(share):
        return "-"
    if share in (0.0, 1.0, -1.0):
        return f"{100 * share:.0f}%" if share else "0"
    text, step = f"{100 * share:.{digits}f}", 10.0**-digits
    if not float(text):
        return f"{'<' if share > 0 else '>-'}{step:g}%"
    if abs(float(text)) == 100 and abs(share) < 1:
        return f"{'>' if share > 0 else '<-'}{100 - step:.{digits}f}%"
    return f"{text}%"


def reading(m: Measure, i: Interaction) -> str:
    """What an interaction means, by what the two factors do alone; empty where that is unknown or the interaction is small."""
    one, other = m.part(i.first), m.part(i.second)
    if one is None or other is None or one.alone is None or other.alone is None or abs(i.value) < 0.01 * abs(m.total):
        return ""
    if i.value > 0:
        return TOGETHER
    return OPPOSED if one.alone + other.alone + i.value < 0.75 * max(one.alone, other.alone) else OVERLAP


def _equal(e: Explained) -> str:
    equal = f"{e.a} and {e.b} are equal"
    equal += ", bit for bit" if not sum(x.differing for x in e.layers) else " but for the sign of zeros"
    parts = [brief(f.name) for f in e.factors if not f.same]
    return equal + (f", though they differ in {_listed(parts)}" if parts else "")


def _packing(e: Explained, m: Measure | None) -> str:
    """What packing contributes: 0 where it is the same, else how much and where."""
    mine = [f for f in e.factors if f.category == PACKING]
    if not mine:
        return "packing was not compared"
    moved = [f for f in mine if not f.same]
    parts = [p for f in moved if m is not None and (p := m.part(f.name))]
    if m is None or not any(p.value for p in parts):
        return "packing contributes 0" + (f", though it differs: {'; '.join(f.b for f in moved)}" if moved else "")
    share = percent(sum(p.value for p in parts) / m.total)
    return f"packing contributes {share} ({'; '.join(f.b for f in moved)})"


def _told(e: Explained, f: Factor) -> str:
    """A factor with both sides' texts."""
    if not f.a and not f.b:
        return brief(f.name)
    a, b = (e.a.partition("@")[0], e.b.partition("@")[0]) if WEIGHTS in (f.category, f.union) else sides(e)
    at = "on" if (a, b) == (e.a.partition("@")[2], e.b.partition("@")[2]) else "in"
    apart = ";" if "," in f.a else ","
    return f"{brief(f.name)} ({f.a or 'none'} {at} {a}{apart} {f.b or 'none'} {at} {b})"


def _share(p: Share, m: Measure) -> str:
    if p.low is None or p.high is None:
        return percent(p.share)
    ends = sorted((p.low / m.total, p.high / m.total))
    return f"{percent(p.share)} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _opposed(e: Explained, m: Measure) -> list[str]:
    """A sentence on the two factors that undo or repeat each other most, where that is at least half of the total.

    Two that undo each other in the layers' outputs are named as well where the log-probabilities hide it.
    """
    outputs = e.measure(OUTPUT)
    found = _pairs(m) + ([f for f in _pairs(outputs) if f[2] == OPPOSED] if outputs is not None and outputs is not m else [])
    if not found:
        return []
    of, i, what = min(found, key=lambda f: (f[2] != OPPOSED, f[0] is not m, f[1].value / abs(f[0].total)))
    two = f"{brief(i.first)} and {brief(i.second)}"
    start = two[0].upper() + two[1:] if of is m else f"In {OF[of.name]} {two}"
    return [f"{start} {what}: interaction {percent(i.value / abs(of.total))} of the difference."]


def _pairs(m: Measure) -> list[tuple[Measure, Interaction, str]]:
    """Interactions of minus half of the total or more, with their reading."""
    found = [(m, i, reading(m, i)) for i in m.interactions if m.total and i.value < -0.5 * abs(m.total)]
    return [f for f in found if f[2]]


def _disagree(e: Explained, m: Measure) -> list[str]:
    """A sentence where the layers' outputs are due to other factors than the log-probabilities."""
    outputs = e.measure(OUTPUT)
    if m.name != LOGPROBS or outputs is None or not outputs.total or not outputs.parts:
        return []
    names = [p.factor for p in m.parts]
    theirs = {p.factor: p.share for p in outputs.parts}
    apart = sum(abs(p.share - theirs.get(p.factor, 0.0)) for p in m.parts) / 2
    if apart <= APART or len(names) < 2:
        return []
    first = ranked(outputs)[0]
    said = f"Of the difference in {OF[OUTPUT]} {percent(first.share)} comes from {brief(first.factor)}"
    ours = m.part(first.factor)
    said += f", of that in {OF[LOGPROBS]} {percent(ours.share)}" if ours else ""
    if _excess(m) > max(1.5, 1.2 * _excess(outputs)):
        return [f"{said}: the latter saturate, since one flipped bit re-rolls every later rounding."]
    return [f"{said}."]


def _excess(m: Measure) -> float:
    """What the factors would make if each did all that it does alone, as a multiple of the total."""
    return sum(p.alone or 0.0 for p in m.parts) / m.total


def _factor(e: Explained, name: str) -> Factor:
    return next(f for f in e.factors if f.name == name)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
