"""Figures of the log-probability experiment: matrices, ROC curves, SNR against a share. Drawn without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qlab.command import one_sentence
from qlab.errors import QlabError
from qlab.logprobs.statistics import Figure
from qlab.logprobs.tables import ExperimentResult, Matrix
from qlab.logprobs.telling import Telling
from qlab.report.logprob_cells import interval, small
from qlab.report.logprobs import auc_interval, names, title
from qlab.serial import write_whole

FORMATS = ("png", "svg", "pdf")
NO_FIGURE, ZERO, INFINITE = "#f2f2f2", "#ffffff", "#4a4a4a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind people tell apart."""
MARKS = ("o", "s", "^", "D", "v", "P", "X")
Curves = Mapping[str, Sequence[tuple[float, Figure]]]


def within(r: ExperimentResult, path: Path) -> None:
    """Matrices within each GPU, GPUs side by side, one row per mode. Raises QlabError for another suffix."""
    modes = list(dict.fromkeys(m.mode for m in r.tables.within))
    gpus = list(dict.fromkeys(m.gpu for m in r.tables.within))
    found = {(m.mode, m.gpu): m for m in r.tables.within}
    _grid([[found.get((mode, gpu)) for gpu in gpus] for mode in modes], path)


def full(r: ExperimentResult, path: Path) -> None:
    """Every path against every path, one matrix per mode side by side. Raises QlabError as :func:`within`."""
    _grid([[m] for m in r.tables.full if m.mode != "decode, free"], path)


def roc(tellings: Sequence[Telling], path: Path) -> None:
    """ROC curves, one axis per verifier. Raises QlabError as :func:`within`."""
    if not tellings:
        raise QlabError(f"{path}: no two paths were told apart, so there is no ROC curve to draw")
    groups: dict[str, list[Telling]] = {}
    for t in tellings:
        groups.setdefault(t.verifier, []).append(t)

    def draw(figure: Any) -> None:
        columns = min(3, len(groups))
        rows = math.ceil(len(groups) / columns)
        figure.set_size_inches(4.1 * columns, 4.0 * rows + 0.3 * max(map(len, groups.values())))
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in axes[len(groups) :]:
            ax.set_visible(False)
        for ax, (verifier, group) in zip(axes, groups.items(), strict=False):
            ax.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            for i, t in enumerate(group):
                # Curves may coincide: a thinner one on top leaves the one below visible.
                ax.plot(
                    t.roc.false,
                    t.roc.true,
                    color=COLOURS[i % len(COLOURS)],
                    linewidth=2 + 1.6 * (len(group) - 1 - i),
                    solid_capstyle="round",
                    label=f"{t.claimed} or {t.other}: {t.auc.value:.3f} {auc_interval(t.auc)}",
                )
            ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            ax.set_xlabel("false positives", fontsize=9)
            ax.set_ylabel("true positives", fontsize=9)
            ax.set_title(f"verified by {verifier}", fontsize=10)
            ax.legend(
                title="claimed or in truth: AUC [95%]",
                title_fontsize=7.5,
                fontsize=7.5,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.16),
                frameon=False,
                handlelength=1.4,
            )
            quiet(ax)

    save(draw, path)


def curves(series: Curves, path: Path, *, x: str, y: str = "SNR", heading: str = "", line: float | None = 1.0) -> None:
    """Figures with their intervals against a share or another number, on logarithmic axes; ``line`` is drawn across (SNR 1).

    An x of 0 stands at the left edge behind a break; infinite figures at the upper edge, as arrows. Raises QlabError for
    another suffix and where nothing is finite.
    """
    points = [(v, f) for s in series.values() for v, f in s]
    xs = sorted({v for v, _ in points if v > 0})
    ys = [f.value for _, f in points if 0 < f.value < math.inf]
    if not xs or not ys:
        raise QlabError(f"{path}: no point of the curves is finite and positive, so there is nothing to draw")
    zero = xs[0] / 4
    top = max(max(ys), *(f.high for _, f in points if f.high < math.inf), line or 0.0) * 1.6

    from matplotlib.ticker import FuncFormatter, NullFormatter

    def draw(figure: Any) -> None:
        figure.set_size_inches(7.2, 4.4)
        ax = figure.subplots()
        if line is not None:
            ax.axhline(line, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for i, (name, s) in enumerate(series.items()):
            at = [v if v > 0 else zero for v, _ in s]
            value = [min(f.value, top) for _, f in s]
            colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
            low = [f.low if math.isfinite(f.low) and f.low > 0 else v for (_, f), v in zip(s, value, strict=True)]
            high = [min(f.high, top) if not math.isnan(f.high) else v for (_, f), v in zip(s, value, strict=True)]
            ax.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            ax.plot(at, value, color=colour, marker=mark, markersize=5, linewidth=1.8, label=name, zorder=3)
            beyond = [v for v, (_, f) in zip(at, s, strict=True) if math.isinf(f.value)]
            for v in beyond:
                ax.plot([v], [top], marker="^", markersize=9, color=colour, clip_on=False, zorder=4)
                beside = ax.annotate("inf", (v, top), (7, -3), textcoords="offset points", fontsize=8, color=colour)
                beside.set_in_layout(False)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylim(top=top * 1.25)
        plain = FuncFormatter(lambda v, _: f"{v:g}")
        ax.yaxis.set_major_formatter(plain)
        ax.yaxis.set_minor_formatter(plain if top < 10 * ax.get_ylim()[0] else NullFormatter())
        if any(v == 0 for v, _ in points):
            ticks = [v for v in xs if abs(math.log10(v) - round(math.log10(v))) < 1e-9] or xs
            ax.set_xticks([zero, *ticks], ["0", *(f"{v:g}".replace("e-0", "e-") for v in ticks)])
            ax.set_xticks([], minor=True)
            ax.axvline(zero * 2, color="#bbbbbb", linewidth=0.8, linestyle=":")
        ax.set_xlabel(x, fontsize=10)
        ax.set_ylabel(y, fontsize=10)
        ax.set_title(heading, fontsize=11)
        ax.legend(fontsize=9, frameon=False)
        ax.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        quiet(ax)

    save(draw, path)


def _grid(rows: Sequence[Sequence[Matrix | None]], path: Path) -> None:
    present = [m for row in rows for m in row if m is not None and m.keys]
    if not present:
        raise QlabError(f"{path}: no matrix of this kind was made, so there is nothing to draw")
    from matplotlib.colors import LogNorm

    values = [e.figure.value for m in present for row in m.cells for e in row if e.figure]
    positive = [v for v in values if 0 < v < math.inf] or [1.0]
    norm = LogNorm(min(positive), max(max(positive), 10 * min(positive)))  # one scale, so that matrices compare
    n = max(len(m.keys) for m in present)
    side = max(3.2, 0.72 * n)

    def draw(figure: Any) -> None:
        label = 0.085 * max(len(k) for m in present for k in names(m))
        figure.set_size_inches((side + label) * len(rows[0]) + 1.0, (side * 0.8 + label * 0.55 + 0.5) * len(rows))
        axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        image = None
        for ax_row, row in zip(axes, rows, strict=True):
            for j, (ax, m) in enumerate(zip(ax_row, row, strict=True)):
                if m is None:
                    ax.set_visible(False)
                    continue
                image = _draw(ax, m, norm)
                if j == 0:
                    ax.set_ylabel("generator", fontsize=9)
                if row is rows[-1]:
                    ax.set_xlabel("re-executor", fontsize=9)
        bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02, aspect=28)
        bar.set_label("L2 distance of log-probabilities, mean over prompts", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)

    save(draw, path)


def _draw(ax: Any, m: Matrix, norm: Any) -> Any:
    import matplotlib
    import numpy as np
    from matplotlib.patches import Rectangle

    colours = matplotlib.colormaps["cividis"]
    n = len(m.keys)
    values = np.full((n, n), np.nan)
    for i, row in enumerate(m.cells):
        for j, e in enumerate(row):
            v = math.nan if e.figure is None else e.figure.value
            text, fill = small(v), NO_FIGURE if math.isnan(v) else ZERO if v == 0 else INFINITE
            if 0 < v < math.inf:
                values[i, j] = v
                fill = colours(norm(v))
            else:
                ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=fill, linewidth=0))
            ink = "white" if v > 0 and _dark(fill) else "#222222"
            below = ""
            if e.figure is None:
                text, ink = "opaque" if e.reason.startswith("opaque: ") else "not run", "#777777"
            elif v == math.inf:
                below = f"{e.figure.infinite}/{e.figure.prompts} split"
            elif v > 0 and not math.isnan(e.figure.low):
                below = interval(e.figure) if n <= 5 else ""
            ax.text(j, i - (0.12 if below else 0), text, ha="center", va="center", fontsize=7.5, color=ink)
            if below:
                ax.text(j, i + 0.2, below, ha="center", va="center", fontsize=6, color=ink, alpha=0.85)
    image = ax.imshow(values, norm=norm, cmap=colours, aspect="auto")
    ax.set_xticks(range(n), names(m), rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(range(n), names(m), fontsize=8)
    ax.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set(color="#cccccc", linewidth=0.8)
    ax.set_title(title(m), fontsize=10)
    return image


def _dark(colour: Any) -> bool:
    """Whether white ink has the better contrast (WCAG's relative luminance)."""
    from matplotlib.colors import to_rgb

    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.213


def quiet(ax: Any) -> None:
    """Two spines, in grey."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color="#999999")
    ax.tick_params(labelsize=8, color="#999999")


def save(draw: Callable[[Any], None], path: Path) -> None:
    """Have ``draw`` fill a figure, and write it whole. Raises QlabError for a suffix that is none of ``FORMATS``."""
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise QlabError(f"{path}: {suffix!r} is no image format here; name a .png, .svg or .pdf file")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, bbox_inches="tight", pad_inches=0.12)
    write_whole(path, buffer.getvalue())


@one_sentence("qlab.report.logprob_figures")
def main(
    result: Annotated[Path, typer.Argument(help="JSON that python -m qlab.logprobs experiment --json wrote")],
    folder: Annotated[Path, typer.Argument(help="folder for within, full and roc")],
    suffix: Annotated[str, typer.Option(help="png, svg or pdf")] = "png",
) -> None:
    """Draw a result's figures anew."""
    r = ExperimentResult.read(result)
    within(r, folder / f"within.{suffix}")
    if r.tables.full:
        full(r, folder / f"full.{suffix}")
    if r.tables.detection:
        roc(r.tables.detection, folder / f"roc.{suffix}")


if __name__ == "__main__":
    typer.run(main)
