"""The backward pass: its gradients against finite differences, and how near the linear response comes to nested swaps."""

from __future__ import annotations

import pytest
import torch

from qlab import data
from qlab.lab.activations import tokenize
from qlab.layers import layer as layers
from qlab.layers.layer import ALL_A, Layer
from qlab.layers.response import responses
from qlab.layers.walk import forward, swaps_of
from tests.layers.conftest import IDS


def smooth(linear, x, seed):
    return x @ linear.weight.dequantize(torch.float64)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_of_a_layer_without_roundings(relative, opened, monkeypatch, family):
    monkeypatch.setattr(layers, "_rounded_run", smooth)
    monkeypatch.setattr(layers, "PANEL", 5000)  # several panels a weight
    layer = Layer(opened("reference.float64@h100", "reference.float64@h100", relative(family)), 1, 7, 0)
    g = torch.Generator().manual_seed(0)
    hidden, way, toward = (torch.randn((1, 7, 128), generator=g, dtype=torch.float64) for _ in range(3))
    leaf = hidden.clone().requires_grad_()
    seen = layer.run(leaf, ALL_A, way_back=True)
    gradient, of_y = torch.autograd.grad(seen.out, [leaf, seen.y["mlp.down_proj"]], toward)
    there, back = (layer.run(hidden + s * 1e-6 * way, ALL_A).out for s in (1, -1))
    slope = float(((there - back) / 2e-6 * toward).sum())
    assert float((gradient * way).sum()) == pytest.approx(slope, rel=1e-6)
    assert torch.equal(of_y, toward)


def test_gradients_through_the_whole_model(deep, opened, monkeypatch):
    """A small change of the embedding, by the response and by the difference of two runs."""
    monkeypatch.setattr(layers, "_rounded_run", smooth)
    pair = opened("reference.float64@h100", "reference.float64@h100", deep)
    other = opened("reference.float64@h100", "reference.float64@h100", deep).a
    g = torch.Generator().manual_seed(0)
    other.blocks.embedding = pair.a.blocks.embedding + 1e-7 * torch.randn(pair.a.blocks.embedding.shape, generator=g).double()
    object.__setattr__(pair, "b", other)
    swaps = swaps_of(pair, "linear")
    walked = forward(pair, IDS, swaps, singles=False, seed=0)
    with torch.no_grad():
        a, b = (pair.a.blocks.logprobs(h) for h in (walked.entered[-1], walked.last_b))
    ids = a.topk(4).indices
    weights = torch.randn(ids.shape, generator=g, dtype=torch.float64)
    want = float(((b - a).gather(1, ids) * weights).sum())
    got = responses(pair, IDS, walked, swaps, ids, weights, 0)
    assert got[0] == pytest.approx(want, rel=1e-4)
    assert set(got) == set(range(25))
    assert not any(got[j] for j in range(1, 25))


@pytest.fixture(scope="module")
def shipped(found):
    ids = tuple(tokenize(data.model_directory("awq"), data.heldout_text(), 24).tolist())
    awq, gptq = (data.model_directory(kind) for kind in ("awq", "gptq"))
    smooth = found("awq_marlin@h100", "gptq_marlin@h100", awq, gptq, ids=ids)
    tiny = found("awq_marlin@a100", "awq_marlin@h100", awq, ids=ids)
    return smooth, tiny


def test_the_gap_is_largest_for_tiny_divergences(shipped):
    smooth, tiny = shipped
    assert smooth.scales == "kept"
    assert tiny.linears[0].local < 1e-4 < 1e-2 < smooth.linears[0].local
    assert smooth.response == pytest.approx(1, abs=0.15)
    assert smooth.response_gap < 0.25
    assert tiny.response_gap > 0.9
    assert abs(tiny.response) < 0.1
    assert smooth.singles == pytest.approx(1, abs=0.3)
    assert tiny.singles > 1.5
