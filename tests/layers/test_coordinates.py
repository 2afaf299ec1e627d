"""AWQ's input scales between checkpoints: kept ones, estimated ones, and what goes wrong without."""

from __future__ import annotations

import shutil

import pytest
import torch

from qlab import data
from qlab.engine.path import Path
from qlab.lab.activations import tokenize
from qlab.layers import coordinates as c
from qlab.layers.layer import Layer
from qlab.layers.pair import directories
from qlab.layers.run import Plan, run

A, B = "awq_marlin@h100", "gptq_marlin@h100"


@pytest.fixture(scope="module")
def checkpoints():
    return tuple(data.model_directory(kind) for kind in ("awq", "gptq"))


@pytest.fixture(scope="module")
def without_scales(checkpoints, tmp_path_factory):
    """The shipped AWQ checkpoint as another tool would write it."""
    folder = tmp_path_factory.mktemp("models") / "awq"
    shutil.copytree(checkpoints[0], folder)
    shutil.rmtree(folder / "qlab")
    return folder


def of_layer(pair, index):
    return c.coordinates(pair, Layer(pair, index, 1, 0).blocks).quotients


def test_a_value_passes_and_comes_back(checkpoints, opened):
    pair = opened(A, B, *checkpoints)
    assert c.how(pair) == "kept"
    (tap,) = found = of_layer(pair, 0)  # query heads share value heads: o is not scaled
    assert tap == c.DOWN
    s = pair.a.blocks.files.weight("model.layers.0.mlp.down_proj").input_scale.double()
    torch.testing.assert_close(found[tap], s, rtol=1e-15, atol=0)
    back = of_layer(opened(B, A, *reversed(checkpoints)), 0)[tap]
    torch.testing.assert_close(back * s, torch.ones_like(s), rtol=1e-15, atol=0)
    k = c.Coordinates(found)
    x = torch.linspace(-2, 2, len(s)).double()
    torch.testing.assert_close(k.enter(tap, k.enter(tap, x, 1), 0), x, rtol=1e-15, atol=0)
    y = torch.cat((x, x))[None]
    assert torch.equal(k.leave(c.GATE_UP, y), torch.cat((x, x / s))[None])
    assert torch.equal(k.leave(c.QKV, y), y)
    assert torch.equal(k.enter(c.OUT, x, 1), x)


def test_estimated_scales_are_near_the_kept_ones(checkpoints, without_scales, opened):
    pair = opened(A, B, without_scales, checkpoints[1])
    assert c.how(pair) == "estimated"
    kept = opened(A, B, *checkpoints)
    for i in range(3):
        off = (of_layer(pair, i)[c.DOWN] / of_layer(kept, i)[c.DOWN] - 1).abs()
        assert float(off.mean()) < 0.02
        assert float((of_layer(kept, i)[c.DOWN] - 1).abs().mean()) > 0.05


def test_without_them_a_hybrid_is_another_model(checkpoints, without_scales, opened, monkeypatch):
    """The same ends; down's share and its local divergence only where the scales are known or estimated."""
    ids = tuple(tokenize(checkpoints[0], data.heldout_text(), 8).tolist())
    plan = Plan(ids, singles=False)
    kept = run(opened(A, B, *checkpoints), plan)
    estimated = run(opened(A, B, without_scales, checkpoints[1]), plan)
    monkeypatch.setattr(c.Coordinates, "enter", lambda self, tap, x, to: x)
    monkeypatch.setattr(c.Coordinates, "leave", lambda self, tap, y: y)
    none = run(opened(A, B, *checkpoints), plan)
    assert kept.total == estimated.total == none.total
    shares = [[s.share / r.total for s in r.swaps] for r in (kept, estimated, none)]
    assert max(abs(a - b) for a, b in zip(*shares[:2], strict=True)) < 0.05
    locals_ = [[x.local for x in r.linears if x.name.endswith(("gate_up_proj", "down_proj"))] for r in (kept, estimated, none)]
    assert max(locals_[0]) < 0.15
    assert locals_[1] == pytest.approx(locals_[0], rel=0.05)
    assert all(wrong > 1.1 * right for wrong, right in zip(locals_[2], locals_[0], strict=True))
    assert locals_[2][1] > 2 * locals_[0][1]


def test_one_checkpoint_and_a_copy_need_none(awq, changed, opened):
    assert c.how(opened(A, "awq@a100", awq)) == ""
    pair = opened(A, A, awq, changed(awq, lambda t: t["model.layers.0.mlp.up_proj.qweight"][5].bitwise_not_()))
    assert c.how(pair) == "estimated"
    assert not of_layer(pair, 0)


def test_which_checkpoint_a_path_runs(tmp_path):
    awq, gptq = (data.model_directory(kind) for kind in ("awq", "gptq"))
    paths = {name: Path.parse(name) for name in (A, B, "reference.float64@h100")}
    assert directories(paths[A], paths[B], None, None) == (awq, gptq)
    assert directories(paths[A], paths["reference.float64@h100"], None, None) == (awq, awq)
    assert directories(paths["reference.float64@h100"], paths["reference.float64@h100"], None, None) == (gptq, gptq)
    assert directories(paths[A], paths[B], tmp_path, None) == (tmp_path, tmp_path)
    assert directories(paths[A], paths[B], tmp_path, gptq) == (tmp_path, gptq)
