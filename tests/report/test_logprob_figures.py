"""Figures: whole image files that follow the data, labels that do not overlap, one sentence where there is nothing to draw."""

from __future__ import annotations

import math
from dataclasses import replace

import matplotlib.image
import pytest
from matplotlib.figure import Figure as Canvas

from qlab.errors import QlabError
from qlab.logprobs.statistics import Figure
from qlab.report import logprob_figures as figures
from tests.logprobs import synthetic_runs as runs

STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
CURVES = {
    "awq vs awq_marlin": [
        (0.0, Figure(math.inf, math.inf, math.inf, 0, 8)),
        (1e-3, Figure(5, 4, 6, 0, 8)),
        (1e-2, Figure(1, 0.9, 1.1, 0, 8)),
    ],
    "gptq vs gptq_marlin": [(1e-3, Figure(2, math.nan, math.nan, 0, 1)), (1e-2, Figure(1, 0.0, 1.1, 0, 8))],
}


@pytest.fixture(scope="module")
def both():
    return runs.result(refused=("gptq@a100",))


@pytest.fixture
def drawn(monkeypatch):
    found = []
    monkeypatch.setattr(Canvas, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


@pytest.mark.parametrize("suffix", STARTS)
def test_each_format(both, tmp_path, suffix):
    figures.roc(both.tables.detection[:1], tmp_path / f"roc.{suffix}")
    assert (tmp_path / f"roc.{suffix}").read_bytes().startswith(STARTS[suffix])
    assert len(list(tmp_path.iterdir())) == 1


def test_every_figure_is_drawn(both, tmp_path):
    figures.within(both, tmp_path / "within.png")
    figures.full(both, tmp_path / "full.png")
    figures.curves(CURVES, tmp_path / "curves.png", x="share", heading="$SNR")
    for name in ("within", "full", "curves"):
        assert matplotlib.image.imread(tmp_path / f"{name}.png").std() > 0.05


def test_cells_hold_their_numbers_and_reasons(both, drawn, tmp_path):
    figures.within(both, tmp_path / "a.svg")
    (figure,) = drawn
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts.count("0") == 3  # the diagonal but for the path that did not run
    assert texts.count("opaque") == 7
    free = [t.get_text() for ax in figure.axes if "free" in ax.get_title() for t in ax.texts]
    assert "8/8 split" in free


def test_numbers_and_names_lie_apart_and_inside(both, drawn, tmp_path):
    figures.within(both, tmp_path / "a.svg")
    figures.full(both, tmp_path / "b.svg")
    figures.roc(both.tables.detection, tmp_path / "c.svg")
    figures.curves(CURVES, tmp_path / "d.svg", x="share", heading="SNR between A100 and H100")
    for figure in drawn:
        figure.draw_without_rendering()
        boxes = []
        for ax in figure.axes:
            ticks = [*ax.get_xticklabels(), *ax.get_yticklabels()]
            level = [t for t in (*ax.texts, ax.title, ax.xaxis.label, *ticks) if t.get_text() and not t.get_rotation()]
            boxes += [t.get_window_extent() for t in level if ax.get_visible()]
        for i, a in enumerate(boxes):
            assert figure.bbox.x0 <= a.x0 < a.x1 <= figure.bbox.x1
            assert not any(a.overlaps(b) for b in boxes[i + 1 :])


def test_another_figure_gives_another_image(tmp_path):
    one = runs.result(("h100",), methods=("awq", "gptq"))
    moved = runs.result(("h100",), methods=("awq", "gptq"), prompts=7)
    figures.within(one, tmp_path / "a.png")
    figures.within(one, tmp_path / "b.png")
    figures.within(moved, tmp_path / "c.png")
    a, b, c = (matplotlib.image.imread(tmp_path / f"{n}.png") for n in "abc")
    assert (a == b).all()
    assert a.shape != c.shape or (a != c).any()


def test_nothing_to_draw(both, tmp_path):
    empty = replace(both, tables=replace(both.tables, full=()))
    with pytest.raises(QlabError, match=r"no matrix of this kind was made"):
        figures.full(empty, tmp_path / "a.png")
    with pytest.raises(QlabError, match="no two paths were told apart"):
        figures.roc((), tmp_path / "a.png")
    with pytest.raises(QlabError, match="no point of the curves is finite"):
        figures.curves({"a": [(0.0, Figure(0, 0, 0))]}, tmp_path / "a.png", x="share")
    with pytest.raises(QlabError, match=r"a\.docx: 'docx' is no image format here"):
        figures.within(both, tmp_path / "a.docx")
    assert not list(tmp_path.iterdir())
