"""Heat maps: whole image files, and one sentence where there is nothing to draw."""

from __future__ import annotations

import math
from dataclasses import replace

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from qlab import environment, hardware
from qlab.backends.registry import kernel
from qlab.errors import QlabError
from qlab.inputs import random_activations, random_weight
from qlab.lab.run import SAME, Layer, Plan, run
from qlab.report.figures import heat_maps

STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture(scope="module")
def make():
    here = environment.collect(details=False)

    def go(*names):
        w = random_weight(64, 16, 32, symmetric=True)
        layer = Layer("2,64,16", {SAME: w}, {SAME: random_activations(2, 64)})
        plan = Plan([kernel(n) for n in names], hardware.gpu("h100"), torch.device("cpu"), SAME, "shape", (), torch.float16)
        return run(plan, [layer], here)

    return go


@pytest.mark.parametrize("suffix", STARTS)
def test_each_format(make, tmp_path, suffix):
    path = tmp_path / f"map.{suffix}"
    heat_maps(make("reference.float64", "reference.float32"), path)
    assert path.read_bytes().startswith(STARTS[suffix])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_another_distance_gives_another_image(make, tmp_path):
    r = make("reference.float64", "reference.float32")
    total = r.pairs[-1]
    far = replace(r, pairs=(*r.pairs[:-1], replace(total, relative_l2=((0.0, 0.5), (0.5, 0.0)))))
    heat_maps(r, tmp_path / "a.png")
    heat_maps(r, tmp_path / "b.png")
    heat_maps(far, tmp_path / "c.png")
    a, b, c = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in "abc")
    assert (a == b).all()
    assert a.shape != c.shape or (a != c).any()


def test_infinite_and_nan_distances_and_names_like_formulas_are_drawn(make, tmp_path):
    r = make("reference.float64", "reference.float32")
    odd = replace(r.pairs[-1], relative_l2=((0.0, math.inf), (math.nan, 0.0)))
    heat_maps(replace(r, model=r"$\model{$ 100% _a_", pairs=(odd,)), tmp_path / "map.png")
    assert matplotlib.image.imread(tmp_path / "map.png").std() > 0


def test_one_kernel_is_drawn(make, tmp_path):
    heat_maps(make("reference.float64"), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_the_title_is_not_cut(make, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    heat_maps(
        replace(make("reference.float64", "reference.float32"), model="a model of a rather long name " * 3), tmp_path / "a.svg"
    )
    (figure,) = drawn
    figure.draw_without_rendering()
    box, title = figure.bbox, figure.get_suptitle()
    extent = figure.texts[0].get_window_extent()
    assert "\n" in title
    assert box.x0 <= extent.x0 < extent.x1 <= box.x1


def test_nothing_to_draw(make, tmp_path):
    with pytest.raises(QlabError, match="no kernel ran on every layer"):
        heat_maps(make("vllm.marlin.gptq"), tmp_path / "map.png")
    with pytest.raises(QlabError, match=r"map\.docx: 'docx' is no image format here; name a \.png"):
        heat_maps(make("reference.float64"), tmp_path / "map.docx")
    assert not list(tmp_path.iterdir())
