"""Tables and the figure of the layers' benchmark, from its file alone: nothing here needs a GPU.

    python -m bench.layer_summary FILE [FILE...] [--markdown FILE] [--plot FILE] [--full] [--json FILE]

Several files of one GPU are merged; ``--json`` writes what they hold together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench import layer_tables as figures
from bench.layer_figure import roofline
from bench.layer_kernels import MARLIN, OURS
from bench.layer_results import Cell, Result, is_block, merge
from bench.layer_tables import CONTENDERS, REFERENCES, Mean
from qlab.command import FIGURES, check_output, one_sentence
from qlab.report.markdown import table as markdown_table
from qlab.serial import write_whole

Rows = tuple[list[str], list[list[str]]]
PRICES = (
    ("cuda.batch_invariant", OURS, "the fastest of ours"),
    ("cuda.batch_invariant", ("vllm.awq_dequantize",), "vLLM's dequantise and matmul"),
    ("cuda.marlin", MARLIN, "vLLM's Marlin"),
)
"""Kernels whose recipe is given, and what each is held against."""
"""Heading and lines of a table."""


def ratios(r: Result) -> Rows:
    """Geometric means over layers per M: each contender against each reference."""
    m = figures.rows(r)
    lines = []
    for contender, ours in CONTENDERS.items():
        for reference, theirs in REFERENCES.items():
            means = [figures.ratio(figures.layers(r, x), ours, theirs) for x in m]
            if any(means):
                lines.append([f"{contender} / {reference}", *(_times(mean) for mean in means)])
    for name in r.kernels():
        means = [figures.ratio(figures.layers(r, x), (name,), REFERENCES["cuBLAS"]) for x in m]
        lines.append([f"`{name}` / cuBLAS", *(_times(mean) for mean in means)])
    lines.append(["layers in the mean", *(str(len(figures.layers(r, x))) for x in m)])
    return ["speed, geometric mean over layers", *(f"M = {x}" for x in m)], lines


def prices(r: Result) -> Rows:
    """What a recipe that is fixed costs: geometric means and the slowest layer, per M."""
    m, lines = figures.rows(r), []
    for ours, theirs, words in PRICES:
        means = [figures.ratio(figures.layers(r, x), (ours,), theirs) for x in m]
        if any(means):
            lines.append([f"`{ours}` / {words}", *(f"{x.value:.2f} (from {x.lowest:.2f})" if x else "-" for x in means)])
    return ["speed, geometric mean (and lowest) over layers", *(f"M = {x}" for x in m)], lines


def memory(r: Result) -> Rows:
    """Share of the memory limit on layers of 30 to 70 MB, every kernel."""
    m = [x for x in figures.rows(r) if x <= 64]
    lines = []
    for name in r.kernels():
        if name not in figures.LIBRARY:
            lines.append([f"`{name}`", *(_share(figures.memory_share(r, x, (name,))) for x in m)])
    return ["share of the copy ceiling, layers of 30 to 70 MB", *(f"M = {x}" for x in m)], lines


def targets(r: Result) -> Rows:
    lines = []
    for t in figures.targets(r):
        reached = "-" if t.reached is None else f"{t.reached:.2f}"
        said = "not measured" if t.reached is None else "reached" if t.met else "not reached"
        where = f"{t.rows[0]} to {t.rows[-1]}" if len(t.rows) > 1 else str(t.rows[0]) if t.rows else "-"
        lines.append([t.what, where, f"{t.aim:g}", reached, said, t.note])
    return ["target", "M", "aim", "measured", "", "of"], lines


def layer(r: Result, model: str, name: str) -> Rows:
    """Median microseconds of every kernel on one layer, or one block, by M; the fastest of each column marked."""
    cells = sorted((c for c in r.cells if (c.model, c.layer) == (model, name)), key=lambda c: c.M)
    names = [n for n in r.kernels() if any(c.median(n) for c in cells)]
    lines = [[f"`{n}`", *(_time(c, n) for c in cells)] for n in names]
    if not is_block(cells[0]):
        lines.append(["limit", *(f"{1e6 * figures.limit(r, c):.1f}" for c in cells)])
    shape = "" if is_block(cells[0]) else f", K = {cells[0].K}, N = {cells[0].N}"
    return [f"µs on {model} {name}{shape}", *(f"M = {c.M}" for c in cells)], lines


def blocks(r: Result) -> Rows:
    """A decoder block's four layers in one graph: the best of ours, the best of the others and cuBLAS."""
    lines = []
    for c in sorted((c for c in r.cells if is_block(c)), key=lambda c: (c.model, c.M)):
        found = [figures.fastest(c, g) for g in (CONTENDERS["best of ours"], *list(REFERENCES.values())[:1], figures.LIBRARY)]
        ours, best, library = found
        cells = ["-" if t is None else f"{1e6 * t:.1f}" for t in found]
        against = [f"{x / ours:.2f}" if ours and x else "-" for x in (best, library)]
        lines.append([c.model, str(c.M), *cells, *against])
    return ["block", "M", "ours, µs", "best of Marlin, Machete, ExLlama", "cuBLAS", "times", "times cuBLAS"], lines


def why(r: Result) -> Rows:
    lines = []
    for reason, names in figures.reasons(r).items():
        lines.append([", ".join(f"{name} ({count})" for name, count in names.items()), reason])
    return ["no speed (cells)", "why"], lines


def caption(r: Result) -> str:
    """One line: machine, versions, ceilings, kind of weights."""
    if not r.runs:
        return "nothing was measured"
    e, c = r.runs[-1].environment, r.runs[-1].ceilings
    where = f"{e.gpu}, driver {e.driver}" if e.gpu else e.cpu
    kind = f"{r.dtype}, groups of {r.group_size}, {'symmetric' if r.symmetric else 'asymmetric'}"
    top = f"copy {c.copy / 1e12:.2f} TB/s, read {c.read / 1e12:.2f} TB/s, matmul {c.matmul / 1e12:.0f} TFLOP/s"
    return f"{where}; torch {e.torch}, triton {e.triton}; {kind}; ceilings of the same run: {top}"


def sections(r: Result, full: bool) -> Iterator[tuple[str, Rows]]:
    """Every table with its title."""
    yield "Speed", ratios(r)
    yield "Share of the memory limit", memory(r)
    if any(is_block(c) for c in r.cells):
        yield "Decoder blocks", blocks(r)
    yield "Targets", targets(r)
    yield "The price of a given recipe", prices(r)
    if full:
        for model, name in figures.order(r):
            yield f"{model} {name}", layer(r, model, name)
    yield "No speed", why(r)


def show(r: Result, console: Console, full: bool = False) -> None:
    """The tables on a terminal."""
    console = console if console.is_terminal else Console(file=console.file, width=170)
    for title, (heading, lines) in sections(r, full):
        if not lines:
            continue
        t = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        words = title in ("No speed", "Targets")
        for i, h in enumerate(heading):
            t.add_column(h, justify="left" if words or not i else "right", no_wrap=not i and title != "No speed")
        for line in lines:
            t.add_row(*(cell.replace("`", "").replace("**", "") for cell in line))
        console.print(t)
    console.print(caption(r))
    for run in r.runs:
        for left in run.left_out:
            console.print(f"left out: {left}", markup=False)


def markdown(r: Result, full: bool = True) -> str:
    """The tables as Markdown."""
    parts = [caption(r) + "."]
    for title, (heading, lines) in sections(r, full):
        if lines:
            parts += [f"## {title}", markdown_table(heading, lines)]
    left = [x for run in r.runs for x in run.left_out]
    if left:
        parts += ["Left out: " + "; ".join(left) + "."]
    return "\n\n".join(parts) + "\n"


def _times(mean: Mean | None) -> str:
    return "-" if mean is None else f"{mean.value:.2f}" + (f" ({mean.layers})" if mean.missing else "")


def _share(mean: Mean | None) -> str:
    return "-" if mean is None else f"{mean.value:.0%}" + (f" ({mean.layers})" if mean.missing else "")


def _time(c: Cell, name: str) -> str:
    t, best = c.median(name), min((e.median for e in c.entries if e.median > 0), default=0.0)
    return "-" if t is None else f"**{1e6 * t:.1f}**" if t == best else f"{1e6 * t:.1f}"


@one_sentence("bench.layer_summary")
def main(
    files: Annotated[list[Path], typer.Argument(help="what bench.layers wrote, of one GPU")],
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="write the tables here")] = None,
    plot: Annotated[Path | None, typer.Option(help="write the roofline here (.png, .svg, .pdf)")] = None,
    json: Annotated[Path | None, typer.Option(help="write the files' cells together here")] = None,
    full: Annotated[bool, typer.Option("--full", help="also every layer's table")] = False,
) -> None:
    """Show a benchmark's tables; write them as Markdown, and its roofline."""
    check_output("--markdown", markdown_file)
    check_output("--plot", plot, FIGURES)
    check_output("--json", json)
    r = merge([Result.read(f) for f in files])
    if markdown_file:
        write_whole(markdown_file, markdown(r).encode())
    if plot:
        roofline(r, plot)
    if json:
        r.write(json)
    show(r, Console(), full)


if __name__ == "__main__":
    typer.run(main)
