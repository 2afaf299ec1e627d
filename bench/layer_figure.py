"""The roofline of the layers' benchmark: operations per second over operations per byte, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from bench.layer_kernels import MACHETE, MARLIN, OURS, TRITON
from bench.layer_results import Result, is_block
from bench.layer_tables import LIBRARY, fastest
from qlab.errors import QlabError
from qlab.serial import write_whole

SERIES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "cuBLAS fp16": (LIBRARY, "#7f7f7f", "x"),
    "Marlin": (MARLIN, "#1f77b4", "s"),
    "Machete, fastest schedule": (MACHETE, "#2ca02c", "^"),
    "best of ours": (OURS, "#d62728", "o"),
    "our Triton": (TRITON, "#ff7f0e", "D"),
}
"""What is drawn: globs over kernels (the fastest of each cell), colour, marker."""


def roofline(r: Result, path: Path) -> None:
    """Every layer and M as a point for each series, below the measured roofs. Raises QlabError without any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [c for c in r.cells if not is_block(c)]
    if not cells or not r.runs:
        raise QlabError("the file has no cell of a single layer, so there is nothing to plot")
    figure = Figure(figsize=(11.0, 8.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=False, height_ratios=(3, 2))
    ceilings = r.runs[-1].ceilings
    points: dict[str, list[tuple[float, float]]] = {}
    for name, (globs, _, _) in SERIES.items():
        for c in cells:
            t, own = fastest(c, globs), [e for e in c.entries if e.median == fastest(c, globs)]
            if t and own:
                flops = 2.0 * c.M * c.K * c.N
                points.setdefault(name, []).append((flops / own[0].bytes, flops / t))
    intensities = [x for series in points.values() for x, _ in series]
    if not intensities:
        raise QlabError("no kernel of the figure has a speed, so there is nothing to plot")
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    knee = ceilings.matmul / ceilings.copy
    roof = sorted({low, knee, high} if low < knee < high else {low, high})
    upper.plot(
        roof, [min(x * ceilings.copy, ceilings.matmul) for x in roof], color="black", linewidth=1.2, label="measured roofs"
    )
    for name, series in points.items():
        _, colour, marker = SERIES[name]
        upper.scatter(*zip(*series, strict=True), s=17, color=colour, marker=marker, alpha=0.75, label=name, linewidths=0.9)
    upper.set(xscale="log", yscale="log", xlim=(low, high))
    upper.set_xlabel("operations per byte that must be moved (weight as stored, x and y)")
    upper.set_ylabel("operations per second")
    upper.grid(True, which="major", alpha=0.3)
    upper.legend(fontsize=8, loc="lower right")
    _shares(lower, r)
    e = r.runs[-1].environment
    kind = f"{r.dtype}, groups of {r.group_size}, {'symmetric' if r.symmetric else 'asymmetric'}"
    figure.suptitle(
        f"{e.gpu or e.cpu}: {kind}; copy {ceilings.copy / 1e12:.2f} TB/s, "
        f"matmul {ceilings.matmul / 1e12:.0f} TFLOP/s in the same run",
        fontsize=11,
        parse_math=False,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".").lower())
    write_whole(path, buffer.getvalue())


def _shares(axes, r: Result) -> None:  # type: ignore[no-untyped-def]
    """Below it, the share of each cell's own roof by M: geometric mean over layers, and the spread of the layers."""
    from bench.layer_tables import layers, limit, rows

    m: Sequence[int] = rows(r)
    for name, (globs, colour, marker) in SERIES.items():
        at, middle, lowest, highest = [], [], [], []
        for i, x in enumerate(m):
            shares = [limit(r, c) / t for c in layers(r, x) if (t := fastest(c, globs))]
            if shares:
                at.append(i)
                middle.append(sorted(shares)[len(shares) // 2])
                lowest.append(min(shares))
                highest.append(max(shares))
        if at:
            axes.plot(at, middle, color=colour, marker=marker, markersize=4, linewidth=1.3, label=name)
            axes.fill_between(at, lowest, highest, color=colour, alpha=0.08, linewidth=0)
    axes.set_xticks(range(len(m)), [str(x) for x in m])
    axes.set_ylim(0, None)
    axes.set_xlabel("M")
    axes.set_ylabel("share of the INT4 roofline")
    axes.set_title("Median over layers; the band reaches from the lowest layer to the highest", fontsize=9)
    axes.grid(True, alpha=0.3)
