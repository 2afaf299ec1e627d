"""The heat map of ``python -m qlab.layers``, layer by token, with each layer's share beside it. Drawn without a display."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from qlab.command import one_sentence
from qlab.errors import QlabError
from qlab.layers.result import EMBEDDING, HEAD, LayersResult
from qlab.report.layers import of, scale, sentence
from qlab.report.terminal import number, short
from qlab.serial import write_whole

FORMATS = ("png", "svg", "pdf")
LABELLED = 64
"""So many tokens are written out below the map, and so many linears beside it; of more, every decoder layer is."""
NO_FIGURE, MORE, LESS = "#f2f2f2", "#0072b2", "#d55e00"


def plot(r: LayersResult, path: Path) -> None:
    """As .png, .svg or .pdf. Raises QlabError for another suffix."""
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise QlabError(f"{path}: {suffix!r} is no image format here; name a .png, .svg or .pdf file")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = rows(r)
    width = 3.0 + min(11.0, max(4.0, 0.17 * len(r.tokens)))
    figure = Figure(figsize=(width + 2.6, 2.2 + max(2.2, min(16.0, 0.24 * len(names)))), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(width, 2.6))
    _heat(figure, left, r, names)
    _shares(right, r, names)
    found = textwrap.fill(sentence(r), int(figure.get_figwidth() * 12.5))
    figure.suptitle(f"A {r.paths[0]}, B {r.paths[1]}\n{found}", fontsize=10, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, bbox_inches="tight", pad_inches=0.12)
    write_whole(path, buffer.getvalue())


def rows(r: LayersResult) -> list[str]:
    """What the rows stand for, from the top: the linears, and the embedding and the head where they are swapped."""
    swapped = {s.name for s in r.swaps}
    linears = [x.name for x in r.linears]
    return [EMBEDDING] * (EMBEDDING in swapped) + linears + [HEAD] * (HEAD in swapped)


def _heat(figure: Any, ax: Any, r: LayersResult, names: list[str]) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm

    by_name = {x.name: x.total_by_token for x in r.linears}
    low, high = scale(v for row in by_name.values() for v in row)
    values = np.full((len(names), len(r.tokens)), math.nan)
    for i, name in enumerate(names):
        for j, v in enumerate(by_name.get(name, ())):
            values[i, j] = min(v, high) if v > 0 else math.nan
    image = ax.imshow(values, norm=LogNorm(low, high), cmap="viridis", aspect="auto", interpolation="nearest")
    ax.set_facecolor(NO_FIGURE)
    for i, name in enumerate(names[1:], 1):
        if name.rsplit(".", 2)[0] != names[i - 1].rsplit(".", 2)[0]:
            ax.axhline(i - 0.5, color="white", linewidth=1.2)
    few = len(names) <= LABELLED
    shown = [i for i, name in enumerate(names) if few or name in (EMBEDDING, HEAD) or name.endswith("qkv_proj")]
    labels = [short(names[i]) if few else short(names[i]).partition(".")[0] for i in shown]
    ax.set_yticks(shown, labels, fontsize=8 if few else 6)
    if len(r.tokens) <= LABELLED:
        ax.set_xticks(range(len(r.tokens)), [visible(t) for t in r.tokens], rotation=90, fontsize=6.5, parse_math=False)
    else:
        ax.set_xlabel("token", fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("total divergence of each linear's output, relative to A's (grey: none)", fontsize=9)
    bar = figure.colorbar(image, ax=ax, location="left", shrink=0.8, pad=0.02, aspect=30)
    bar.ax.tick_params(which="both", labelsize=7)
    bar.outline.set_visible(False)


def _shares(ax: Any, r: LayersResult, names: list[str]) -> None:
    place = {name: i for i, name in enumerate(names)}
    total = r.total or 1.0
    for s in r.swaps:
        inside = [place[name] for name in s.linears] or [place[s.name]]
        middle, value = (inside[0] + inside[-1]) / 2, s.share / total
        ax.barh(middle, value, len(inside) - 0.25, color=MORE if value >= 0 else LESS)
        if len(r.swaps) <= LABELLED:
            gap = 3 if value >= 0 else -3
            ax.annotate(
                of(s.share, r.total),
                (value, middle),
                (gap, 0),
                textcoords="offset points",
                ha="left" if value >= 0 else "right",
                va="center",
                fontsize=6.5,
            )
    ax.axvline(0, color="#999999", linewidth=0.8)
    ax.margins(x=0.28)
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.tick_params(axis="x", labelsize=7, color="#999999")
    ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g}%")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#999999")
    ax.set_title(f"share of v = {number(r.total)}", fontsize=9)


def visible(token: str) -> str:
    """A token as a label: what is white is made visible, what is long is cut."""
    found = token.replace("\n", "\u21b5").replace("\t", "\u2192").strip(" ") or "\u2423"
    found = "".join(c if c.isprintable() else "\ufffd" for c in found)
    return found if len(found) <= 12 else found[:11] + "\u2026"


@one_sentence("qlab.report.layer_figure")
def main(
    result: Annotated[Path, typer.Argument(help="JSON that python -m qlab.layers --json wrote")],
    out: Annotated[Path, typer.Argument(help=".png, .svg or .pdf to write")],
) -> None:
    """Draw a result's heat map anew."""
    plot(LayersResult.read(result), out)


if __name__ == "__main__":
    typer.run(main)
