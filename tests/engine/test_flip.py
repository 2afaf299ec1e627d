"""Moved attention outputs: how many, how far, and that batching does not choose them."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from qlab.engine.builtin import Builtin
from qlab.engine.flip import Flip
from qlab.engine.path import Path
from qlab.engine.run import Request, Tap
from qlab.engine.schedule import Batching
from qlab.errors import QlabError

PROMPT = tuple(range(500, 540))
CPU = torch.device("cpu")


def ordered(x):
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def o_rows(folder, flip, *, budget=50, layer=0):
    e = Builtin(folder, Path("reference.float64", "h100"), CPU, flip=flip)
    taps = frozenset(Tap(f"model.layers.{layer}.self_attn.o_proj", 0, p) for p in range(len(PROMPT)))
    run = e.run(Request((PROMPT,), 1, taps=taps, batching=Batching(budget)))
    return torch.stack([r.x for r in run.rows])


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_the_share_is_met_by_steps_of_one(awq, share):
    still, moved = o_rows(awq, None), o_rows(awq, Flip(share, 1))
    step = ordered(moved) - ordered(still)
    assert set(step.unique().tolist()) == {-1, 0, 1}
    count, ups = int((step != 0).sum()), int((step == 1).sum())
    assert stats.binomtest(count, step.numel(), share).pvalue > 1e-3
    assert stats.binomtest(ups, count, 0.5).pvalue > 1e-3


def test_the_ends_of_the_scale(awq):
    assert torch.equal(o_rows(awq, Flip(0.0)), o_rows(awq, None))
    assert (ordered(o_rows(awq, Flip(1.0))) != ordered(o_rows(awq, None))).all()
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(QlabError, match="the share of flipped elements must be 0 to 1"):
            Flip(share)


def test_batching_does_not_choose(awq):
    assert torch.equal(o_rows(awq, Flip(0.1, 4)), o_rows(awq, Flip(0.1, 4), budget=7))
    assert not torch.equal(o_rows(awq, Flip(0.1, 4)), o_rows(awq, Flip(0.1, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zeros_and_the_largest_number(dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([[0.0, -0.0, top, -top, float("inf"), 1.0] * 40], dtype=dtype)
    y = Flip(1.0, 2).apply(x, 0, [(0, 0)])
    assert not y[0].view(-1, 6)[:, :4].isinf().any()
    assert y[0].view(-1, 6)[:, 4].isinf().all()
    tiny = torch.tensor([1], dtype=torch.int16).view(dtype)
    assert (y[0].view(-1, 6)[:, :2].abs() == tiny).all()
    assert torch.equal(Flip(0.0).apply(x, 0, [(0, 0)]).view(torch.int16), x.view(torch.int16))


def test_layers_sequences_and_positions_are_told_apart():
    x = torch.ones((1, 4096)).half()
    rows = [Flip(0.5, 1).apply(x, layer, [(s, p)]) for layer in (0, 1) for s in (0, 1) for p in (0, 1)]
    agree = [float((a == b).float().mean()) for i, a in enumerate(rows) for b in rows[:i]]
    assert max(agree) < 0.45  # 0.25 + 2 * 0.25^2 = 0.375 of independent rows
