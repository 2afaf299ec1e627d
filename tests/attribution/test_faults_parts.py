"""The parts of fault naming: trees are read as they are cut, one-hot rows predicted, inputs cancel, answers scored."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import planted_weights
from qlab.attribution import cuts, rewrites
from qlab.attribution.fault import Fault, distinct
from qlab.attribution.faults import EQUAL, NAMED, SCHEMA, UNNAMED, Named
from qlab.attribution.faults_probe import multiplied, one_hot, one_hot_power, probes, slab
from qlab.attribution.faults_recipe import variants
from qlab.attribution.faults_weight import Reading, Tables, same
from qlab.attribution.planted import (
    EQUIVALENT,
    MISSED,
    RIGHT,
    WRONG,
    Planted,
    confusion,
    judged,
    kind_rows,
)
from qlab.attribution.planted import SCHEMA as PLANTED
from qlab.backends.registry import Problem
from qlab.environment import collect
from qlab.hardware import gpu
from qlab.inputs import random_activations, random_weight
from qlab.recipe import Chain, nodes
from qlab.recipes import recipe
from qlab.replay import missing, prepare
from qlab.report import faults as report
from qlab.serial import read_json, write_json

KERNELS = {
    "vllm.awq_gemm": ("torch.sum", 8),
    "vllm.awq_triton": ("torch.sum", 8),
    "vllm.marlin.awq": ("descending", 4),
    "vllm.marlin.awq.fp16": ("descending", 4),
    "vllm.machete.awq": ("ascending", 1),
    "triton.awq_gemm": ("ascending", 1),
    "triton.awq_gemm.splitk": ("ascending", 4),
}
native = pytest.mark.skipif(bool(missing("native")), reason=f"the native engine cannot run: {missing('native')}")


def problem_of(kernel, k=512, m=8, bias=False, group=64):
    w = random_weight(k, 128, group, seed=4)
    problem = replace(Problem.of(w, m), bias=bias)
    return w, problem, recipe(kernel, problem, gpu("h100"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", [256, 512])
def test_a_tree_is_read_as_it_is_cut(kernel, k):
    _, _, said = problem_of(kernel, k)
    found = cuts.read(said.regions[0].tree)
    order, pieces = KERNELS[kernel]
    assert found.tree() == said.regions[0].tree
    assert len(found.pieces) == (pieces if k == 512 or pieces in (1, 8) else pieces // 2)
    if len(found.pieces) > 2:
        assert found.order == order
    assert sorted(int(i) for p in found.pieces for w in p for i in w) == list(range(k))


def test_a_tree_of_no_kernel_is_not_read():
    _, _, said = problem_of("triton.awq_gemm.splitk")
    swapped = cuts.changed(cuts.last_swapped)(said)
    assert cuts.read(swapped.regions[0].tree) is None
    assert cuts.changed(cuts.whole)(swapped) is None


def test_a_rounding_that_vanishes_is_no_second_change():
    _, _, said = problem_of("vllm.awq_gemm")
    found = rewrites.other_accumulator(said)
    steps = {n.step for r in found.regions for n in nodes(r.tree) if isinstance(n, Chain)}
    assert {(s.accumulator, s.zero_exponent) for s in steps} == {("fp16", -21)}


def test_every_variant_is_another_recipe_and_each_of_them_once():
    _, problem, said = problem_of("vllm.awq_gemm", 256)
    known = variants(said, problem)
    hashes = [v.recipe.hash for v in (known.none, *known.single, *known.double)]
    assert len(hashes) == len(set(hashes)) > 200
    assert known.source[0] == "vllm.awq_gemm"
    assert all(len(v.faults) == 2 for v in known.double)


@native
@pytest.mark.parametrize("kernel", [*KERNELS, "vllm.gptq_gemm"])
@pytest.mark.parametrize(("group", "bias"), [(64, False), (-1, False), (-1, True)])
def test_one_hot_rows_show_what_is_predicted(kernel, group, bias):
    if (bias and "marlin" not in kernel) or (kernel.startswith("vllm.awq") and group == -1):
        pytest.skip("no such kernel")
    w, _, said = problem_of(kernel, 256, 12, bias, group)
    b = random_activations(1, 128, seed=9)[0] if bias else None
    power = one_hot_power(w, b)
    run = prepare(said, w, b).run
    got = torch.cat([run(x) for x in one_hot(said, power)])[: w.K]
    assert same(Reading(said, b, power).predict(Tables.of(w)), got).all()
    columns = torch.tensor([3, 64, 127])
    assert same(Reading(said, b, power).predict(Tables.of(w), columns), got[:, columns]).all()
    damaged = planted_weights.nibble_flipped(w, torch.Generator().manual_seed(0))[0]
    assert not same(Reading(said, b, power).predict(Tables.of(damaged)), got).all()


@pytest.mark.parametrize("kernel", ["vllm.awq_gemm", "vllm.machete.awq"])
def test_sums_cancel_where_they_should(kernel):
    w, _, said = problem_of(kernel)
    values, columns = multiplied(said, w), slice(*slab(w.N, 5))
    found = {p.kind: p.x.double() for p in probes(said, w, 5)}
    gaussian, whole = (found[kind] for kind in ("Gaussian", "the whole sum cancels"))
    for x, most in ((gaussian, 1.0), (whole, 2.0**-18)):
        share = (x @ values)[:, columns].abs().max() / (x.abs() @ values.abs())[:, columns].max()
        assert share < most
        assert (share > 2.0**-8) == (most == 1.0)
    assert all(torch.isfinite(x).all() and float((x.abs() @ values.abs()).max()) < 2**16 for x in found.values())


def test_a_shifted_group_is_a_weight_of_smaller_groups():
    w = random_weight(256, 64, 64, seed=1)
    found, fault = planted_weights.shifted(w, torch.Generator().manual_seed(0))
    by = int(fault.place.split()[4])
    index = torch.tensor([min((k + by) // 64, 3) for k in range(256)], dtype=torch.int32)
    tables = replace(Tables.of(w), group_index=index)
    assert torch.equal(tables.weight().dequantize(torch.float64), found.dequantize(torch.float64))
    assert not torch.equal(found.dequantize(torch.float64), w.dequantize(torch.float64))


A, B, C = Fault("codes: a"), Fault("scales: b", "here"), Fault("joins: c")


def test_the_order_of_faults_says_nothing():
    assert distinct([(A, B), (C,), (B, A), (A,), (C,)]) == ((A, B), (C,), (A,))


def answer(verdict, faults=(), equals=()):
    return Named(SCHEMA, verdict, tuple(faults), tuple(map(tuple, equals)), (), (), 1, 1)


@pytest.mark.parametrize(
    ("truth", "said", "result", "first"),
    [
        ([A], answer(NAMED, [A]), RIGHT, True),
        ([A], answer(NAMED, [C], [[A]]), RIGHT, False),
        ([A], answer(NAMED, [A, B]), WRONG, False),
        ([A, B], answer(NAMED, [B, A]), RIGHT, True),
        ([A, B], answer(NAMED, [A]), WRONG, False),
        ([A, B], answer(NAMED, [A, replace(B, place="there")]), WRONG, False),
        ([A], answer(UNNAMED), MISSED, False),
        ([A], answer(EQUAL), MISSED, False),
        ([], answer(EQUAL), EQUIVALENT, False),
        ([], answer(NAMED, [A]), WRONG, False),
        ([], answer(UNNAMED), WRONG, False),
        ([Fault("stripes: s", "108")], answer(NAMED, [Fault("stripes: s", "80 or 108 for 132")]), RIGHT, True),
        ([Fault("stripes: s", "10")], answer(NAMED, [Fault("stripes: s", "80 or 108 for 132")]), WRONG, False),
    ],
)
def test_answers_are_judged(truth, said, result, first):
    case = judged("k", truth, truth, said, 0.0, 0)
    assert (case.result, case.first) == (result, first)


def test_tables_count_what_was_planted_and_what_was_named(tmp_path):
    cases = tuple(
        judged("k", truth, truth, said, 0.0, 0)
        for truth, said in (
            ([A], answer(NAMED, [A])),
            ([A], answer(NAMED, [C])),
            ([C], answer(UNNAMED)),
            ([A, B], answer(NAMED, [A, C])),
            ([], answer(EQUAL)),
        )
    )
    rows = {(r.faults, r.kind): r for r in kind_rows(cases)}
    assert (rows[1, A.kind].cases, rows[1, A.kind].right, rows[1, A.kind].named) == (2, 1, 1)
    assert (rows[1, C.kind].missed, rows[1, C.kind].precision, rows[1, C.kind].recall) == (1, 0.0, 0.0)
    pairs = {(c.faults, c.planted, c.named): c.cases for c in confusion(cases)}
    assert pairs[1, A.kind, A.kind] == pairs[1, A.kind, C.kind] == pairs[1, C.kind, "nothing"] == 1
    assert pairs[2, A.kind, A.kind] == pairs[2, B.kind, C.kind] == pairs[0, "nothing", "nothing"] == 1

    result = Planted(PLANTED, collect(details=False), "cmd", 0, cases, kind_rows(cases), confusion(cases), 1.0)
    assert (result.precision(1), result.recall(1), result.recall(2)) == (0.5, 1 / 3, 0.0)
    write_json(tmp_path / "p.json", result)
    assert read_json(Planted, tmp_path / "p.json", PLANTED) == result
    console = Console(width=160, record=True, file=io.StringIO())
    report.show(result, console)
    text = console.export_text()
    assert "Missed or wrong" in text
    assert "33.33%" in text
    assert "| one fault | 3 | 1 | 1 | 1 |" in report.markdown(result)


def test_the_recorded_suite_keeps_its_promises():
    path = Path(__file__).parents[2] / "results" / "attribution" / "planted-faults.json"
    if not path.exists():
        pytest.skip("not recorded yet: python -m bench.planted_faults")
    result = read_json(Planted, path, PLANTED)
    assert len(result.of(1)) + len(result.of(2)) >= 500
    assert (result.precision(1), result.recall(1)) == (1.0, 1.0)
    assert min(result.precision(2), result.recall(2)) >= 0.99
    assert all(c.result == EQUIVALENT for c in result.of(0))
    assert result.kinds == kind_rows(result.cases)
    assert result.confusion == confusion(result.cases)
    assert sum("#" in c.name or "PR " in c.name for c in result.cases) >= 7
