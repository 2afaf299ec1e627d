"""Telescoping, identical paths, planted differences, and one decoder layer in memory at a time."""

from __future__ import annotations

import gc
import math
import weakref
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from qlab.engine.blocks import Blocks
from qlab.layers.layer import Layer
from qlab.layers.result import EMBEDDING, HEAD
from qlab.layers.run import Plan, run, steps
from tests.layers.conftest import IDS
from tests.tiny_llama import HIDDEN, VOCAB

EXACT = "reference.float64@h100"


def telescopes(r):
    assert r.residual == 0
    ends = [Fraction(0), *(Fraction(s.nested) for s in r.swaps)]
    assert sum(b - a for a, b in pairwise(ends)) == Fraction(r.total)
    assert all(s.share == float(b - a) for s, (a, b) in zip(r.swaps, pairwise(ends), strict=True))
    assert math.fsum(s.projection for s in r.swaps) == pytest.approx(1.0 if r.total else 0.0, abs=1e-9)
    rows = [math.fsum(s.share_by_token[t] for s in r.swaps) for t in range(len(r.tokens))]
    assert rows == pytest.approx(r.total_by_token, rel=1e-9, abs=1e-12)


def test_shares_add_up(deep, found):
    r = found("awq@a100", "awq_marlin@h100", deep)
    telescopes(r)
    assert r.total > 0
    assert r.scales == ""
    assert len(r.swaps) == len(r.linears) == 24
    first, last = r.swaps[0], r.swaps[-1]
    assert first.single == first.nested
    assert last.nested == r.total
    assert r.linears[0].inherited == 0 < r.linears[0].local == r.linears[0].total
    assert {x.kernels for x in r.linears} == {("vllm.awq_gemm", "vllm.marlin.awq")}
    assert r.stream[2].growth == r.stream[2].divergence / r.stream[1].divergence
    assert math.fsum(s.single for s in r.swaps) / r.total == pytest.approx(r.singles)


def test_one_layer_of_each_side_at_a_time(deep, opened, monkeypatch):
    alive, most, made = weakref.WeakSet(), [], []
    block = Blocks.block

    def counted(self, *args):
        found = block(self, *args)
        for part in (found, *found.linears.values()):
            alive.add(part)
        most.append(len(alive))
        made.append(args[0])
        return found

    monkeypatch.setattr(Blocks, "block", counted)
    pair = opened("awq@a100", "awq_marlin@h100", deep)
    gc.collect()
    gc.disable()  # what only the collector frees is not freed in time
    try:
        run(pair, Plan(IDS, singles=False))
    finally:
        gc.enable()
    assert made == [i for i in (*range(6), *reversed(range(6))) for _ in pair.sides]
    assert max(most) == 2 * (1 + 4)
    assert not alive


def test_a_weight_is_read_once_for_both_sides(awq, gptq, opened):
    for other, shared in ((awq, True), (gptq, False)):
        layer = Layer(opened("awq@a100", f"{'awq' if shared else 'gptq'}@h100", awq, other), 0, 3, 0)
        a, b = (block.linears["mlp.down_proj"].weight for block in layer.blocks)
        assert (a is b) is shared


def test_the_number_of_steps_is_told(deep, opened):
    pair = opened("awq@a100", "awq_marlin@h100", deep)
    for plan in (Plan(IDS), Plan(IDS, "layer"), Plan(IDS, singles=False)):
        told = []
        run(pair, plan, advance=told.append)
        assert sum(told) == steps(pair, plan)


@pytest.mark.parametrize(
    "paths", [("awq_marlin@a100", "awq_marlin@a100"), ("awq_marlin@h100", "awq_marlin@h200"), (EXACT, EXACT)]
)
def test_one_function_has_no_divergence(awq, found, paths):
    r = found(*paths, awq)
    telescopes(r)
    figures = [f for x in r.linears for f in (x.local, x.differing, x.inherited, x.total, *x.total_by_token)]
    figures += [f for s in r.swaps for f in (s.nested, s.share, s.single, s.projection, s.response)]
    assert not any(figures)
    assert (r.total, r.singles, r.response, r.response_gap) == (0, 0, 0, 0)


@pytest.mark.parametrize("tap", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_planted_weight_is_found(awq, changed, found, tap):
    """Some codes of one linear, in another copy of the checkpoint."""

    def plant(t):
        t[f"model.layers.0.{tap}.qweight"][::7, 2] ^= 0x00700000

    r = found("awq_marlin@a100", "awq_marlin@a100", awq, changed(awq, plant))
    name = "model.layers.0." + tap.replace("v_proj", "qkv_proj").replace("mlp.up_proj", "mlp.gate_up_proj")
    telescopes(r)
    assert [x.name for x in r.linears if x.local] == [name]
    assert {s.name: s.share for s in r.swaps if s.share} == {name: r.total}
    assert {s.name: s.single for s in r.swaps if s.single} == {name: r.total}
    assert {s.name for s in r.swaps if s.response} == {name}
    assert r.response_gap < 0.3
    assert [x.inherited > 0 for x in r.linears] == [i > [x.name for x in r.linears].index(name) for i in range(8)]


def test_what_is_no_linear_has_rows_of_its_own(awq, changed, found):
    def shift(t):
        g = torch.Generator().manual_seed(1)
        t["model.embed_tokens.weight"] += 0.01 * torch.randn((VOCAB, HIDDEN), generator=g).half()
        t["lm_head.weight"][:, 5] += 0.25
        t["model.norm.weight"][3] += 0.5
        t["model.layers.1.post_attention_layernorm.weight"][:9] *= 1.125

    r = found(EXACT, EXACT, awq, changed(awq, shift))
    telescopes(r)
    assert (r.swaps[0].name, r.swaps[-1].name) == (EMBEDDING, HEAD)
    assert r.swaps[0].share > 0
    assert r.swaps[0].single == r.swaps[0].nested
    assert r.swaps[-1].single > 0
    assert r.stream[0].divergence > 0
    norms = "model.layers.1.mlp.gate_up_proj"
    assert [x.name for x in r.linears if x.local] == [norms]
    assert {s.name for s in r.swaps if s.response} == {EMBEDDING, norms, HEAD}
    assert r.response == pytest.approx(1, abs=0.3)
    one = found(EXACT, EXACT, awq, changed(awq, lambda t: t["lm_head.weight"][:, 5].add_(0.25)))
    assert {s.name: s.share for s in one.swaps if s.share} == {HEAD: one.total}
    assert one.swaps[-1].response == pytest.approx(1)


def test_whole_layers(deep, found):
    paths = ("awq@a100", "awq_marlin@h100", deep)
    one, whole = found(*paths), found(*paths, by="layer", singles=False)
    assert [s.name for s in whole.swaps] == [f"model.layers.{i}" for i in range(6)]
    assert [s.nested for s in whole.swaps] == [s.nested for s in one.swaps[3::4]]
    assert whole.linears == one.linears
    assert [len(s.linears) for s in whole.swaps] == [4] * 6
    assert (whole.singles, whole.singles_gap, whole.swaps[0].single) == (None, None, None)
    assert whole.response == pytest.approx(one.response)
    telescopes(whole)


def test_all_of_the_vocabulary(awq, found):
    few, every = (found("awq@a100", "awq_marlin@h100", awq, top_k=k) for k in (5, 0))
    assert every.total > 20 * few.total
    assert every.linears == few.linears
    telescopes(every)
