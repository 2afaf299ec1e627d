"""Why two paths differ: sentence, tables and, from qlab/report/explain_figure.py, the waterfall."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from qlab.attribution.result import LOGPROBS, MEASURES, OUTPUT, PACKING, PROJECTION, End, Explained, Factor, Measure, Share
from qlab.report.explain_figure import waterfall
from qlab.report.explain_words import brief, headline, percent, ranked, reading, sentence, sides
from qlab.report.logprob_cells import small
from qlab.report.markdown import table
from qlab.report.terminal import Titled, number, short, short_kernel
from qlab.report.terminal import share as positive_share

__all__ = ["markdown", "rows", "sentence", "show", "waterfall"]

COLUMN = {LOGPROBS: "log-probs", OUTPUT: "outputs", PROJECTION: "projection"}
BROKEN = {LOGPROBS: "log-\nprobs", OUTPUT: "outputs", PROJECTION: "projec-\ntion"}
UNIT = {LOGPROBS: "squared L2 of the log-probabilities (nat^2)", OUTPUT: "squared relative L2 of the layers' outputs, summed"}
PAIRS, SMALLEST = 6, 1e-4
"""Interactions that are shown at most, and the share of the total from which they are."""
WIDE, INTERVAL = 100, 10
"""Columns of a terminal from which the two cheap readings are printed, too, and how many more where there are intervals."""
LONGEST = 16
"""Letters of a factor's longest word, set in: ``dequantisation``, ``multiplication``."""
FITS = 14
"""Letters of a side's name that fit the head of its column."""
Kind = Literal["union", "factor", "same", "total", "rounding"]


@dataclass(frozen=True)
class Row:
    """A row of the table of factors."""

    kind: Kind
    name: str
    a: str
    b: str
    shares: tuple[str, ...]
    """One cell for each measure."""
    alone: str = ""
    """In shares of the headline measure's total, as ``removed``."""
    removed: str = ""
    interval: str = ""
    """95% of the headline measure's share, where orders were sampled."""
    inside: bool = False
    """Whether it stands in the union above."""


def show(e: Explained, console: Console, *, every_layer: bool = False) -> None:
    """Print the whole answer; ``every_layer`` adds a row for each linear layer."""
    console.print(header(e))
    console.print(factor_table(e, console.width), Text("\n".join(_below(e, cheap=_cheap(e, console.width)))))
    more: list[RenderableType] = [pairs] if (pairs := interaction_table(e)) is not None else []
    if every_layer and e.layers:
        more += layer_tables(e, console.width)
    if more:
        console.print("", *more, sep="\n")
    for note in e.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True, highlight=False)


def header(e: Explained) -> RenderableType:
    """The sentence, then what was compared."""
    env = e.environment
    compared = (
        f"{_count(e.rows, 'row')} of log-probabilities, {_count(e.tokens, 'token')}" if e.rows else _count(e.tokens, "row")
    )
    lines = [
        f"[bold]{escape(sentence(e))}[/]",
        f"A {escape(e.a)}, B {escape(e.b)}; {escape(e.where)}",
        *(f"{side}: {escape(_end(end))}" for side, end in zip("AB", e.ends, strict=False)),
        f"{compared}; {_count(e.evaluations, 'hybrid')}; {escape(env.gpu or env.cpu)}; torch {env.torch}; {e.seconds:.1f} s",
    ]
    return Panel(Text.from_markup("\n".join(lines)), title="qlab.kernels --explain", title_align="left", expand=False)


def rows(e: Explained) -> list[Row]:
    """Factors, the largest first, under their union where it has several; then packing, the total, and what rounding leaves."""
    measures, main = _measures(e), headline(e)
    if main is None:
        return []
    order = [p.factor for p in ranked(main)]
    moved = sorted((f for f in e.factors if not f.same), key=lambda f: order.index(f.name) if f.name in order else len(order))
    groups: dict[str, list[Factor]] = {}
    for f in moved:
        groups.setdefault(f.union or f.name, []).append(f)
    size = {key: abs(sum(_value(main, f) for f in group)) for key, group in groups.items()}
    found: list[Row] = []
    for key in sorted(groups, key=lambda key: -size[key]):
        group = groups[key]
        if len(group) > 1:
            found.append(Row("union", key, "", "", tuple(_share(m, sum(_value(m, f) for f in group)) for m in measures)))
        found += [_row(f, measures, main, inside=len(group) > 1) for f in group]
    packing = [f for f in e.factors if f.same and f.category == PACKING]
    found += [Row("same", f.name, f.a, f.b, ("0",) * len(measures), "0", "0") for f in packing]
    shown = [[r.shares[i] for r in found if r.kind == "factor"] for i in range(len(measures))]
    found.append(Row("total", "total", "", "", tuple("100%" if m.total else "0" for m in measures)))
    left = tuple(_left(cells) if m.total else "0" for m, cells in zip(measures, shown, strict=True))
    if any(cell != "0" for cell in left):
        found.append(Row("rounding", "rounding of the shares above", "", "", left))
    return found


def factor_table(e: Explained, width: int = WIDE) -> Titled:
    """Each factor's share of every measure and, where there is room, the two cheap readings."""
    measures, main, found = _measures(e), headline(e), rows(e)
    t = Titled("Where the difference comes from" if main and main.total else "What was compared", gap=1)
    intervals = any(r.interval for r in found)
    shown = [i for i, m in enumerate(measures) if m.name != PROJECTION or not intervals or width >= WIDE]
    figures = [[BROKEN[measures[i].name], *(r.shares[i] for r in found)] for i in shown]
    figures += [["95%", *(r.interval for r in found)]] if intervals else []
    cheap = [["alone", *(r.alone for r in found)], ["re-\nmoved", *(r.removed for r in found)]]
    figures += cheap if _cheap(e, width) else []
    room = width - sum(2 + max(len(line) for cell in column for line in cell.split("\n")) for column in figures)
    t.column("factor", max_width=max(LONGEST, (room - 6) * 2 // 5))
    a, b = sides(e)
    for side, name in (("A", a), ("B", b)):
        head = f"{side}: {escape(name)}" if side != name and len(name) <= FITS else side
        t.column(head, max_width=min((room - 6 - LONGEST) // 2, (room - 6) * 3 // 10))
    for name, *_ in figures:
        t.column(name, justify="right", no_wrap=True)
    for r, *cells in zip(found, *(cells for _, *cells in figures), strict=True):
        bold = "bold" if r.kind in ("union", "total") else ""
        label = Padding(Text(r.name, style=bold, overflow="fold"), (0, 0, 0, 2 if r.inside else 0))
        style = "dim" if r.kind in ("same", "rounding") else ""
        t.row(label, escape(r.a), escape(_other(r)), *(Text(c, style=bold) for c in cells), style=style)
    return t


def interaction_table(e: Explained) -> Titled | None:
    """The pairs that together do most more or less than each does alone."""
    m = headline(e)
    if m is None or not m.total:
        return None
    pairs = [i for i in m.interactions if abs(i.value) >= SMALLEST * abs(m.total)]
    pairs = sorted(pairs, key=lambda i: -abs(i.value))[:PAIRS]
    if not pairs:
        return None
    t = Titled(f"Interactions, in shares of the total ({COLUMN[m.name]})", gap=2)
    t.column("factors")
    t.column("interaction", justify="right", no_wrap=True)
    t.column("the two")
    for i in pairs:
        t.row(escape(f"{brief(i.first)}, {brief(i.second)}"), percent(i.value / m.total, 2), reading(m, i))
    return t


def layer_tables(e: Explained, width: int) -> Iterator[Titled | Text]:
    """Each linear layer on A's inputs: its divergence and the factors' shares of it; by number where there are many."""
    names = [f.name for f in e.factors if not f.same]
    fit = max(1, (width - 44) // 9)
    for start in range(0, max(1, len(names)), fit):
        t = Titled("Layers, on A's inputs; the factors' shares of each" + (", continued" if start else ""), gap=1)
        t.column("layer", no_wrap=True)
        for column in ("M", "rel. L2", "differing"):
            t.column(column, justify="right", no_wrap=True)
        some = names[start : start + fit]
        for i, _ in enumerate(some, start + 1):
            t.column(f"({i})", justify="right", no_wrap=True)
        for x in e.layers:
            total = math.fsum(x.values.values())
            parts = [percent(x.values[name] / total) if x.values.get(name) and total else "0" for name in some]
            t.row(escape(short(x.layer)), str(x.M), number(x.relative_l2), positive_share(x.differing / x.elements), *parts)
        yield t
        yield Text("\n".join(f"  ({i}) {brief(name)}" for i, name in enumerate(some, start + 1)) + "\n")


def markdown(e: Explained) -> str:
    """The sentence and the table of factors, for a README."""
    a, b = sides(e)
    columns = [COLUMN[m.name] for m in _measures(e)]
    header = ["factor", f"A: {a}", f"B: {b}", *columns, "alone", "removed"]
    body = []
    for r in rows(e):
        name, *cells = (_plain(cell) for cell in (r.name, r.a, _other(r), *r.shares, r.alone, r.removed))
        body.append([f"**{name}**" if r.kind in ("union", "total") else name, *cells])
    return f"{_plain(sentence(e))}\n\n{table(header, body)}\n\n{' '.join(_below(e, cheap=True))}"


def _cheap(e: Explained, width: int) -> bool:
    """Whether there is room for the two cheap readings."""
    m = headline(e)
    return width >= WIDE + INTERVAL * (m is not None and any(p.low is not None for p in m.parts))


def _other(r: Row) -> str:
    """B's cell."""
    return "the same" if r.kind == "same" and r.a == r.b else r.b


def _measures(e: Explained) -> list[Measure]:
    return [m for m in (e.measure(name) for name in MEASURES) if m is not None]


def _row(f: Factor, measures: Sequence[Measure], main: Measure, *, inside: bool) -> Row:
    part = main.part(f.name) or Share(f.name, 0.0, 0.0)
    alone, removed = ("-" if v is None else _share(main, v) for v in (part.alone, part.removed))
    interval = ""
    if main.total and part.low is not None and part.high is not None:
        low, high = sorted(100 * v / main.total for v in (part.low, part.high))
        interval = f"[{low:.1f}, {high:.1f}]"
    return Row("factor", f.name, f.a, f.b, tuple(_share(m, _value(m, f)) for m in measures), alone, removed, interval, inside)


def _value(m: Measure, f: Factor) -> float:
    part = m.part(f.name)
    return part.value if part else 0.0


def _share(m: Measure, value: float) -> str:
    """Two digits, so that a column adds up; what is not exactly nothing is never ``0``."""
    if not value:
        return "0"
    return f"{100 * value / m.total:.2f}%" if m.total else "-"


def _left(cells: Sequence[str]) -> str:
    """What the printed shares lack to 100%."""
    left = Decimal(100) - sum((Decimal(c.rstrip("%")) for c in cells), Decimal(0))
    return f"{left:.2f}%" if left else "0"


def _below(e: Explained, *, cheap: bool) -> list[str]:
    """The totals in their units, and what rounding the parts to floats leaves; ``cheap``: the two cheap readings are shown."""
    totals = "; ".join(f"{small(m.total)} {UNIT[m.name]}" for m in _measures(e) if m.name in UNIT)
    residuals = ", ".join(f"{COLUMN[m.name]} {number(m.residual)}" for m in _measures(e))
    lines = [f"Total: {totals}."] if totals else []
    if residuals:
        lines.append(f"As fractions the parts add up exactly; rounded to floats they leave: {residuals}.")
    main = headline(e)
    if cheap and main is not None and main.total:
        of = f"in shares of the total ({COLUMN[main.name]})"
        lines.append(f"Alone: what a factor makes by itself; removed: what the total loses without it; {of}.")
    same = [brief(f.name) for f in e.factors if f.same and f.category != PACKING]
    if same:
        lines.append(f"Making no difference of their own, and so exactly 0: {', '.join(same)}.")
    if main is not None and any(p.low is not None for p in main.parts) and not main.samples:
        lines.append(f"95%: of the share of {COLUMN[main.name]}, over resampled {'prompts' if e.rows else 'calls'}.")
    if samples := max((m.samples for m in e.measures), default=0):
        lines.append(f"Orders of swaps were sampled: {samples} draws.")
    return lines


def _end(end: End) -> str:
    kernels = ", ".join(map(short_kernel, end.kernels))
    told = f"native {kernels}" if end.origin == "native" else f"{end.origin} of {kernels}"
    if end.differing_bits is None:
        return told
    return f"{told}; {end.differing_bits} bits differ from its hybrid's, in {end.compared:,} elements"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
