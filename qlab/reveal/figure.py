"""A revealed tree as an image: chains as stretches of k, one row each, and the additions that join them beside it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlab.errors import QlabError
from qlab.recipe import Chain, Join, Node, Round, Type, Unordered, unfold
from qlab.report.recipe import spined, walk_text
from qlab.reveal.result import Revealed
from qlab.serial import write_whole

LANES = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#3ca951", "#ff8ab7", "#9c6b4e")
TYPES: dict[Type, str] = {"fp32": "#33475b", "fp16": "#d9480f", "bf16": "#2b8a3e"}
LABELLED = 24
"""Rows and additions up to which each is labelled."""
GRID, GROUP, TEXT = "#e3e6e9", "#f1f3f6", "#22303c"


@dataclass
class _Drawing:
    """What the tree's nodes leave behind: rows of chains, lines, marks."""

    rows: list[Chain] = field(default_factory=list)
    lanes: list[int] = field(default_factory=list)
    lines: list[tuple[list[float], list[float], Type]] = field(default_factory=list)
    dots: list[tuple[float, float, Type]] = field(default_factory=list)
    rounds: list[tuple[float, float, Type]] = field(default_factory=list)
    bars: list[tuple[float, float, float, Type]] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)
    """Rows that an addition of chains alone takes in."""


def draw(r: Revealed, path: Path) -> None:
    """Write the tree of a result as .png, .svg or .pdf. Raises QlabError for another suffix, or a tree without chains."""
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in ("png", "svg", "pdf"):
        raise QlabError(f"{path}: {suffix!r} is no image format here; name a .png, .svg or .pdf file")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    d = _Drawing()
    x, y = _place(spined(r.node), d, 0)
    if not d.rows:
        raise QlabError("the tree has no chains to draw")
    count = len(d.rows)
    figure = Figure(figsize=(13, min(max(0.3 * count, 1.6), 9.5) + 2.0), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2 if x > 4 else 1.2))
    _stretches(left, d, r.K)
    _tree(right, d, x, y, r)
    left.set_ylim(count - 0.4, -0.6)
    figure.legend(handles=_legend(d), loc="outside upper right", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(_title(r), fontsize=13, color=TEXT, x=0.01, ha="left", parse_math=False)
    figure.text(0.01, -0.01, _caption(r), fontsize=8.5, color="#5c6b78", va="top", parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, bbox_inches="tight", pad_inches=0.2, facecolor="white")
    write_whole(path, buffer.getvalue())


def _place(node: Node, d: _Drawing, lane: int) -> tuple[float, float]:
    """Lays a node out from the left to the right; where its value leaves it."""
    if isinstance(node, Chain):
        d.rows.append(node)
        d.lanes.append(lane)
        return 0.0, len(d.rows) - 1.0
    if isinstance(node, Round):
        x, y = _place(node.node, d, lane)
        d.lines.append(([x, x + 0.75], [y, y], "fp32"))
        d.rounds.append((x + 0.75, y, node.type))
        return x + 0.75, y
    if isinstance(node, Join):
        return _joined(node, d)
    if isinstance(node, Unordered):
        ends = [_place(p, d, i) for i, p in enumerate(node.parts)]
        x = max(x for x, _ in ends) + 1
        for a, b in ends:
            d.lines.append(([a, x], [b, b], node.type))
        d.bars.append((x, ends[0][1], ends[-1][1], node.type))
        return x, (ends[0][1] + ends[-1][1]) / 2
    return 0.0, float(len(d.rows))


def _joined(node: Join, d: _Drawing) -> tuple[float, float]:
    """One addition after the other, each a step further to the right."""
    lanes = _lanes(node)
    start, alone = len(d.rows), next((i for i, p in enumerate(node.parts) if not _chain(p)), len(node.parts))
    if alone > 1:
        d.groups.append((start, start + alone))
    x, y = _place(node.parts[0], d, lanes[0])
    for part, lane in zip(node.parts[1:], lanes[1:], strict=True):
        a, b = _place(part, d, lane)
        to = max(x, a) + 1
        d.lines += [([x, to], [y, y], node.type), ([a, to], [b, b], node.type), ([to, to], [y, b], node.type)]
        x, y = to, (y + b) / 2 if abs(b - y) < 8 else b - 2
        d.dots.append((x, y, node.type))
    return x, y


def _lanes(node: Join) -> list[int]:
    """A colour for each part that is a chain: its place by k among the chains next to it."""
    out, i = [0] * len(node.parts), 0
    while i < len(node.parts):
        j = i
        while j < len(node.parts) and _chain(node.parts[j]):
            j += 1
        group = sorted(range(i, j), key=lambda q: min(unfold(_chain(node.parts[q]).walk), default=0))  # type: ignore[union-attr]
        for lane, q in enumerate(group):
            out[q] = lane
        i = max(j, i + 1)
    return out


def _chain(node: Node) -> Chain | None:
    while isinstance(node, Round):
        node = node.node
    return node if isinstance(node, Chain) else None


def _stretches(axes: Any, d: _Drawing, k: int) -> None:
    height = 0.72 if len(d.rows) <= 64 else 1.0
    for row, (node, lane) in enumerate(zip(d.rows, d.lanes, strict=True)):
        axes.broken_barh(list(_bars(node)), (row - height / 2, height), color=LANES[lane % len(LANES)], linewidth=0)
        if len(d.rows) <= LABELLED:
            axes.axhline(row, color=GRID, linewidth=0.8, zorder=0.5)
    for start, stop in (g for g in d.groups if g != (0, len(d.rows))):
        bars = [bar for node in d.rows[start:stop] for bar in _bars(node)]
        first, last = min(a for a, _ in bars), max(a + n for a, n in bars)
        axes.broken_barh([(first, last - first)], (start - 0.5, stop - start), color=GROUP, linewidth=0, zorder=0.1)
    axes.set_xlim(0, k)
    step = next(s for s in (2**i for i in range(20)) if k / s <= 8)
    axes.set_xticks([*range(0, k, step), k] if k % step < step / 2 and k % step else range(0, k + 1, step))
    if len(d.rows) <= LABELLED:
        axes.set_yticks(range(len(d.rows)), [walk_text(n.walk).removeprefix("k ") for n in d.rows], fontsize=8.5)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(d.rows)} chains, in the order in which they are added", fontsize=9.5, color=TEXT)
    axes.set_xlabel("k", fontsize=10, color=TEXT)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    _plain(axes)


def _bars(node: Chain) -> Iterator[tuple[int, int]]:
    """(start, length) of the stretches of k that a chain walks over."""
    order = sorted(unfold(node.walk).tolist())
    start = last = order[0]
    for k in [*order[1:], None]:
        if k is None or k != last + 1:
            yield start, last + 1 - start
            start = k
        last = k


def _tree(axes: Any, d: _Drawing, x: float, y: float, r: Revealed) -> None:
    small = len(d.dots) > LABELLED
    for xs, ys, type in d.lines:
        axes.plot(xs, ys, color=TYPES[type], linewidth=0.8 if small else 1.6, solid_capstyle="round", zorder=2)
    for a, b, type in d.dots:
        axes.plot([a], [b], "o", color=TYPES[type], markersize=2.2 if small else 5, zorder=3)
        if not small:
            axes.annotate(f"+ {type}", (a, b), (5, 3), textcoords="offset points", fontsize=8, color=TYPES[type])
    for a, b, type in d.rounds:
        axes.plot([a], [b], "D", color=TYPES[type], markersize=3 if small else 5.5, zorder=4)
    for a, top, bottom, type in d.bars:
        axes.plot([a, a], [top - 0.3, bottom + 0.3], color=TYPES[type], linewidth=5, solid_capstyle="round", zorder=3)
    end = x + max(0.14 * x, 1.1)
    axes.annotate("", (end, y), (x, y), arrowprops={"arrowstyle": "-|>", "color": TEXT, "linewidth": 1.4})
    scaled = ", RN(y*s)" if r.scale_after_sum else ""
    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"y: RN {r.dtype}{scaled}", (end, y), fontsize=9.5, color=TEXT, **place)
    axes.set_xlim(-0.02 * x - 0.1, end * 1.22 + 0.6)
    axes.set_xticks([])
    _plain(axes)
    axes.tick_params(left=False)


def _legend(d: _Drawing) -> list[Any]:
    from matplotlib.lines import Line2D

    added = sorted({t for _, _, t in d.dots})
    out = [Line2D([], [], color=TYPES[t], marker="o", linewidth=1.6, markersize=5, label=f"added in {t}") for t in added]
    rounds = sorted({t for _, _, t in d.rounds})
    out += [Line2D([], [], color=TYPES[t], marker="D", linewidth=0, markersize=5.5, label=f"rounded to {t}") for t in rounds]
    bars = sorted({t for *_, t in d.bars})
    return out + [Line2D([], [], color=TYPES[t], linewidth=5, label=f"atomics in {t}, in any order") for t in bars]


def _plain(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=TEXT, labelsize=8.5, length=0)


def _title(r: Revealed) -> str:
    return f"{r.kernel} on {r.gpu}: x [{r.M}, {r.K}] by w [{r.K}, {r.N}], element ({r.row}, {r.column})"


def _caption(r: Revealed) -> str:
    step = "" if r.core is None else f"each chain takes {r.core.terms} k a step, F = {r.core.fraction_bits}; "
    groups = f", groups of {r.group_size}" if r.weights else ""
    return f"{step}{r.dtype}{groups}; revealed from {r.source}, {r.calls} calls; tree {r.tree_hash[:16]}"
