"""The row protocol's results as tables for a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from qlab.logprobs.row_counts import Counted, Rule
from qlab.logprobs.row_predictions import Predictions
from qlab.logprobs.row_rates import ALL, Rate
from qlab.logprobs.row_record import Commitment
from qlab.logprobs.row_sampling import Cost
from qlab.logprobs.rows import Mismatch, Replayed
from qlab.report.logprob_cells import small
from qlab.report.terminal import Titled

ERROR = "1e-6"


def show_replayed(r: Replayed, console: Console) -> None:
    """The verdict by replay."""
    kept = f", of {r.digests} the output's digest alone" if r.digests else ""
    table = Titled(f"By replay: {r.rows} recorded rows{kept}", gap=2)
    table.column("candidate", no_wrap=True)
    table.column("verdict", no_wrap=True)
    for name in ("rows\ntested", "equal\nbits", "within\nreach"):
        table.column(name, justify="right", no_wrap=True)
    table.column("first mismatch, or why rows were not tested", ratio=1)
    for t in r.candidates:
        style = {"survives": "bold green", "excluded": "dim"}.get(t.verdict, "yellow")
        told = "; ".join(p for p in (_mismatch(t.mismatch) if t.mismatch else "", t.reason) if p)
        numbers = (str(t.rows), str(t.equal), str(t.possible) if t.possible else "-")
        table.row(t.path, Text(t.verdict, style=style), *numbers, escape(told))
    console.print(table)
    console.print(Text(r.sentence, style="bold"), soft_wrap=True)
    together = [c for c in r.classes if len(c) > 1]
    if together:
        console.print(f"one function on these rows: {'; '.join('{' + ', '.join(c) + '}' for c in together)}", soft_wrap=True)
    console.print(
        f"Error rate of the exclusions: {r.error:g}, provided the assumptions. With the sample drawn after a commitment, fewer "
        f"than {100 * r.altered:.0f}% of all rows were computed otherwise, or these passed by a chance of {ERROR}.",
        soft_wrap=True,
    )
    _assumptions(r.assumptions, console)


def show_counted(c: Counted, rule: Rule, console: Console) -> None:
    """The verdict by the verifier's own kernels."""
    how = "native kernels" if c.origin == "native" else f"replay stands in for {c.verifier}'s kernels"
    table = Titled(f"By kernels of {c.verifier} ({how}): {c.rows} recorded rows", gap=1)
    table.column("verifier's\nmethod", no_wrap=True)
    for name in ("elements\nthat differ", "share", "rows\nnearest"):
        table.column(name, justify="right", no_wrap=True)
    table.column("predicted share\nby generator", no_wrap=True)
    for k in c.counts:
        predicted = "\n".join(f"{_percent(v):>7} {name}" for name, v in k.predicted.items())
        table.row(k.method, f"{k.differing:,} of {k.elements:,}", _percent(k.share), str(k.votes), predicted)
    console.print(table)
    console.print(Text(c.sentence, style="bold"), soft_wrap=True)
    console.print(
        f"{_rows(rule.rows_needed)} rows are needed for {ERROR}; by the fitted beta-binomial laws "
        f"{_rows(rule.rows_needed_sharp)}, and {c.rows} rows err with {small(c.error_sharp)}.",
        soft_wrap=True,
    )
    _assumptions(c.assumptions, console)


def show_predictions(p: Predictions, console: Console, *, every: bool = False) -> None:
    """Rates over all linears, or of every kind of linear as well, and the rules."""
    console.print(Text(f"{p.source}; {p.dtype}; {p.seconds:.1f} s"), soft_wrap=True)
    console.print(rate_table(p, every=every))
    if p.rules:
        console.print(rule_table(p.rules))
    for name, reason in p.refused.items():
        console.print(f"not compared: {escape(name)}: {escape(reason)}", soft_wrap=True, highlight=False)


def rate_table(p: Predictions, *, every: bool = False) -> Titled:
    """A row per pair; ``every`` adds each kind of linear."""
    table = Titled(f"Elements that differ, and rows that exclude the candidate with an error of {ERROR}", gap=1)
    table.column("generator, candidate; linear" if every else "generator, candidate", no_wrap=True)
    table.column("M", justify="right", no_wrap=True)
    for name in ("elements that\ndiffer, 95%", "rows that\npass", "rows\nneeded", "by the\nbound"):
        table.column(name, justify="right")
    last = ("", "")
    for r in p.rates:
        pair = (r.generator, r.candidate)
        figures = (str(r.M), _share(r), _passes(r), _rows(r.needed), _rows(r.needed_bound))
        if not every:
            if r.linear == ALL:
                table.row(f"{r.generator}, {r.candidate}", *figures)
            continue
        if pair != last:
            table.row(f"{r.generator}, {r.candidate}", *[""] * len(figures))
            last = pair
        table.row(f"  {r.linear}" + (f" ({r.K}, {r.N})" if r.linear != ALL else ""), *figures)
    return table


def rule_table(rules: tuple[Rule, ...]) -> Titled:
    """What each verifier's kernels tell, generated on any of the GPUs."""
    what = f"{' or '.join(rules[0].methods)} on {' or '.join(rules[0].gpus)}"
    table = Titled(f"{what}: told by a verifier's own kernels, by the majority of rows at an error of {ERROR}", gap=2)
    table.column("verifier", no_wrap=True)
    for name in ("M", "rows wrong", "P(wrong)\nat most", "by fitted\nlaws", "rows\nneeded", "by fitted\nlaws"):
        table.column(name, justify="right", no_wrap=True)
    for r in rules:
        wrong, rows = sum(t.wrong for t in r.told), sum(t.rows for t in r.told)
        figures = (small(r.bound), small(r.sharp), _rows(r.rows_needed), _rows(r.rows_needed_sharp))
        table.row(r.verifier, str(r.M), f"{wrong} of {rows:,}", *figures)
    return table


def show_commitment(c: Commitment, cost: Cost, console: Console) -> None:
    """Root and price."""
    console.print(f"root {c.root}", highlight=False, soft_wrap=True)
    console.print(f"{c.leaves:,} rows: {len(c.linears)} linears, {sum(c.fed):,} tokens of {len(c.fed)} sequences")
    show_cost(cost, console)


def show_cost(c: Cost, console: Console) -> None:
    """Bytes per token that opened rows take."""
    console.print(
        f"{c.rows} rows of {c.tokens:,} tokens cost {c.total:.0f} bytes per token: x {c.x:.0f}, y {c.y:.0f}, "
        f"place {c.place:.0f}, proofs {c.proof:.0f}",
        soft_wrap=True,
    )


def _mismatch(m: Mismatch) -> str:
    where = f"{m.linear.removeprefix('model.')} of {m.sequence}:{m.position}"
    if m.element < 0:
        return f"{where}: digest {m.recorded[:12]}, replayed {m.replayed[:12]}"
    return f"{where}, element {m.element}: {m.recorded}, replayed {m.replayed}"


def _assumptions(lines: tuple[str, ...], console: Console) -> None:
    console.print(Text("Provided that " + "; ".join(lines) + ".", style="dim"), soft_wrap=True)


def _share(r: Rate) -> str:
    return "one function" if r.same else f"{100 * r.share:.3g} ± {100 * max(r.high - r.share, r.share - r.low):.2g}%"


def _passes(r: Rate) -> str:
    return "all" if r.same else f"{r.passed} of {r.tried}"


def _rows(v: float) -> str:
    return "never" if math.isinf(v) else f"{v:,.0f}"


def _percent(v: float) -> str:
    return "0" if v == 0 else f"{100 * v:.3g}%"
