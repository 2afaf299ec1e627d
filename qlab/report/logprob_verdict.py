"""The verdict on a trace for a terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from qlab.logprobs.detection import Verdict
from qlab.logprobs.detection import name as class_name
from qlab.report.logprob_cells import count, figure_cell, prompts, small
from qlab.report.logprobs import SPREAD_UNKNOWN
from qlab.report.terminal import Titled, share


def verdict(v: Verdict) -> RenderableType:
    """A trace's verdict: the sentence, then each class."""
    colour = {"consistent": "green", "named": "green"}.get(v.answer, "yellow")
    table = Titled("Candidates", gap=1)
    table.column("class", ratio=1)
    for column in ("L2 from the trace", "equal rows", "p", "AUC", "tokens"):
        table.column(column, justify="right", no_wrap=True)
    for c in sorted(v.candidates, key=lambda c: c.distance.value):
        kept = c.members in v.classes
        p = Text(small(c.p) if c.p < 1 else "1", style="bold" if kept else "dim")
        members = Text("\n".join(c.members), style="bold" if kept else "")
        auc, tokens = _told(v, c.members)
        table.row(members, figure_cell(c.distance), share(c.equal_rows), p, auc, tokens)
    options = [f"top-{v.top_k}"] * (v.top_k is not None) + [f"{v.decimals} decimals"] * (v.decimals is not None)
    lines = [
        f"[bold {colour}]{escape(v.sentence)}[/]",
        f"provided that one of the candidates generated it; {prompts(v.prompts)}",
    ]
    lines[-1] += f", smallest p {v.smallest_p:.2g}" + "".join(f"; {o}" for o in options)
    if not any(c.identical for c in v.candidates):
        lines.append(
            "no candidate has the trace's bits: the order of atomics, the batches or other parts of the model differ as well, "
            "or it was none of them"
        )
    if v.tellings:
        lines.append("AUC of one prompt and tokens for 99% power at 1% false positives: the nearest class against this one")
    panel = Panel(Text.from_markup("\n".join(lines)), title="verdict", title_align="left", expand=False)
    return Group(panel, table)


def _told(v: Verdict, members: tuple[str, ...]) -> tuple[str, str]:
    """AUC and tokens of the nearest class against this one; dashes for the nearest itself."""
    found = next((t for t in v.tellings if t.other == class_name(members)), None)
    if found is None:
        return "-", "-"
    limit = "<= " if found.one_prompt else ""
    tokens = SPREAD_UNKNOWN if math.isnan(found.tokens.value) else f"{limit}{count(found.tokens.value)}"
    return f"{found.auc.value:.3f}", tokens
