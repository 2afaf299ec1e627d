"""Two paths layer by layer: one sentence, tables and a heat map on the terminal. The figure is in ``layer_figure``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from qlab.layers.result import EMBEDDING, HEAD, LayersResult, SwapRow
from qlab.report.terminal import Titled, number, share, short, short_kernel

LEVELS = "▁▂▃▄▅▆▇█"
"""Rising with the logarithm of a divergence, so that the map is read without colours too."""
COLOURS = ("#3b528b", "#31688e", "#21908d", "#35b779", "#6ccd5a", "#b4de2c", "#fde725", "#fff3a0")
NONE = "·"
BAR = 12
NAMED = 3
"""Swaps that the opening sentence names."""


def show(r: LayersResult, console: Console) -> None:
    """Print the whole result."""
    console.print(Text(sentence(r), style="bold"))
    if r.total:
        console.print(Text(caution(r)))
    console.print(header(r), divergence_table(r), share_table(r), heat_map(r, console.width))


def sentence(r: LayersResult) -> str:
    """Where the divergence enters, in one sentence."""
    a, b = r.paths
    if not r.total:
        return f"{a} and {b} give equal log-probabilities at {listed(r)} of all {len(r.tokens)} rows."
    ordered = [s for s in sorted(r.swaps, key=lambda s: -s.share) if s.share > 0][:NAMED]
    named = [f"{percent(s.share / r.total)} at {place(s)}" for s in ordered]
    named[0] = named[0].replace(" at ", " of the log-probability divergence enters at ", 1)
    left = len(r.swaps) - len(ordered)
    rest = 1 - sum(s.share for s in ordered) / r.total
    if not left:
        return ", ".join(named) + "."
    others = "the other one" if left == 1 else f"the other {left}"
    many = "s" * (left == 1)
    return f"{', '.join(named)}; {others} " + (
        f"add{many} {percent(rest)}." if rest >= 0 else f"take{many} {percent(-rest)} back."
    )


def caution(r: LayersResult) -> str:
    """How far the other two readings are from the nested ones, and why."""
    alone = "" if r.singles is None else f"Swapped one at a time they add up to {percent(r.singles)} of the total; "
    text = (
        f"{alone}the linear response explains {percent(r.response)} of the difference and lies {percent(r.response_gap)} off "
        "the nested projections"
    )
    text = text[0].upper() + text[1:]
    if r.response_gap < 0.5:
        return f"{text}: the divergence is large against the roundings, so that the network is nearly linear in it."
    return (
        f"{text}: one flipped bit re-rolls every later rounding, so that a small divergence soon grows to its usual size "
        "wherever it enters, and what enters later only moves it up and down."
    )


def place(s: SwapRow) -> str:
    """``layer 0's qkv_proj``."""
    if s.name in (EMBEDDING, HEAD):
        return f"the {s.name}"
    layer, _, leaf = short(s.name).partition(".")
    return f"layer {layer}'s {leaf}" if leaf else f"layer {layer}"


def header(r: LayersResult) -> RenderableType:
    e = r.environment
    where = f"{e.gpu}, driver {e.driver}" if e.gpu else e.cpu
    lines = [
        *(f"{'AB'[i]} [bold]{r.paths[i]}[/]: {kernels(r, i)}; {escape(r.checkpoints[i].partition(':')[0])}" for i in (0, 1)),
        *([f"two checkpoints; AWQ input scales {r.scales}"] if r.scales else []),
        f"{len(r.tokens)} tokens in one step, {r.dtype}; squared L2 of log-probabilities at {listed(r)} of each row "
        f"[bold]{number(r.total)}[/], residual [bold]{r.residual:g}[/]",
        f"{escape(where)}; torch {e.torch}; {r.seconds:.1f} s",
    ]
    return Panel(Text.from_markup("\n".join(lines)), title="qlab.layers", title_align="left", expand=False)


def listed(r: LayersResult) -> str:
    """The ids whose log-probabilities are compared."""
    return f"A's {r.top_k} most probable ids" if r.top_k else "all ids"


def kernels(r: LayersResult, side: int) -> str:
    """Kernels of a path, each with what ran it."""
    return ", ".join(dict.fromkeys(f"{short_kernel(x.kernels[side])} ({x.origins[side]})" for x in r.linears))


def divergence_table(r: LayersResult) -> Titled:
    """Local, inherited and total divergence of every linear, and that of the residual stream behind each decoder layer."""
    t = Titled("Divergence relative to A's, L2 over all tokens", gap=1)
    t.column("linear", no_wrap=True)
    for name in ("local:\nB's kernel,\nA's input", "outputs\ndiffer", "inherited:\nA's kernel,\nB's input", "total"):
        t.column(name, justify="right")
    t.column("residual\nstream", justify="right")
    t.column("growth", justify="right")
    behind = {s.name: s for s in r.stream}
    if first := r.stream[0].divergence:
        t.row(EMBEDDING, "", "", "", "", number(first), "")
    for i, x in enumerate(r.linears):
        layer = x.name.rsplit(".", 2)[0]
        last = i + 1 == len(r.linears) or not r.linears[i + 1].name.startswith(f"{layer}.")
        s = behind[layer]
        stream = (number(s.divergence), "" if math.isnan(s.growth) else f"{s.growth:.2f}x") if last else ("", "")
        t.row(short(x.name), number(x.local), share(x.differing), number(x.inherited), number(x.total), *stream)
    return t


def share_table(r: LayersResult) -> Titled:
    """Nested shares with a bar, single swaps, and the projection on B's difference beside its linear response."""
    t = Titled("Share of the final log-probability divergence", gap=1)
    t.column("from B", no_wrap=True)
    t.column("share\n(nested)", justify="right")
    t.column("", no_wrap=True)
    if r.singles is not None:
        t.column("swapped\nalone", justify="right")
    t.column("of the\nprojection", justify="right")
    t.column("linear\nresponse", justify="right")
    most = max((abs(s.share) for s in r.swaps), default=0.0)
    for s in r.swaps:
        alone = [] if s.single is None else [of(s.single, r.total)]
        bar = Text(bar_of(s.share, most), style="red" if s.share < 0 else "cyan")
        t.row(short(s.name), of(s.share, r.total), bar, *alone, percent(s.projection), percent(s.response))
    sums = [] if r.singles is None else [percent(r.singles)]
    whole = math.fsum(s.projection for s in r.swaps)
    t.row("sum", "0" if not r.total else "100%", "", *sums, percent(whole), percent(r.response), style="bold")
    gaps = [] if r.singles_gap is None else [percent(r.singles_gap)]
    t.row("gap to nested", "", "", *gaps, "", percent(r.response_gap), style="dim")
    return t


def bar_of(value: float, most: float) -> str:
    """``━━━``; a negative one begins with a minus."""
    length = round(BAR * abs(value) / most) if most else 0
    return ("-" if value < 0 else " ") + "━" * length


def heat_map(r: LayersResult, width: int) -> Text:
    """Total divergence, a row per linear and a column per token; tokens share a column where there are too many."""
    names = [short(x.name) for x in r.linears]
    label = max(map(len, names), default=0) + 1
    per = max(1, math.ceil(len(r.tokens) / max(1, width - label)))
    rows = [binned(x.total_by_token, per) for x in r.linears]
    ends = scale(v for row in rows for v in row)
    out = Text()
    out.append("Total divergence by token" + (f", the largest of each {per}" if per > 1 else ""), style="bold")
    out.append("\n" + " " * label + ruler(len(r.tokens), per), style="dim")
    for name, row in zip(names, rows, strict=True):
        out.append(f"\n{name:<{label}}")
        for v in row:
            i = level(v, ends)
            out.append(NONE if i is None else LEVELS[i], style="dim" if i is None else COLOURS[i])
    out.append("\n" + legend(ends), style="dim")
    return out


def binned(values: Sequence[float], per: int) -> list[float]:
    """The largest of every ``per`` values."""
    return [max(values[i : i + per]) for i in range(0, len(values), per)]


def scale(values: Iterable[float]) -> tuple[float, float]:
    """Smallest and largest positive value, at least a decade apart."""
    positive = [v for v in values if 0 < v < math.inf]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
    return low, max(high, 10 * low)


def level(v: float, ends: tuple[float, float]) -> int | None:
    """Index of :data:`LEVELS`, None for no divergence."""
    if not v > 0:
        return None
    low, high = ends
    part = 1.0 if v == math.inf else math.log(v / low) / math.log(high / low)
    return min(len(LEVELS) - 1, max(0, int(part * len(LEVELS))))


def legend(ends: tuple[float, float]) -> str:
    """What the levels between two values stand for."""
    low, high = ends
    step = (high / low) ** (1 / len(LEVELS))
    return f"{NONE} none, {LEVELS} from {number(low)} to {number(high)}, each step {step:.2f} times the last"


def ruler(tokens: int, per: int) -> str:
    """Numbers of tokens above their columns, every tenth column."""
    columns = math.ceil(tokens / per)
    return "".join(f"{i * per:<10}" for i in range(0, columns, 10))[:columns].rstrip()


def of(value: float, total: float) -> str:
    """A share of the total; of nothing it is ``0``."""
    return percent(value / total) if total else "0"


def percent(v: float) -> str:
    """``12.8%``, ``-4.1%``, ``385%``; one digit of what is tiny."""
    if v == 0:
        return "0"
    if abs(v) < 5e-4:
        return f"{100 * v:.1g}%".replace("e-0", "e-")
    return f"{100 * v:.1f}%" if abs(v) < 0.9995 else f"{100 * v:.0f}%"
