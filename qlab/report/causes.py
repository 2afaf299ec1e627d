"""Where hardware noise comes from, as tables and a figure."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from qlab.logprobs.causes import DISPATCH, KERNELS, REPLAY, Causes, Setting
from qlab.report import logprob_cells as cells
from qlab.report.logprob_figures import curves
from qlab.report.markdown import table
from qlab.report.terminal import Titled


def show(c: Causes, console: Console) -> None:
    """Print the whole result."""
    e = c.environment
    lines = [
        *map(escape, c.models),
        f"{c.methods[0]} or {c.methods[1]}: generated on {c.generator}, re-executed on {c.verifier}",
        f"{cells.prompts(c.prompts)}, {c.tokens} rows; {escape(e.gpu or e.cpu)}; torch {e.torch}; {c.seconds:.1f} s",
        "mean L2 over prompts, in brackets its 95% bootstrap interval over prompts",
    ]
    console.print(Panel(Text.from_markup("\n".join(lines)), title="qlab.logprobs causes", title_align="left", expand=False))
    console.print(differences(c), noise(c))


def name(c: Causes, series: str) -> str:
    """What differs between generator and verifier in a series."""
    return {
        KERNELS: f"linear layers alone, pinned: {c.generator}'s kernels or {c.verifier}'s",
        DISPATCH: "linear layers alone, as vLLM dispatches them on each",
        REPLAY: f"nothing: {c.verifier} replays {c.generator}'s kernels",
    }[series]


def differences(c: Causes) -> Titled:
    """Signal, noise and SNR of each series where attention is the same on both sides."""
    t = Titled("What differs between generator and verifier", gap=2)
    t.column("what differs", ratio=1)
    for column in ("Signal", "Noise", "SNR"):
        t.column(column, justify="right")
    for s in (c.series(series)[0] for series in (KERNELS, DISPATCH, REPLAY)):
        t.row(name(c, s.series), cells.figure_cell(s.signal), cells.figure_cell(s.noise), cells.snr_cell(s.snr))
    return t


def noise(c: Causes) -> Titled:
    """SNR against the share of attention's outputs that another attention kernel would flip."""
    t = Titled("SNR where attention differs too: share of its outputs moved by one unit in the last place", gap=2)
    t.column("share", justify="right")
    for column in (f"{c.verifier}'s kernels", "vLLM's dispatch", f"{c.generator}'s, replayed", "noise, replayed"):
        t.column(column, justify="right")
    rows = [c.series(series) for series in (KERNELS, DISPATCH, REPLAY)]
    for of_share in zip(*rows, strict=True):
        share = f"{of_share[0].share:g}"
        t.row(share, *(cells.snr_cell(s.snr) for s in of_share), cells.figure_cell(of_share[-1].noise))
    return t


def drawable(c: Causes) -> bool:
    """Whether a share left a finite SNR, so that there is a curve."""
    return any(s.share > 0 and 0 < s.snr.value < math.inf for s in c.settings)


def plot(c: Causes, path: Path) -> None:
    """The curves of SNR against the share, as .png, .svg or .pdf. Raises QlabError for another suffix."""
    labels = {KERNELS: f"{c.verifier}'s own kernels", DISPATCH: "vLLM's dispatch", REPLAY: f"{c.generator}'s kernels, replayed"}
    series = {labels[s]: [(p.share, p.snr) for p in c.series(s)] for s in (KERNELS, DISPATCH, REPLAY)}
    heading = f"{c.methods[0]} against {c.methods[1]}, generated on {c.generator}, re-executed on {c.verifier}"
    curves(series, path, x="share of attention's outputs moved by one unit in the last place", heading=heading)


def markdown(c: Causes) -> str:
    """The first table and the curve's figures, for a README."""
    first = [[name(c, s.series), *_three(s)] for s in (c.series(series)[0] for series in (KERNELS, DISPATCH, REPLAY))]
    rows = [c.series(series) for series in (KERNELS, DISPATCH, REPLAY)]
    second = [[f"{of[0].share:g}", *(_times(s) for s in of)] for of in zip(*rows, strict=True) if of[0].share]
    header = ["share", f"{c.verifier}'s kernels", "vLLM's dispatch", f"{c.generator}'s, replayed"]
    return f"{table(['what differs', 'Signal', 'Noise', 'SNR'], first)}\n\n{table(header, second)}"


def _three(s: Setting) -> list[str]:
    return [cells.figure(s.signal), cells.figure(s.noise), _times(s)]


def _times(s: Setting) -> str:
    f = s.snr
    return cells.times(f.value) if f.low == f.high else f"{cells.times(f.value)} [{cells.times(f.low)}, {cells.times(f.high)}]"
