"""Recipes of coalitions: both ends are the kernels' own, a hybrid has exactly the chosen parts, each is told in words."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from qlab import hardware
from qlab.attribution import hybrids as module
from qlab.attribution.hybrids import Hybrids
from qlab.attribution.parts import CANDIDATES
from qlab.attribution.storage import RoundTrip
from qlab.backends import registry
from qlab.errors import QlabError, UnsupportedError
from qlab.recipes import assemble, recipe, scheme_of
from qlab.recipes.scheme import Scheme
from qlab.replay import native, replay
from tests.attribution.subjects import layer, model, paths

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "-")
A, B = "awq@a100", "awq_marlin@h100"


def between(subject, a, b, full=0):
    return Hybrids(subject, *paths(a, b), full)


@pytest.fixture
def planted(monkeypatch):
    """Change fields of a kernel's scheme on one GPU."""

    def plant(kernel, gpu, **fields):
        def moved(name, problem, on, *, check=True):
            found = real(name, problem, on, check=check)
            return replace(found, **fields) if (name, on.key) == (kernel, gpu) else found

        real = scheme_of
        module._scheme.cache_clear()
        monkeypatch.setattr(module, "scheme_of", moved)

    yield plant
    module._scheme.cache_clear()


@pytest.mark.parametrize(
    ("a", "b", "kernels"),
    [
        (A, B, ("vllm.awq_gemm", "vllm.marlin.awq")),
        ("awq_marlin@a100", "awq_marlin@h200:vllm", ("vllm.marlin.awq", "vllm.machete.awq")),
        ("vllm.awq_triton@l40s", "triton.awq_gemm.splitk@h100", ("vllm.awq_triton", "triton.awq_gemm.splitk")),
    ],
)
def test_the_ends_are_the_kernels_recipes(a, b, kernels):
    subject = layer(a, b)
    found = between(subject, a, b)
    problem = subject.problem(0, subject.calls[0])
    for path, kernel, parts in zip(paths(a, b), kernels, ((), found.parts), strict=True):
        assert found.choice(0, parts)("w", 3).hash == recipe(kernel, problem, hardware.gpu(path.gpu)).hash
    assert found.admissible(0)
    assert found.admissible((1 << len(found.parts)) - 1)
    swapped = [x for p in found.parts for x in p.attributes]
    same = [x for p in found.same for x in p.attributes]
    assert sorted(swapped + same) == sorted(x for c in CANDIDATES for x in c.attributes)


def test_a_hybrid_has_the_chosen_parts_and_no_others():
    """One part from Marlin, built by hand from the two schemes, gives the same bits as the hybrid does."""
    subject = layer(A, B)
    found, (call,) = between(subject, A, B), subject.calls
    problem = subject.problem(0, call)
    gemm, marlin = (scheme_of(k, problem, hardware.gpu(g)) for k, g in (("vllm.awq_gemm", "a100"), ("vllm.marlin.awq", "h100")))
    by_name = {p.name: p for p in found.parts}
    partial = by_name["rounding of partial sums"]
    made = found.choice(0, [partial])("w", 3)
    assert made.hash == assemble(replace(gemm, partial=marlin.partial), problem).hash
    (y,) = subject.outputs(0, found.choice(0, [partial]))
    assert torch.equal(y, replay(made, call.x, subject.weight(0, call)))
    both = [partial, by_name["tensor core: L, terms per sum"]]
    assert found.choice(0, both)("w", 3).hash == assemble(replace(gemm, partial=marlin.partial, terms=16), problem).hash


def test_planted_a_field_of_one_side_is_the_one_part(planted):
    pieces = scheme_of("vllm.marlin.awq", layer(A, A).problem(0, layer(A, A).calls[0]), hardware.gpu("a100"))
    rounded = scheme_of("vllm.marlin.awq.fp16", layer(A, A).problem(0, layer(A, A).calls[0]), hardware.gpu("a100"))
    assert pieces.partial != rounded.partial
    planted("vllm.marlin.awq", "a100", partial=rounded.partial)
    subject = layer("awq_marlin@h100", "awq_marlin@a100", k=1024)
    names = [p.name for p in between(subject, "awq_marlin@h100", "awq_marlin@a100").parts]
    assert "rounding of partial sums" in names
    assert not {"type of joins", "order of joins", "dequantisation rule"} & set(names)


def test_parts_and_unions_in_words():
    subject = layer("awq_marlin@a100", "awq_marlin@h100:vllm", m=1, k=4096, n=4096)
    found = between(subject, "awq_marlin@a100", "awq_marlin@h100:vllm")
    names, members = found.unions
    assert sorted(i for union in members for i in union) == list(range(len(found.parts)))
    assert "kernel (marlin.awq or machete.awq)" in names
    assert "tensor core (a100 or h100)" in names
    told = {p.name: found.texts(p) for p in found.parts}
    assert told["tensor core: F, fraction bits"] == ("F=24", "F=25")
    assert told["dequantisation rule"] == ("RN((q-z)*s)", "RN(q*s + RN(-s*z))")
    assert told["SM count (stripes and tile choice)"] == ("108 SMs", "132 SMs")
    first, second = found.packing()
    assert first == "marlin layout: gives back every bit"
    assert second.endswith("cannot be read back here")


def test_what_the_gpu_decides_is_told_in_a_model_of_many_layers_too():
    """Marlin's accumulator is fp16 on a T4 because of the T4, whether one layer is compared or many alike."""
    a, b = "awq_marlin@h100", "vllm.awq_triton@t4"
    for subject in (layer(a, b), model(a, b)[0]):
        found = between(subject, a, b)
        names, members = found.unions
        assert [found.parts[i].name for i in members[names.index("accumulator type")]] == ["accumulator type"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["one"], "one"),
        (["one", "two", "one"], "one or two"),
        (["one", "two", "three"], "one and 2 others, by layer"),
        (["cut: 4", "cut: 8"], "cut: 4 or 8"),
        (["cut: 4", "cut: 8", "cut: 2"], "cut: 4 and 2 others, by layer"),
        (["cut: 4", "whole: 8"], "cut: 4 or whole: 8"),
    ],
)
def test_layers_are_listed_once(texts, said):
    assert module._listed(texts) == said


def test_planted_a_packing_that_loses_a_code_is_refused(monkeypatch):
    fault = RoundTrip("vllm.awq_gemm", "awq", exact=False, text="k=1, n=2 holds code 3 instead of 4")
    real = module.packing_round_trip
    monkeypatch.setattr(module, "packing_round_trip", lambda name, w: fault if name == "vllm.awq_gemm" else real(name, w))
    hybrids = between(layer(A, B), A, B)
    with pytest.raises(QlabError, match=r"w: vllm.awq_gemm does not multiply the weight .* holds code 3 instead of 4"):
        hybrids.packing()
    monkeypatch.setattr(module, "packing_round_trip", real)
    assert hybrids.packing() == ("awq layout: gives back every bit", "marlin layout: gives back every bit")


def test_a_bias_is_marlin_s_part_alone(relative):
    folder = relative("qwen2")
    subject, _ = model("awq@a100", "awq_marlin@a100", folder)
    found = between(subject, "awq@a100", "awq_marlin@a100")
    (rule,) = [p for p in found.parts if "bias" in p.attributes]
    assert found.texts(rule) == ("no bias", "RN(y + bias) or no bias")
    qkv, o = (f"model.layers.0.self_attn.{n}_proj" for n in ("qkv", "o"))
    problem = subject.problem(0, next(c for c in subject.calls if c.linear == qkv))
    whole = found.choice(0, found.parts)
    assert whole(qkv, 4).hash == recipe("vllm.marlin.awq", problem, hardware.gpu("a100")).hash
    assert whole(qkv, 4).hash != recipe("vllm.marlin.awq", replace(problem, bias=False), hardware.gpu("a100")).hash
    for parts, inside in (((), False), ((rule,), True), (found.parts, True)):
        choice = found.choice(0, parts)
        for name, biased in ((qkv, inside), (o, False)):
            assert all((r.output.bias != "none") == biased for r in choice(name, 4).regions), (name, parts)
    plain, _ = model("awq@a100", "awq_marlin@a100", relative("qwen3"))
    assert not [p for p in between(plain, "awq@a100", "awq_marlin@a100").parts if "bias" in p.attributes]


@pytest.mark.parametrize(("b", "kernel"), [("gptq@h100", "vllm.gptq_gemm"), ("gptq_marlin@h100", "vllm.marlin.gptq")])
def test_kernels_of_other_weights_are_taken_for_each_state(b, kernel):
    """B's kernel for A's weight is what a hybrid of the recipes alone runs, though GPTQ's Marlin refuses AWQ's zero points."""
    subject, weights = model("awq@h100", b)
    found = between(subject, "awq@h100", b, weights.full)
    states = [found.pair(s, subject.calls[0]) for s in (0, weights.full)]
    assert {p.symmetric for _, _, p in found.pairs} == {False, True}
    assert [p.symmetric for _, _, p in states] == [False, True]
    for one, other, problem in states:
        assert isinstance(one, Scheme)
        assert one == scheme_of("vllm.awq_gemm", problem, hardware.gpu("h100"), check=False)
        assert other == scheme_of(kernel, problem, hardware.gpu("h100"), check=False)


@pytest.mark.parametrize(
    ("a", "b", "m", "said"),
    [
        ("awq@a100", "awq_marlin@a100", 300, r"awq@a100: w with 300 tokens: opaque: cuBLAS GEMM of torch.matmul; its order"),
        ("awq_marlin@a100", "vllm.awq_dequantize@h100", 3, "vllm.awq_dequantize@h100: w with 3 tokens: opaque: cuBLAS"),
        ("reference.float32@a100", "awq@a100", 3, "reference.float32@a100: w with 3 tokens: reference.float32 has no recipe"),
        (
            "awq@a100",
            "vllm.machete.awq@a100",
            3,
            "vllm.machete.awq@a100: w with 3 tokens: vllm.machete.awq does not run .* needs a Hopper GPU",
        ),
        ("awq@v100", "awq@a100", 3, "awq@v100: no kernel for K=512, N=256"),
    ],
)
def test_what_cannot_be_swapped_is_refused(a, b, m, said):
    with pytest.raises(UnsupportedError, match=said):
        between(layer(a, b, m=m), a, b)


def test_every_pair_of_kernels_with_a_recipe_has_a_way_or_a_sentence():
    names = [k.name for k in registry.kernels() if k.name.startswith(("vllm", "triton"))]
    subject = layer(A, B)
    found = []
    for name in names:
        for a, b in ((A, f"{name}@h100"), (f"{name}@a100", B)):
            with suppress(QlabError):
                between(subject, a, b).choice(0, ())
                found.append((a, b))
    assert len(found) > 12
    assert (A, "vllm.marlin.gptq@h100") not in found  # it holds no asymmetric weight
