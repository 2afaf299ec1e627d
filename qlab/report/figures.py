"""Heat maps of the lab's result, drawn without a display."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from qlab.command import one_sentence
from qlab.compare import Error
from qlab.errors import QlabError
from qlab.lab.results import TOTAL, LabResult
from qlab.report.terminal import short
from qlab.serial import write_whole


def heat_maps(r: LabResult, path: Path) -> None:
    """Two heat maps in one image, pairwise distance in total and error by layer, as .png, .svg or .pdf.

    Raises QlabError when nothing ran or the suffix is another.
    """
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in ("png", "svg", "pdf"):
        raise QlabError(f"{path}: {suffix!r} is no image format here; name a .png, .svg or .pdf file")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total = next((p for p in r.pairs if p.layer == TOTAL), None)
    if total is None or not total.keys:
        raise QlabError("no kernel ran on every layer, so there is nothing to plot")
    layers = r.layers()
    errors = [[_relative(r.cell(layer, key).error) for key in total.keys] for layer in layers]
    n = len(total.keys)
    height = (n, len(layers))
    figure = Figure(figsize=(max(7.0, 2.4 + 0.56 * n), 2.6 + 0.27 * sum(height)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=height)
    names = [short(k) for k in total.keys]
    _draw(upper, [list(row) for row in total.relative_l2], names, "Relative L2 distance between kernels, all layers")
    _draw(lower, errors, [short(name) for name in layers], "Relative L2 error against float64, by layer")
    lower.set_xticks(range(n), names, rotation=40, ha="right", fontsize=8)
    gpu = r.hardware.running
    title = f"{r.model}, {r.dtype}, mode {r.mode}; --hw {r.hardware.asked} on {gpu}; inputs {r.digest[:12]}"
    letters = int(figure.get_figwidth() * 12)  # of 10 points, about half as wide as high
    figure.suptitle(textwrap.fill(title, letters), fontsize=10, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix)
    write_whole(path, buffer.getvalue())


def _draw(axes, values: list[list[float]], rows: list[str], title: str) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.colors import LogNorm

    positive = [v for row in values for v in row if v > 0 and math.isfinite(v)]
    low, high = (min(positive), max(positive)) if positive else (1e-9, 1.0)
    shown = [[v if v > 0 and math.isfinite(v) else math.nan for v in row] for row in values]
    high = max(high, 10 * low)  # figures that hardly differ shall not look as if they did
    axes.imshow(shown, norm=LogNorm(vmin=low, vmax=high), cmap="viridis", aspect="auto")
    axes.set_facecolor("#eeeeee")
    middle = math.sqrt(low * high)
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            dark = not (v > 0) or v > middle
            axes.text(j, i, _short_number(v), ha="center", va="center", fontsize=6.5, color="black" if dark else "white")
    axes.tick_params(axis="x", length=0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(title, fontsize=10)


def _relative(error: Error | None) -> float:
    return math.nan if error is None else error.relative_l2


def _short_number(v: float) -> str:
    """Two digits, so that a cell stays narrow."""
    if not math.isfinite(v) or v == 0:
        return f"{v:g}"
    mantissa, _, exponent = f"{v:.1e}".partition("e")
    return f"{v:.2g}" if 0.01 <= v < 1000 else f"{mantissa}e{int(exponent)}"


@one_sentence("qlab.report.figures")
def main(
    result: Annotated[Path, typer.Argument(help="JSON that python -m qlab.kernels --json wrote")],
    out: Annotated[Path, typer.Argument(help=".png, .svg or .pdf to write")],
) -> None:
    """Draw a result's heat maps anew."""
    heat_maps(LabResult.read(result), out)


if __name__ == "__main__":
    typer.run(main)
