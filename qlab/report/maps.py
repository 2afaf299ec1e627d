"""Maps of recipes for the terminal, as Markdown and as figures; the words are those of qlab/report/map_words.py."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from qlab.attribution.map_result import Map, Strip
from qlab.errors import QlabError
from qlab.report import map_figure
from qlab.report.map_colours import colour, ink
from qlab.report.map_words import fixed, gpu_rows, header, range_rows, sentence, span
from qlab.report.markdown import table
from qlab.report.terminal import Titled, letter, short_kernel
from qlab.serial import write_whole

FORMATS = ("png", "svg", "pdf")


def show(m: Map, console: Console) -> None:
    """Print the whole map, the answer of each kernel in one sentence first."""
    for strip in m.strips:
        console.print(Text(sentence(m, strip) + ".", style="bold"), soft_wrap=True)
    console.print(_head(m))
    names = [short_kernel(s.name) for s in m.strips]
    margin = max(map(len, names)) + 1
    base = "a row computed alone" if m.axis == "M" and m.base == 1 else f"the class of {m.axis} = {m.base}"
    console.print(Text(f"Row 0 along {m.axis} = {span(m.values[0], m.values[-1])}; A is {base}", style="bold"))
    for name, strip in zip(names, m.strips, strict=True):
        line = Text(name.ljust(margin)) + letters(strip, max(20, console.width - margin))
        console.print(line, no_wrap=True, crop=True)
    console.print()
    console.print(range_table(m))
    for strip in m.strips:
        if strip.gpus:
            console.print(gpu_table(m, strip))


def _head(m: Map) -> Panel:
    s, e = m.shape, m.environment
    notes = ["Nothing was run: read off the recipes. Rows of one class give equal bits on equal inputs, others may differ."]
    if m.axis == "M":
        notes.append("M counts the rows of one call as the kernel sees them, padding included.")
    if m.axis == "N":
        notes.append(f"Compared over the first {min(strip.columns for strip in m.strips)} columns, which every N has.")
    if m.axis == "K":
        notes.append("A form is the tree of a sum without the lengths of its chains.")
    shape = f"{fixed(m)}, group {s.group_size}, {s.dtype}{', act-order' if s.act_order else ''}{', bias' if s.bias else ''}"
    lines = [f"[bold]{m.gpu}[/], {m.sms} SMs; {shape}; qlab {e.qlab}", *map(escape, notes)]
    return Panel(Text.from_markup("\n".join(lines)), title="qlab.kernels --map", title_align="left", expand=False)


def letters(strip: Strip, width: int) -> Text:
    """The classes of row 0 as a line of letters on their colours. Where values share a place, the first of them is shown."""
    points = strip.points
    cells = min(width, len(points)) if 2 * len(points) > width else len(points) * (width // len(points))
    text = Text()
    for i in range(cells):
        function = points[i * len(points) // cells].function
        back = colour(strip, function)
        text.append(*("-", "dim") if function < 0 else (letter(function)[-1], f"{ink(back)} on {back}"))
    return text


def range_table(m: Map) -> Titled:
    """Every kernel's ranges."""
    t = Titled("Ranges of K with one form" if m.axis == "K" else f"Ranges of {m.axis} in which row 0 is one function", gap=1)
    names = header(m)
    for name in names[:3]:
        t.column(name, no_wrap=True, justify="left" if name == "kernel" else "right")
    for name in names[3:-1]:
        t.column(name, justify="right")
    t.column(names[-1], ratio=1)
    for strip in m.strips:
        for i, row in enumerate(range_rows(m, strip)):
            t.row("" if i else row[0], *map(escape, row[1:]))
    return t


def gpu_table(m: Map, strip: Strip) -> Titled:
    """Along sms: which GPUs of the table share a recipe, and which the order of summation alone."""
    t = Titled(f"{short_kernel(strip.name)}: GPUs of one recipe, and the class that their SMs alone would give", gap=2)
    t.column("GPUs")
    t.column("SMs", justify="right")
    t.column(f"class with\n{m.gpu}'s tensor core", justify="right", no_wrap=True)
    t.column("kernel, or why none", ratio=1)
    for row in gpu_rows(strip):
        t.row(*map(escape, row))
    return t


def markdown(m: Map) -> str:
    """The sentences and the tables, for a README."""
    parts = ["\n".join(f"* {sentence(m, strip)}." for strip in m.strips)]
    rows = [[f"`{name}`", *cells] for strip in m.strips for name, *cells in range_rows(m, strip)]
    parts.append(table([name.replace("\n", " ") for name in header(m)], rows))
    for strip in m.strips:
        if strip.gpus:
            names = ["GPUs of one recipe", "SMs", f"class with {m.gpu}'s tensor core", f"`{short_kernel(strip.name)}` runs"]
            parts.append(table(names, gpu_rows(strip)))
    return "\n\n".join(parts)


def plot(m: Map, path: Path) -> None:
    """Along M for one kernel: M across, rows up, a colour for each class. Else a strip of row 0 for each kernel.

    Raises QlabError for another suffix than .png, .svg or .pdf.
    """
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise QlabError(f"{path}: {suffix!r} is no image format here; name a .png, .svg or .pdf file")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    if m.axis == "M" and len(m.strips) == 1 and m.strips[0].functions:
        map_figure.rows(figure, m)
    else:
        map_figure.strips(figure, m)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, bbox_inches="tight", pad_inches=0.12)
    write_whole(path, buffer.getvalue())
