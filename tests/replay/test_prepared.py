"""A weight decoded and a program compiled once give the bits of a replay that does all of it anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab import hardware, replay
from qlab.backends.registry import Problem
from qlab.errors import QlabError, UnsupportedError
from qlab.inputs import random_activations, random_weight
from qlab.recipes import recipe
from qlab.replay import Decoded, Prepared, native, prepare, prepared

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "-")
K, N = 512, 256


def problem(weight, m, bias=False):
    return replace(Problem.of(weight, m), bias=bias)


@pytest.mark.parametrize("engine", ["reference", "native"])
@pytest.mark.parametrize(
    ("kernel", "group", "act_order", "bias"),
    [
        ("vllm.marlin.gptq", 128, False, False),
        ("vllm.marlin.gptq", 128, True, False),
        ("vllm.marlin.gptq", K, False, True),
        ("vllm.awq_gemm", 128, False, False),
        ("vllm.machete.gptq", 128, True, False),
    ],
)
def test_bits_of_a_replay(kernel, group, act_order, bias, engine):
    w = random_weight(K, N, group, symmetric=True, act_order=act_order, seed=1)
    b = torch.randn(N).half() if bias else None
    m = 3 if engine == "reference" else 20
    made = recipe(kernel, problem(w, m, bias), hardware.gpu("h100"))
    ready = prepare(made, w, b, engine=engine)
    for seed in (1, 2):
        x = random_activations(m, K, seed=seed)
        want = replay.replay(made, x, w, b, engine="native")
        assert torch.equal(ready.run(x).view(torch.int16), want.view(torch.int16))


def test_rows_ordered_by_activation_are_the_sorted_rows():
    w = random_weight(K, N, 128, symmetric=True, act_order=True, seed=8)
    order = torch.argsort(w.group_index, stable=True)
    in_order = replace(w, codes=w.codes[order], group_index=w.group_index[order])
    x, gpu = random_activations(7, K, seed=8), hardware.gpu("h100")
    y = prepare(recipe("vllm.marlin.gptq", Problem.of(w, 7), gpu), w).run(x)
    other = prepare(recipe("vllm.marlin.gptq", Problem.of(in_order, 7), gpu), in_order).run(x[:, order])
    assert not in_order.act_order
    assert torch.equal(y, other)


def test_recipes_of_several_m_share_a_decoded_weight(monkeypatch):
    w = random_weight(K, N, 128, seed=2)
    count = []
    operands = prepared.operands
    monkeypatch.setattr(prepared, "operands", lambda *a: count.append(1) or operands(*a))
    gpu = hardware.gpu("a100")
    made = {m: recipe("vllm.marlin.awq", Problem.of(w, m), gpu) for m in (1, 17, 70)}
    decoded = Decoded(made[1], w)
    ready = {m: prepare(r, decoded) for m, r in made.items()}
    ys = {m: ready[m].run(random_activations(m, K, seed=m)) for m in made}
    assert len(count) == 1
    for m, y in ys.items():
        assert torch.equal(y, replay.replay(made[m], random_activations(m, K, seed=m), w))


def test_another_rule_asks_for_another_decoding():
    w = random_weight(K, N, 128, symmetric=True, seed=3)
    gpu = hardware.gpu("h100")
    decoded = Decoded(recipe("vllm.marlin.gptq", Problem.of(w, 1), gpu), w)
    integer = recipe("vllm.gptq_gemm", Problem.of(w, 1), gpu)
    assert not decoded.serves(integer)
    with pytest.raises(QlabError, match="decoded for another recipe"):
        prepare(integer, decoded)


def test_panels_change_no_bit_and_bound_what_is_held(monkeypatch):
    k, n = 1408, 1024  # stripes cut its column tiles in different places
    w = random_weight(k, n, 128, seed=4)
    made, x = recipe("vllm.marlin.awq", Problem.of(w, 20), hardware.gpu("h100")), random_activations(20, k, seed=4)
    assert len(made.regions) > 1
    whole = prepare(made, w).run(x)
    widths = []
    operands = prepared.operands
    monkeypatch.setattr(prepared, "PANEL", 100 * k)
    monkeypatch.setattr(prepared, "operands", lambda r, w, part, *a: widths.append(part) or operands(r, w, part, *a))
    assert torch.equal(replay.replay(made, x, w), whole)
    assert [(p.start, p.stop) for p in widths] == [(at, at + 64) for at in range(0, n, 64)]


def test_threads_follow_the_size_of_a_call(monkeypatch):
    w = random_weight(K, N, 128, seed=5)
    threads = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda *a, **k: threads.append(k["threads"]) or run(*a, **k))
    for m in (1, 64):
        made = recipe("vllm.marlin.awq", Problem.of(w, m), hardware.gpu("h100"))
        prepare(made, w).run(random_activations(m, K, seed=1))
    assert threads == [1, 0]


def test_atomics_take_a_seed_and_keep_its_program(monkeypatch):
    w = random_weight(K, N, 128, symmetric=True, seed=6)
    made, x = recipe("vllm.gptq_gemm", Problem.of(w, 8), hardware.gpu("h100")), random_activations(8, K, seed=6)
    compiled = []
    compile_recipe = prepared.compile_recipe
    monkeypatch.setattr(prepared, "compile_recipe", lambda r, s: compiled.append(s) or compile_recipe(r, s))
    ready = prepare(made, w)
    orders = [ready.run(x, seed) for seed in (11, 11, 12)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[2], replay.replay(made, x, w, seed=12))
    assert compiled == [11, 12]
    with pytest.raises(UnsupportedError, match="the order of atomics is not fixed"):
        ready.run(x)
    with pytest.raises(QlabError, match="0 or more, not -1"):
        ready.run(x, -1)


def test_operands_that_do_not_fit():
    w = random_weight(K, N, 128, seed=7)
    made = recipe("vllm.marlin.awq", Problem.of(w, 4), hardware.gpu("h100"))
    ready = prepare(made, w)
    with pytest.raises(QlabError, match=r"the recipe is for M, K, N = \[4, 512, 256\] and x \[3, 512\]"):
        ready.run(random_activations(3, K, seed=1))
    with pytest.raises(QlabError, match=r"the recipe is for fp16 and x is torch.bfloat16"):
        ready.run(random_activations(4, K, dtype=torch.bfloat16, seed=1))
    with pytest.raises(QlabError, match="a bias was given and the recipe adds none"):
        prepare(made, w, torch.zeros(N).half())
    with pytest.raises(QlabError, match=r"weight \[512, 128\] are not"):
        prepare(made, random_weight(K, 128, 128, seed=7))
    with pytest.raises(UnsupportedError, match="the cuda engine needs x on a GPU"):
        prepare(made, w, engine="cuda")
    with pytest.raises(QlabError, match="unknown engine 'fast'"):
        prepare(made, w, engine="fast")
    assert isinstance(ready, Prepared)
