"""The planted-fault suite as tables: how each kind of fault was named, and what was taken for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from qlab.attribution.planted import EQUIVALENT, MISSED, NOTHING, RIGHT, WRONG, KindRow, Planted, part
from qlab.report.markdown import table
from qlab.report.terminal import Titled

WORDS = {0: "nothing that acts", 1: "one fault", 2: "two faults"}


def show(p: Planted, console: Console) -> None:
    """Print the whole result."""
    console.print(header(p))
    console.print(summary(p))
    for faults in (1, 2):
        if p.of(faults):
            console.print(kinds(p, faults))
    for faults in (1, 2):
        if p.of(faults):
            console.print(matrix(p, faults))
    if off := failures(p):
        console.print(off)


def header(p: Planted) -> Panel:
    """What was run, on what."""
    e = p.environment
    lines = [
        escape(p.command),
        f"{len(p.cases)} kernels, seed {p.seed}; {escape(e.gpu or e.cpu)}; torch {e.torch}; {p.seconds:.0f} s",
    ]
    return Panel(Text.from_markup("\n".join(lines)), title="planted faults", title_align="left", expand=False)


def summary(p: Planted) -> Titled:
    """Cases, answers, precision and recall by number of faults."""
    t = Titled("Kernels by what acts in them", gap=2)
    for column in SUMMARY:
        t.column(column, justify="left" if column == SUMMARY[0] else "right")
    for row in summary_rows(p):
        t.row(*row)
    return t


SUMMARY = ("", "kernels", "right", "missed", "wrong", "named alone", "precision", "recall")


def summary_rows(p: Planted) -> list[list[str]]:
    """The rows of :func:`summary`. Right, where nothing acts, is the answer ``equivalent here``."""
    rows = []
    for faults in (1, 2, 0):
        cases = p.of(faults)
        counts = Counter(c.result for c in cases)
        alone = sum(c.result == RIGHT and not c.equals for c in cases)
        shares = [_share(p.precision(faults)), _share(p.recall(faults)), str(alone)] if faults else ["", "", ""]
        numbers = [len(cases), counts[RIGHT] + counts[EQUIVALENT], counts[MISSED], counts[WRONG]]
        rows.append([WORDS[faults], *map(str, numbers), shares[2], *shares[:2]])
    return rows


KINDS = ("fault", "cases", "right", "missed", "wrong", "precision", "recall")


def kinds(p: Planted, faults: int) -> Titled:
    """Every kind among the cases with so many faults."""
    t = Titled(f"Kernels with {WORDS[faults]}, by kind", gap=2)
    for column in KINDS:
        t.column(column, justify="left" if column == KINDS[0] else "right")
    for r in p.kinds:
        if r.faults == faults:
            t.row(escape(r.kind), *_cells(r))
    return t


def _cells(r: KindRow) -> list[str]:
    return [*map(str, (r.cases, r.right, r.missed, r.wrong)), _share(r.precision), _share(r.recall)]


def matrix(p: Planted, faults: int) -> Titled:
    """Planted against named, by part: a number in the diagonal was named as what it is."""
    counts: Counter[tuple[str, str]] = Counter()
    for c in p.confusion:
        if c.faults == faults:
            counts[part(c.planted), part(c.named)] += c.cases
    parts = sorted({name for pair in counts for name in pair} - {NOTHING})
    columns = [*parts, NOTHING] if any(NOTHING in pair for pair in counts) else parts
    t = Titled(f"Kernels with {WORDS[faults]}: planted (rows) and named (columns)", gap=1)
    t.column("")
    for i in range(len(columns)):
        t.column(str(i + 1), justify="right")
    for i, row in enumerate(columns):
        t.row(f"{i + 1} {escape(row)}", *(str(counts[row, column] or "") for column in columns))
    return t


def failures(p: Planted) -> Titled | None:
    """Every case that was missed or named wrongly; None without one."""
    off = [c for c in p.cases if c.result in (MISSED, WRONG)]
    if not off:
        return None
    t = Titled("Missed or wrong", gap=2)
    for column in ("kernel", "planted", "named"):
        t.column(column)
    for c in off:
        t.row(escape(f"{c.name}, seed {c.seed}"), escape(_text(c.truth)), escape(_text(c.named) or c.verdict))
    return t


def _text(faults: Sequence[object]) -> str:
    return " + ".join(map(str, faults))


def _share(value: float) -> str:
    return f"{value:.2%}" if value not in (0.0, 1.0) else f"{value:.0%}"


def markdown(p: Planted) -> str:
    """The summary, and every kind with its single and its double cases, for documentation."""
    by_kind: dict[str, dict[int, KindRow]] = {}
    for r in p.kinds:
        by_kind.setdefault(r.kind, {})[r.faults] = r
    rows = [[kind, *(cell for faults in (1, 2) for cell in _two(found.get(faults)))] for kind, found in sorted(by_kind.items())]
    second = ["fault", "alone", "named", "with another", "both named"]
    return f"{table(list(SUMMARY), summary_rows(p))}\n\n{table(second, rows)}"


def _two(r: KindRow | None) -> list[str]:
    return ["", ""] if r is None else [str(r.cases), str(r.right)]
