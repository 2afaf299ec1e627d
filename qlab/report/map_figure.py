"""The two figures of a map: rows against M for one kernel, a strip of row 0 for each of several."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import Any

import numpy as np

from qlab.attribution.map_result import Map, Point, Strip
from qlab.report.map_colours import HATCHES, NOTHING, colour, ink
from qlab.report.map_words import fixed, legend, sentence
from qlab.report.terminal import letter, short_kernel

MANY = 24
"""Up to so many values each one has its tick, and so many classes a line in the legend."""
LEAST = 0.014
"""Of the axis' length: a letter stands in ranges that are as wide at least."""


def rows(figure: Any, m: Map) -> None:
    """Rows of every call of one kernel: column M of the picture is a call of M rows."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    (strip,) = m.strips
    figure.set_size_inches(8.6, 5.0)
    axes = figure.subplots()
    height = max(sum(count for count, _ in p.rows) for p in strip.points)
    picture = np.full((height, len(strip.points)), -1)
    for i, p in enumerate(strip.points):
        if p.rows:
            picture[: sum(count for count, _ in p.rows), i] = np.repeat([f for _, f in p.rows], [count for count, _ in p.rows])
    colours = [NOTHING, *(colour(strip, f) for f in range(len(strip.functions)))]
    norm = BoundaryNorm(np.arange(-1.5, len(strip.functions)), len(colours))
    shown = np.ma.masked_equal(picture, -1)
    axes.imshow(shown, ListedColormap(colours), norm, aspect="auto", origin="lower", interpolation="nearest")
    _letters(axes, strip, height)
    _ticks(axes, m)
    axes.set_ylabel("row of the call", fontsize=10)
    axes.set_title("\n".join(textwrap.wrap(sentence(m, strip), 92)), fontsize=10, loc="left", parse_math=False)
    _plain(axes)
    _legend(axes, m, strip)


def _letters(axes: Any, strip: Strip, height: int) -> None:
    """The class in the middle of each block of rows that lasts over a range of M, and in the last block, which grows with M."""

    def write(group: list[tuple[int, Point]], blocks: slice, x: float, y: float, least: float) -> None:
        wide, bottom = len(group), 0
        for i, (count, function) in enumerate(group[-1][1].rows):
            if i in range(len(group[-1][1].rows))[blocks] and wide >= 0.04 * len(strip.points) and count >= least * height:
                at = (group[0][0] + x * wide - 0.5, bottom + y * count - 0.5)
                axes.text(*at, letter(function), ha="center", va="center", fontsize=8, color=ink(colour(strip, function)))
            bottom += count

    places = list(enumerate(strip.points))
    for _, group in groupby(places, key=lambda place: place[1].rows[:-1]):
        write(list(group), slice(None, -1), 0.5, 0.5, 0.035)
    for _, group in groupby(places, key=lambda place: [row[1] for row in place[1].rows]):
        write(list(group), slice(-1, None), 0.7, 0.3, 0.1)


def strips(figure: Any, m: Map) -> None:
    """Row 0 of every kernel, a strip each."""
    count = len(m.strips)
    figure.set_size_inches(9.0, 1.2 + 0.52 * count)
    axes = figure.subplots()
    for y, strip in enumerate(m.strips):
        start = 0
        for r in strip.ranges:
            wide = sum(r.first <= v <= r.last for v in m.values)
            back, state = colour(strip, r.function), strip.functions[r.function].state if r.function >= 0 else "none"
            axes.barh(y, wide, left=start, height=0.74, color=back, hatch=HATCHES[state], edgecolor="#ffffff", linewidth=0.6)
            told = {"fixed": letter(r.function), "none": "does not run"}.get(state, state)
            if wide >= (LEAST if state == "fixed" else 0.012 * len(told)) * len(m.values):
                box = None if state == "fixed" else {"facecolor": "#ffffff", "edgecolor": "none", "pad": 1.5}
                tone = ink(back) if state == "fixed" else "#444444"
                axes.text(start + wide / 2, y, told, ha="center", va="center", fontsize=8, color=tone, bbox=box)
            start += wide
    axes.set_yticks(range(count), [_name(s) for s in m.strips], fontsize=9)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xlim(0, len(m.values))
    _ticks(axes, m, shift=0.5)
    base = "alone" if m.axis == "M" and m.base == 1 else f"at {m.axis} = {m.base}"
    what = "form" if m.axis == "K" else "function"
    heading = f"Row 0 on {m.gpu}, {fixed(m)}: one letter of a kernel, one {what}; A (blue) is what it is {base}"
    axes.set_title(heading, fontsize=10, loc="left")
    _plain(axes)


def _name(strip: Strip) -> str:
    """The kernel, and below a label what it runs."""
    runs = [short_kernel(k) for k in dict.fromkeys(p.kernel for p in strip.points) if k not in ("", strip.name)]
    return "\n".join([short_kernel(strip.name), *([", ".join(runs)] if runs else [])])


def _ticks(axes: Any, m: Map, shift: float = 0.0) -> None:
    """Places are those in the list of values: not every list is evenly spaced."""
    values = m.values
    if len(values) <= MANY:
        at = list(range(len(values)))
    else:
        step = next(s for s in (5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024, 1 << 20) if len(values) / s <= 10)
        at = [0, *(i for i, v in enumerate(values) if v % step == 0)]
    axes.set_xticks([i + shift for i in at], [str(values[i]) for i in at], fontsize=8)
    axes.set_xlabel({"M": "M, rows of the call", "sms": "SMs"}.get(m.axis, m.axis), fontsize=10)


def _legend(axes: Any, m: Map, strip: Strip) -> None:
    from matplotlib.patches import Patch

    lines = legend(m, strip)[:MANY]
    states = [strip.functions[f].state for f, _ in lines]
    patches = [
        Patch(facecolor=colour(strip, f), hatch=HATCHES[state], edgecolor="#ffffff", label=text)
        for (f, text), state in zip(lines, states, strict=True)
    ]
    axes.legend(handles=patches, title="row 0", fontsize=8, title_fontsize=9, loc="upper left", frameon=False, alignment="left")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#999999")
    axes.tick_params(labelsize=8, color="#999999")
