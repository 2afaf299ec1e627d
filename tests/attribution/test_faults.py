"""Planted faults are named, real cases too; what has no name, or is no fault, is not given one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import planted_faults
from bench.planted_faults import CLEAN, FEW
from bench.planted_real import real_cases
from qlab.attribution import faults, faults_recipe, rewrites
from qlab.attribution.fault import Fault
from qlab.attribution.faults import EQUAL, UNNAMED, name_faults
from qlab.attribution.planted import EQUIVALENT, RIGHT
from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import HOPPER, gpu
from qlab.inputs import random_weight
from qlab.recipes import recipe
from qlab.replay import missing, prepare

pytestmark = pytest.mark.skipif(bool(missing("native")), reason=f"the native engine cannot run: {missing('native')}")


@pytest.fixture(scope="module")
def weight():
    return random_weight(256, 64, 64, seed=3)


@pytest.fixture(scope="module")
def clean(weight):
    return recipe("vllm.awq_gemm", Problem.of(weight, 8), gpu("h100"))


def on(**step):
    """An H100 with another tensor core."""
    return replace(gpu("h100"), step=replace(HOPPER, **step))


def test_planted_faults_are_named():
    cases = [c for at in FEW for c in planted_faults.cases_of(CLEAN[at], at, 7, 1)]
    assert len(cases) >= 40
    assert {len(c.truth) for c in cases} >= {1, 2}
    off = [f"{c.name}, seed {c.seed}: {c.truth} named {c.named}" for c in cases if c.result not in (RIGHT, EQUIVALENT)]
    assert off == []


def test_real_cases_are_named():
    cases = real_cases()
    assert len(cases) == 7
    assert {c.name: c.result for c in cases} == dict.fromkeys((c.name for c in cases), RIGHT)
    assert all(c.first for c in cases)


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_a_clean_kernel_is_equivalent(clean, weight, engine):
    found = name_faults(prepare(clean, weight, engine=engine).run, clean, weight)
    assert (found.verdict, found.faults, found.equals) == (EQUAL, (), ())
    assert str(found).startswith("equivalent here")
    assert all(s.differing == 0 for s in found.probes)
    assert sum(s.outputs for s in found.probes) == 256 * 64 + 10 * 8 * 64


def test_the_kernel_is_asked_for_the_whole_weight_and_few_inputs_more(clean, weight):
    found = name_faults(prepare(clean, weight).run, clean, weight)
    assert found.calls == 256 // 8 + 10 + 1


def test_what_is_not_in_the_vocabulary_is_not_named(clean, weight):
    kernel = prepare(recipe("vllm.awq_gemm", Problem.of(weight, 8), on(fraction_bits=20)), weight).run
    found = name_faults(kernel, clean, weight)
    assert (found.verdict, found.faults) == (UNNAMED, ())
    assert "one-hot rows show the clean weight" in found.known[0]


def test_a_fault_that_leaves_the_vocabulary_is_not_named(clean, weight, monkeypatch):
    other = recipe("vllm.awq_gemm", Problem.of(weight, 8), on(terms=8))
    named = name_faults(prepare(other, weight).run, clean, weight)
    assert [f.kind for f in named.faults] == ["tensor core: L halved"]
    kept = faults_recipe.changes
    monkeypatch.setattr(faults_recipe, "changes", lambda *a: (c for c in kept(*a) if ": L " not in c[0].kind))
    monkeypatch.setattr(faults, "variants", faults_recipe.Variants)  # none that were kept
    assert name_faults(prepare(other, weight).run, clean, weight).verdict == UNNAMED


def test_a_weight_without_a_name_is_located(clean, weight):
    codes = weight.codes.clone()
    codes[64:128, 8:24] = codes[64:128, 8:24].flip(0)
    found = name_faults(prepare(clean, replace(weight, codes=codes)).run, clean, weight)
    assert found.verdict == UNNAMED
    assert "rows 64 to 127, columns 8 to 23, 1 of 4 groups" in found.known[0]


def test_a_named_weight_with_unnamed_sums_is_said_as_far_as_it_goes(clean, weight):
    codes = weight.codes.clone()
    codes[7, 11] ^= 8
    other = recipe("vllm.awq_gemm", Problem.of(weight, 8), on(fraction_bits=20))
    found = name_faults(prepare(other, replace(weight, codes=codes)).run, clean, weight)
    assert found.verdict == UNNAMED
    assert "k=7, n=11 holds code" in found.known[1]
    assert "sums differ" in found.known[2]


def test_another_kernel_is_named_where_two_changes_do_not_explain_it(clean, weight):
    marlin = recipe("vllm.marlin.awq", Problem.of(weight, 8), gpu("h100"))
    found = name_faults(prepare(marlin, weight).run, clean, weight)
    assert found.faults == (Fault("kernel: another one ran", "vllm.marlin.awq for vllm.awq_gemm"),)


def test_the_same_kernel_on_another_gpu_is_told_by_its_tensor_core(clean, weight):
    found = name_faults(prepare(recipe("vllm.awq_gemm", Problem.of(weight, 8), gpu("a100")), weight).run, clean, weight)
    assert {f.kind for f in found.faults} == {"tensor core: F one bit less", "tensor core: L halved"}
    (other,) = [f for e in found.equals for f in e if f.kind == faults_recipe.OTHER_GPU]
    assert "a100" in other.place.split(" or ")


def test_stripes_are_named_beside_a_change_of_what_one_hot_rows_show():
    w = random_weight(640, 1536, 128, seed=1)
    problem = Problem.of(w, 8)
    said = recipe("vllm.marlin.awq", problem, gpu("h100"))
    fused = rewrites.weights("fused", "rounded")(recipe("vllm.marlin.awq", problem, replace(gpu("h100"), sms=108)))
    found = name_faults(prepare(fused, w).run, said, w)
    kinds = [{f.kind for f in names} for names in (found.faults, *found.equals)]
    assert {faults_recipe.OTHER_SMS, "weights: RN(q*s + RN(-s*z)), one fused multiply-add"} in kinds


def test_a_kernel_that_does_not_repeat_is_refused(clean, weight):
    good, calls = prepare(clean, weight).run, []

    def kernel(x):
        calls.append(x)
        return good(x) + (len(calls) > 3)

    with pytest.raises(QlabError, match="other bits for the same input"):
        name_faults(kernel, clean, weight)


def test_a_kernel_of_another_shape_or_dtype_is_refused(clean, weight):
    with pytest.raises(QlabError, match=r"the kernel gave a tuple; it must give a tensor \[8, 64\]"):
        name_faults(lambda x: (x, None), clean, weight)
    with pytest.raises(QlabError, match=r"gave torch.float32 \[8, 64\], and the recipe says torch.float16 \[8, 64\]"):
        name_faults(lambda x: x.float() @ weight.dequantize(torch.float32), clean, weight)


@pytest.mark.parametrize(("kernel", "says"), [("vllm.gptq_gemm", "atomics"), ("vllm.awq_dequantize", "cuBLAS")])
def test_a_recipe_that_does_not_determine_its_bits_is_refused(kernel, says):
    w = random_weight(512, 64, 64, seed=1)
    said = recipe(kernel, Problem.of(w, 8), gpu("h100"))
    with pytest.raises(QlabError, match=says):
        name_faults(lambda x: x, said, w)
