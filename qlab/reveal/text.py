"""What was revealed, for a terminal."""

from __future__ import annotations

import textwrap

from qlab.recipe import WEIGHTS
from qlab.report.recipe import tree_text
from qlab.reveal.result import Comparison, Revealed

WIDTH = 116
RECTANGLES = 4


def revealed_text(r: Revealed) -> str:
    """The whole result in some 20 to 30 lines."""
    shape = f"M={r.M} K={r.K} N={r.N}, {r.dtype}{f', groups of {r.group_size}' if r.weights else ''}"
    lines = [*_wrapped("", f"{r.kernel}, {shape}: element ({r.row}, {r.column}), revealed from {r.source}"), ""]
    lines += ["  " + line for line in tree_text(r.node).split("\n")]
    lines += ["", f"  tree {r.tree_hash[:16]}{'' if r.ordered else ', unordered: the same input gives different bits'}"]
    if r.weights:
        lines.append(f"  {_said(r)}")
    lines.append("")
    for e in r.evidence:
        lines += _wrapped(f"  {e.question:<40} ", f"{e.answer} [{e.calls}]")
    lines += _wrapped("  Assumed: ", "; ".join(r.assumed)) if r.assumed else []
    lines += _alike(r)
    lines += ["", f"  {r.calls} calls, {r.seconds:.1f} s", *_compared(r.comparison)]
    return "\n".join(lines)


def _said(r: Revealed) -> str:
    kind = WEIGHTS[r.weights]
    return f"w = {kind}; y = RN(sum){', then RN(y*s)' if r.scale_after_sum else ''}"


def _compared(c: Comparison | None) -> list[str]:
    if c is None:
        return ["  no recipe to compare with"]
    if c.equal:
        same = "node by node" if c.identical else f"tree {c.tree_hash[:16]}, once what no probe can see is settled"
        out = [f"  equals the kernel's recipe {c.recipe[:16]} for {c.gpu}: {same}"]
    else:
        out = [f"  DIFFERS from the kernel's recipe {c.recipe[:16]} for {c.gpu}"]
        if c.difference is not None:
            out += _wrapped(f"    {c.difference.path}: ", c.difference.what)
            out += _wrapped("      revealed: ", c.difference.found) + _wrapped("      recipe:   ", c.difference.expected)
        if c.rules:
            out += _wrapped("    rules: ", c.rules)
    return [*out, *([f"  {c.region}"] if c.region else [])]


def _alike(r: Revealed) -> list[str]:
    if not r.alike:
        return []
    shown = [f"rows {a}:{b} columns {c}:{d}" for a, b, c, d in r.alike[:RECTANGLES]]
    more = f", and {len(r.alike) - RECTANGLES} more rectangles" if len(r.alike) > RECTANGLES else ""
    return _wrapped("  Answered every probe alike: ", ", ".join(shown) + more)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(head + text, WIDTH, subsequent_indent=" " * min(len(head), 43), break_on_hyphens=False) or [head]
