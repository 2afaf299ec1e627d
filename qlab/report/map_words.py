"""A map of recipes in words: the sentence that answers, and the cells of its tables."""

from __future__ import annotations

from collections.abc import Sequence

from qlab.attribution.map_result import Function, Map, OnGpu, Point, Range, Strip
from qlab.report.terminal import letter, share, short_kernel


def sentence(m: Map, strip: Strip) -> str:
    """What the map says of one kernel, without a full stop: how many classes row 0 has and where it keeps its bits."""
    where, values = f"{short_kernel(strip.name)} on {m.gpu}, {fixed(m)}", f"{m.axis} = {span(m.values[0], m.values[-1])}"
    if not strip.classes:
        return f"{where}: it does not run for {values}: {strip.points[0].reason}"
    kind = "form" if m.axis == "K" else "class"
    count = f"one {kind}" if strip.classes == 1 else f"{strip.classes} {kind}{'s' if kind == 'form' else 'es'}"
    parts = [f"{where}: {'the sum of row 0' if m.axis == 'K' else 'row 0'} has {count} for {values}"]
    base = strip.at(m.base)
    if base.kernel:
        parts.append(_kept(m, strip, strip.functions[base.function]))
    for number, f in enumerate(strip.functions):
        found = [r for r in strip.ranges if r.function == number]
        if f.state == "opaque" and found and number != base.function:
            parts.append(f"for {m.axis} = {spans(found)} the sum is opaque: {f.note}")
    return "; ".join(parts)


def _kept(m: Map, strip: Strip, f: Function) -> str:
    same = strip.as_at(m.base)
    if f.state == "opaque":
        return f"for {m.axis} = {spans(same)} the sum is opaque: {f.note}"
    if m.axis == "K":
        return f"that of K = {m.base} holds for {spans(same)}"
    if f.state == "atomics":
        return f"for {m.axis} = {spans(same)} atomics add in any order, so that its bits are not fixed even alone"
    if strip.classes == 1:
        return f"its bits do not depend on {'the number of SMs' if m.axis == 'sms' else m.axis}"
    if m.axis != "M":
        others = [r for r in same if (r.first, r.last) != (m.base, m.base)]
        return f"it has the bits of {m.axis} = {m.base} {f'for {spans(same)}' if others else f'at no other {m.axis}'}"
    alone = "alone it keeps its bits" if m.base == 1 else f"it keeps the bits of M = {m.base}"
    first, *again = same
    kept = f"{alone} up to M = {first.last}" if first.last > m.base else f"{alone} at no larger M"
    return kept if not again else f"{alone} for M = {spans(same)}"


def legend(m: Map, strip: Strip) -> list[tuple[int, str]]:
    """(class, words) of the classes of row 0, in order of appearance along the axis."""
    found = []
    for number in dict.fromkeys(p.function for p in strip.points if p.function >= 0):
        f = strip.functions[number]
        where = spans([r for r in strip.ranges if r.function == number], most=3)
        what = f.note if f.state == "opaque" else f"{chains(f)} chain{'s' if f.chains[1] > 1 else ''}"
        what += ", added by atomics" if f.state == "atomics" else ""
        found.append((number, f"{letter(number)}  {m.axis} = {where}: {what}"))
    return found


def header(m: Map) -> list[str]:
    """Columns of the table of ranges; the first three and the last are words."""
    same = [] if m.axis == "K" else [f"bits of\n{m.axis} = {m.base}"]
    rows = [f"rows as at\n{m.axis} = {m.base}"] if m.axis == "M" else []
    kind = "form" if m.axis == "K" else "class"
    return ["kernel", m.axis, kind, *same, "columns\nchanged", "chains of\nan output", *rows, "note"]


def range_rows(m: Map, strip: Strip) -> list[list[str]]:
    """A row for each range of row 0."""
    found = []
    for r in strip.ranges:
        p, name = strip.at(r.first), short_kernel(strip.name)
        if r.function < 0:
            found.append([name, span(r.first, r.last), *["-"] * (len(header(m)) - 3), r.reason])
            continue
        f = strip.functions[r.function]
        same = [] if m.axis == "K" else [{True: "yes", False: "no", None: "not fixed" if f.state == "atomics" else "-"}[p.same]]
        changed = "-" if p.changed is None else share(p.changed)
        rows = [share(strip.rows_as_at(m.base, r))] if m.axis == "M" else []
        found.append([name, span(r.first, r.last), letter(r.function), *same, changed, chains(f), *rows, _note(strip, p, f)])
    return found


def gpu_rows(strip: Strip) -> list[list[str]]:
    """A row for the GPUs of the table that share a recipe: GPUs, SMs, class of row 0 with those SMs, kernel or why none."""
    groups: dict[tuple[str, str], list[OnGpu]] = {}
    for g in strip.gpus:
        groups.setdefault((g.recipe or g.reason, g.kernel), []).append(g)
    rows = []
    for (_, kernel), group in groups.items():
        first = group[0]
        sms = ", ".join(dict.fromkeys(str(g.sms) for g in group))
        orders = ", ".join(dict.fromkeys(letter(g.function) for g in group if g.function >= 0)) if kernel else "-"
        refusal = first.reason.removeprefix(f"{strip.name} does not run this problem on {first.gpu}: ")
        rows.append([", ".join(g.gpu for g in group), sms, orders, short_kernel(kernel) or refusal])
    return rows


def fixed(m: Map) -> str:
    """The shape but for the axis."""
    s = m.shape
    numbers = {"M": s.M, "K": s.K, "N": s.N}
    return ", ".join(f"{name}={value}" for name, value in numbers.items() if name != m.axis)


def span(first: int, last: int) -> str:
    """``5`` or ``5 to 8``."""
    return str(first) if first == last else f"{first} to {last}"


def spans(found: Sequence[Range], most: int = 4) -> str:
    """Ranges one after another; ``most`` of them are named."""
    more = len(found) - most
    shown = [span(r.first, r.last) for r in found[:most]]
    return ", ".join(shown) + (f" and {more} more range{'s' if more > 1 else ''}" if more > 0 else "")


def chains(f: Function) -> str:
    """How many chains an output of the class is summed from."""
    return "-" if f.state == "opaque" else span(*f.chains)


def _note(strip: Strip, p: Point, f: Function) -> str:
    name = short_kernel(p.kernel) if p.kernel != strip.name else ""
    state = {"opaque": f"opaque: {f.note}", "atomics": "atomics: not repeatable", "fixed": ""}[f.state]
    return "; ".join(part for part in (name, state) if part)
