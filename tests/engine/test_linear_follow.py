"""A linear that follows a recipe in place of its kernel: the recipe's bits, its bias in its place, nothing made twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab import hardware
from qlab.backends.registry import Problem
from qlab.engine.linear import FOLLOWED, Linear
from qlab.engine.path import Path
from qlab.inputs import random_activations, random_weight
from qlab.recipes import assemble, recipe, scheme_of
from qlab.replay import native, prepared, replay
from qlab.weights import round_once

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "-")
CPU = torch.device("cpu")
WEIGHT = random_weight(512, 256, 128, seed=1, name="q")
BIAS = torch.randn(256, generator=torch.Generator().manual_seed(1)).half()
PATH = Path("awq_marlin", "h100")


def x(m):
    return random_activations(m, 512, seed=m)


def made(kernel, m, gpu="h100", weight=WEIGHT, **problem):
    return recipe(kernel, replace(Problem.of(weight, m), **problem), hardware.gpu(gpu))


def bits(t):
    return t.view(torch.int16)


def test_a_named_recipe_stands_in_for_the_kernel():
    linear = Linear(WEIGHT, PATH, CPU, native=False)
    own = linear.run(x(3))
    assert linear.form(3).kernel == "vllm.marlin.awq"
    asked = []
    linear.follow(lambda m: asked.append(m) or made("vllm.awq_gemm", m, "a100"))
    other = linear.run(x(3))
    assert torch.equal(bits(other), bits(replay(made("vllm.awq_gemm", 3, "a100"), x(3), WEIGHT)))
    assert not torch.equal(other, own)
    form = linear.form(3)
    assert (form.kernel, form.origin, form.recipe) == (FOLLOWED, "replay", made("vllm.awq_gemm", 3, "a100").hash)
    linear.run(x(1))
    linear.run(x(3))
    assert asked == [3, 1]
    linear.follow(None)
    assert torch.equal(bits(linear.run(x(3))), bits(own))
    assert linear.form(3).kernel == "vllm.marlin.awq"


def test_a_mixture_of_two_schemes_runs():
    a, b = (scheme_of(k, Problem.of(WEIGHT, 5), hardware.gpu("h100")) for k in ("vllm.awq_gemm", "vllm.marlin.awq"))
    mixture = assemble(replace(a, partial=b.partial), Problem.of(WEIGHT, 5))
    linear = Linear(WEIGHT, PATH, CPU, native=False)
    linear.follow(lambda m: mixture)
    y = linear.run(x(5))
    assert torch.equal(bits(y), bits(replay(mixture, x(5), WEIGHT)))
    assert not torch.equal(y, replay(made("vllm.awq_gemm", 5), x(5), WEIGHT))


def test_weights_and_programs_are_kept_for_recipes_seen_before(monkeypatch):
    decoded, compiled = [], []
    operands, compile_recipe = prepared.operands, prepared.compile_recipe
    prepared._programs.cache_clear()
    monkeypatch.setattr(prepared, "operands", lambda *a: decoded.append(1) or operands(*a))
    monkeypatch.setattr(prepared, "compile_recipe", lambda *a: compiled.append(1) or compile_recipe(*a))
    linear = Linear(WEIGHT, PATH, CPU, native=False)
    for _ in range(2):
        for kernel in ("vllm.awq_gemm", "vllm.marlin.awq"):
            linear.follow(lambda m, kernel=kernel: made(kernel, m))
            linear.run(x(3))
            first = linear.form(3)
            linear.follow(lambda m, kernel=kernel: made(kernel, m))
            assert linear.form(3) is first
    assert (len(decoded), len(compiled)) == (1, 2)  # one dequantisation rule, two orders of summation


def test_a_bias_goes_where_the_recipe_has_it():
    """A recipe with a bias adds the linear's inside; one without gets it behind, rounded once more."""
    linear = Linear(WEIGHT, Path("awq", "h100"), CPU, native=False, bias=BIAS)
    assert linear.problem.bias
    assert not Linear(WEIGHT, PATH, CPU, native=False).problem.bias
    inside = made("vllm.marlin.awq", 3, bias=True)
    linear.follow(lambda m: inside)
    assert torch.equal(bits(linear.run(x(3))), bits(replay(inside, x(3), WEIGHT, BIAS)))
    behind = made("vllm.awq_gemm", 3)
    linear.follow(lambda m: behind)
    want = round_once(replay(behind, x(3), WEIGHT).double() + BIAS.double(), torch.float16)
    for _ in range(2):
        assert torch.equal(bits(linear.run(x(3))), bits(want))
    linear.follow(None)
    assert torch.equal(bits(linear.run(x(3))), bits(want))  # awq_gemm is the path's own kernel


def test_atomics_follow_the_request_s_seed_as_the_path_does():
    weight = random_weight(1024, 256, 128, symmetric=True, seed=2, name="o")
    rows = random_activations(4, 1024, seed=1)
    own, other = (Linear(weight, Path("gptq", "h100"), CPU, native=False) for _ in range(2))
    other.follow(lambda m: made("vllm.gptq_gemm", m, weight=weight))
    found = [own.run(rows, seed) for seed in range(4)]
    for seed, y in enumerate(found):
        assert torch.equal(bits(other.run(rows, seed)), bits(y))
    assert any(not torch.equal(found[0], y) for y in found[1:])
    one = random_activations(1, 1024, seed=1)
    assert torch.equal(bits(other.run(one, 3)), bits(own.run(one, 3)))
