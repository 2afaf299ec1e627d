"""The log-probability experiment as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from qlab.logprobs.detection import name as class_name
from qlab.logprobs.statistics import Figure
from qlab.logprobs.tables import AcrossRow, ExperimentResult, Matrix, Spread, Tables
from qlab.logprobs.telling import Telling
from qlab.report.logprob_cells import count, figure, figure_cell, over, prompts, reason, share_cell, small, snr_cell, stacked
from qlab.report.terminal import Titled

SPREAD_UNKNOWN = "needs 2 prompts"


def show(result: ExperimentResult, console: Console) -> None:
    """Print the whole result."""
    console.print(header(result))
    show_tables(result.tables, console)
    if refused := refused_table(result):
        console.print(refused)


def show_tables(t: Tables, console: Console) -> None:
    """Print the experiment's tables in its order."""
    console.print(noise_floor_table(t))
    for m in t.within:
        console.print(matrix_table(m, console.width), matrix_notes(m))
    if t.full:
        console.print(full_notes(t))
    console.print(*across_tables(t))
    if t.batches:
        console.print(batch_table(t))
    if t.detection:
        console.print(detection_table(t.detection))
    if t.unlisted:
        console.print(Text(unlisted(t), style="dim"))


def header(r: ExperimentResult) -> RenderableType:
    e, p = r.environment, r.prompts
    where = f"{e.gpu}, driver {e.driver}" if e.gpu else e.cpu
    lines = [
        *map(escape, r.models),
        f"{prompts(p.count)} of {p.tokens} tokens{' together' * (p.count > 1)}, {p.new_tokens} generated each, "
        f"digest [bold]{p.digest[:16]}[/]; "
        f"top-{r.top_k}",
        f"engine [bold]{escape(r.engine)}[/] on {escape(where)}; torch {e.torch}; {r.seconds:.1f} s",
        "mean L2 over prompts, in brackets its 95% bootstrap interval over prompts",
    ]
    return Panel(Text.from_markup("\n".join(lines)), title="qlab.logprobs", title_align="left", expand=False)


def noise_floor_table(t: Tables) -> Titled:
    """Every path against itself."""
    table = Titled("Noise floor", gap=2)
    table.column("path", no_wrap=True)
    table.column("prefill", justify="right")
    table.column("decode", justify="right")
    for row in t.noise_floor:
        table.row(row.path, stacked(row.prefill), stacked(row.decode))
    return table


def title(m: Matrix) -> str:
    """``Within H100, prefill``."""
    where = f"Within {m.gpu.upper()}" if m.gpu else "All paths"
    return f"{where}, {m.mode}"


def names(m: Matrix) -> list[str]:
    """The matrix's paths, without the GPU where they share one."""
    return [key.replace(f"@{m.gpu}", "") if m.gpu else key for key in m.keys]


def matrix_table(m: Matrix, width: int = 100) -> Titled:
    """Rows generate, columns re-execute; numbered columns where names do not fit the width."""
    labels = names(m)
    columns = [[stacked(row[j]) for row in m.cells] for j in range(len(labels))]
    widest = [max(len(label), *map(cell_width, column)) for label, column in zip(labels, columns, strict=True)]
    fit = max(map(len, labels)) + 4 + sum(w + 2 for w in widest) <= width
    who = "each path continues on its own" if m.mode == "decode, free" else "rows generate, columns re-execute"
    table = Titled(f"{title(m)} ({who})", gap=2 if fit else 1)
    table.column("", no_wrap=True)
    for i, label in enumerate(labels):
        table.column(label if fit else str(i + 1), justify="right", no_wrap=fit)
    for i, (label, *row) in enumerate(zip(labels, *columns, strict=True)):
        table.row(label if fit else f"{i + 1:>2} {label}", *row)
    return table


def cell_width(t: Text) -> int:
    """Of its longest line."""
    return max(map(len, t.plain.splitlines()), default=0)


def matrix_notes(m: Matrix) -> Text:
    """Off-diagonal mean and range, and the classes."""
    lines = [f"  {spread(m.off_diagonal)}"] if m.off_diagonal else []
    own = dict(zip(m.keys, names(m), strict=True))
    together = [c for c in m.classes if len(c) > 1]
    if together:
        lines.append(f"  equal in all bits: {', '.join(class_name([own[key] for key in c]) for c in together)}")
    elif len(m.classes) > 1:
        lines.append("  no two are equal in all bits")
    return Text("\n".join([*lines, ""]))


def full_notes(t: Tables) -> Text:
    """Of the matrices of all paths, which the figures show: those that re-execute every generator with the same bits."""
    lines = ["All paths, over every generator"]
    for m in (m for m in t.full if m.mode != "decode, free"):  # recordings share the order of their atomics
        together = [class_name(c) for c in m.classes if len(c) > 1]
        lines.append(
            f"  {m.mode}: " + (f"equal in all bits: {', '.join(together)}" if together else "no two are equal in all bits")
        )
    found = Text("\n".join([*lines, ""]))
    found.stylize("bold", 0, len(lines[0]))
    return found


def spread(s: Spread) -> str:
    """In one line."""
    return f"off the diagonal: mean {figure(s.mean)}, range {small(s.low)} to {small(s.high)}"


def across_tables(t: Tables) -> list[Titled]:
    """The pairwise table across hardware, one per two GPUs."""
    return [
        _across(gpus, [row for row in t.across if row.gpus == gpus]) for gpus in dict.fromkeys(row.gpus for row in t.across)
    ]


def _across(gpus: Sequence[str], rows: Sequence[AcrossRow]) -> Titled:
    table = Titled(f"Across {' and '.join(g.upper() for g in gpus)}: signal within a GPU, noise between GPUs", gap=2)
    table.column("pair")
    for column in ("Signal", "Noise", "SNR"):
        table.column(column, justify="right", no_wrap=column != "Signal")
    for row in rows:
        pair = f"{row.methods[0]} vs {row.methods[1]}"
        if row.signal and row.noise and row.snr:
            table.row(pair, figure_cell(row.signal), figure_cell(row.noise), snr_cell(row.snr))
        else:
            table.row(pair, reason(row.reason), "-", "-")
    return table


def batch_table(t: Tables) -> Titled:
    """The same tokens in other batches."""
    table = Titled("Same tokens in another batch", gap=1)
    table.column("path")
    table.column("schedule", no_wrap=True)
    for column in ("L2", "rows that\ndiffer", "argmax\nflips", "largest"):
        table.column(column, justify="right")
    last = ""
    for row in t.batches:
        first = row.path if row.path != last else ""
        last = row.path
        shares = [share_cell(f) if f else Text("-") for f in (row.differing, row.flips)]
        table.row(first, row.schedule, stacked(row.distance), *shares, small(row.largest) if row.largest is not None else "-")
    return table


def detection_table(tellings: Sequence[Telling]) -> Titled:
    """Who can tell a claimed path from another, and with how many tokens."""
    table = Titled("Detection: per-prompt scores of a claimed path against another's", gap=2)
    table.column("claimed,\nin truth")
    table.column("verifier")
    table.column("AUC", justify="right", no_wrap=True)
    table.column("tokens for 99% power\nat 1% false positives", justify="right")
    for d in tellings:
        tokens = Text("cannot be told", style="dim") if _blind(d) else tokens_cell(d)
        table.row(f"{d.claimed}\n{d.other}", d.verifier, over(f"{d.auc.value:.3f}", auc_interval(d.auc)), tokens)
    return table


def auc_interval(f: Figure) -> str:
    return "one prompt" if math.isnan(f.low) else f"[{f.low:.2f}, {f.high:.2f}]"


def tokens_cell(d: Telling) -> Text:
    """Tokens needed, the interval below; behind it, where there is one, the number by resampling."""
    if math.isnan(d.tokens.value):
        return Text(SPREAD_UNKNOWN, style="dim")
    if d.one_prompt:
        return over(f"at most {count(d.tokens.value)}", "one prompt")
    below = "one prompt" if math.isnan(d.tokens.low) else f"[{count(d.tokens.low)}, {count(d.tokens.high)}]"
    if d.resampled:
        below += f"\nresampled {count(d.resampled.value)} [{count(d.resampled.low)}, {count(d.resampled.high)}]"
    return over(count(d.tokens.value), below)


def refused_table(r: ExperimentResult) -> Titled | None:
    """Paths that could not be computed, with their reasons."""
    refused = [d for d in r.dispatched if d.reason]
    if not refused:
        return None
    table = Titled("Did not run", gap=2)
    table.column("path", no_wrap=True)
    table.column("why", ratio=1)
    for d in refused:
        table.row(d.path, escape(d.reason))
    return table


def unlisted(t: Tables) -> str:
    """What the tables say about entries that were not listed."""
    return (
        f"{t.unlisted} log-probabilities were not listed by the re-executor; the smallest one it lists for the row stands in."
    )


def _blind(d: Telling) -> bool:
    return d.auc.value == d.auc.low == d.auc.high == 0.5
