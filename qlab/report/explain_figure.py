"""The way from A to B as a waterfall: a bar for each factor, its colour the category. Drawn without a display."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from qlab.attribution.result import LOGPROBS, OUTPUT, PACKING, Explained, Factor, Measure
from qlab.errors import QlabError
from qlab.report.explain_words import headline, percent, ranked
from qlab.report.logprob_figures import quiet, save

COLOURS = {
    "packing": "#000000",
    "group layout": "#f0e442",
    "weights": "#cc79a7",
    "dequantisation": "#e69f00",
    "order of summation": "#0072b2",
    "rounding of partial sums": "#d55e00",
    "tensor core": "#009e73",
    "output rule": "#56b4e9",
    "hardware": "#9a9a9a",
}
"""Okabe and Ito's, which colour-blind people tell apart, and grey."""
OTHER, TOTAL = "#d8d8d8", "#4a4a4a"
AXIS = {
    LOGPROBS: "squared L2 of the log-probabilities, nat²",
    OUTPUT: "squared relative L2 of the layers' outputs, sum over layers",
}
WIDTH = 34
"""Letters of a factor's label in one line."""


def waterfall(e: Explained, path: Path) -> None:
    """Bars from A (0) to B (the total), one panel for each of log-probabilities and outputs, as .png, .svg or .pdf.

    Raises QlabError for another suffix and where the two paths do not differ.
    """
    measures = [m for m in (e.measure(LOGPROBS), e.measure(OUTPUT)) if m is not None and m.total]
    main = headline(e)
    if main is None or not measures:
        raise QlabError(f"{path}: {e.a} and {e.b} do not differ, so there is nothing to draw")
    by_name = {f.name: f for f in e.factors}
    factors = [by_name[p.factor] for p in ranked(main)] + [
        f for f in e.factors if main.part(f.name) is None and (f.category == PACKING or not f.same)
    ]

    def draw(figure: Any) -> None:
        labels = [textwrap.fill(f.name, WIDTH) for f in factors] + ["B, the total"]
        lines = sum(1 + label.count("\n") for label in labels)
        figure.set_size_inches(3.0 + 3.9 * len(measures), 1.6 + 0.16 * lines + 0.2 * len(labels))
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for ax, m in zip(panels, measures, strict=True):
            _panel(ax, m, factors)
        panels[0].set_yticks(range(len(labels)), labels, fontsize=8.5)
        panels[0].invert_yaxis()
        _legend(figure, factors)
        sampled = "; lines: 95% intervals" if any(p.low is not None for m in measures for p in m.parts) else ""
        figure.suptitle(f"From A, {e.a}, to B, {e.b}{sampled}", fontsize=10.5, parse_math=False)

    save(draw, path)


def _panel(ax: Any, m: Measure, factors: list[Factor]) -> None:
    at, edges, bars = 0.0, [0.0, m.total], []
    for f in factors:
        part = m.part(f.name)
        value = part.value if part else 0.0
        bars.append((at, value))
        at += value
        edges += [at, *(at - value + x for x in ((part.low, part.high) if part else ()) if x is not None)]
    span = (max(edges) - min(edges)) or 1.0
    ax.axvline(0, color="#bbbbbb", linewidth=0.8, zorder=1)
    for i, (f, (start, value)) in enumerate(zip(factors, bars, strict=True)):
        colour = COLOURS.get(f.category, OTHER)
        ax.barh(i, value, left=start, height=0.62, color=colour, edgecolor="#333333", linewidth=0.5, zorder=3)
        part, end = m.part(f.name), start + value
        right = max(start, end)
        if part and part.low is not None and part.high is not None:
            ax.plot([start + part.low, start + part.high], [i, i], color="#333333", linewidth=1.2, zorder=4)
            right = max(right, start + part.high)
        ax.plot([end, end], [i - 0.31, i + 1.31], color="#888888", linewidth=0.7, zorder=2)
        _label(ax, i, right, percent(value / m.total), span, bold=False)
        if not value:
            ax.plot([start, start], [i - 0.31, i + 0.31], color="#333333", linewidth=1.4, zorder=3)
    last = len(factors)
    ax.barh(last, m.total, height=0.62, color=TOTAL, zorder=3)
    _label(ax, last, m.total, "100%", span, bold=True)
    ax.set_xlim(min(edges) - 0.03 * span, max(edges) + 0.2 * span)
    ax.set_xlabel(AXIS[m.name], fontsize=8.5)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    ax.locator_params(axis="x", nbins=5)
    ax.xaxis.get_offset_text().set_fontsize(8)
    quiet(ax)
    ax.tick_params(axis="y", length=0)


def _label(ax: Any, i: int, x: float, text: str, span: float, *, bold: bool) -> None:
    ax.text(x + 0.015 * span, i, text, va="center", ha="left", fontsize=8, fontweight="bold" if bold else "normal", zorder=5)


def _legend(figure: Any, factors: list[Factor]) -> None:
    from matplotlib.patches import Patch

    categories = list(dict.fromkeys(f.category for f in factors))
    patches = [Patch(facecolor=COLOURS.get(c, OTHER), edgecolor="#333333", linewidth=0.5, label=c) for c in categories]
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(4, len(patches)), fontsize=8, frameon=False, handlelength=1.2
    )
