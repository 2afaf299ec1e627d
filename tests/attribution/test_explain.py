"""Why two paths differ: planted differences are found whole, parts add up exactly, and each number is what its hybrid gives."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import pytest
import torch

from qlab.attribution import explain as module
from qlab.attribution import hybrids as hybrids_module
from qlab.attribution.explain import OneWeight
from qlab.attribution.hybrids import Hybrids
from qlab.attribution.parts import selected
from qlab.attribution.result import LOGPROBS, MEASURES, OUTPUT, PROJECTION, Explained
from qlab.errors import QlabError, UnsupportedError
from qlab.recipes import scheme_of
from qlab.recipes.scheme import UNROUNDED
from qlab.replay import native
from qlab.report.explain import sentence
from qlab.serial import write_json
from tests.attribution.subjects import explained, layer, model, paths

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "-")
A, B = "awq@h100", "awq_marlin@h100"


@pytest.fixture(scope="module")
def of_model(awq):
    """awq_gemm against Marlin on the tiny model, prefill and one decoded token."""
    subject, weights = model(A, B, awq)
    return explained(subject, A, B, weights)


@pytest.fixture(scope="module")
def of_checkpoints():
    """awq against gptq on the shipped model, the weights as one factor."""
    a, b = "awq@h100", "gptq@h100"
    subject, weights = model(a, b, prompts=((5, 600, 7),), forced=1)
    return explained(subject, a, b, weights)


@pytest.fixture
def plant(monkeypatch):
    """Change fields of the schemes of one GPU."""

    def go(gpu, **fields):
        def moved(name, problem, on, *, check=True):
            found = real(name, problem, on, check=check)
            return replace(found, **fields) if on.key == gpu else found

        real = scheme_of
        hybrids_module._scheme.cache_clear()
        monkeypatch.setattr(hybrids_module, "scheme_of", moved)

    yield go
    hybrids_module._scheme.cache_clear()


def fractions(e):
    """Each measure's total, its parts as floats, and what is said to be left."""
    return [(Fraction(m.total), [Fraction(p.value) for p in m.parts], Fraction(m.residual)) for m in e.measures]


def test_parts_add_up_to_the_total_exactly(of_model, of_checkpoints, tmp_path):
    for e in (of_model, of_checkpoints):
        write_json(tmp_path / "e.json", e)
        again = Explained.read(tmp_path / "e.json")
        assert again == e
        assert [m.name for m in again.measures] == list(MEASURES)
        for total, parts, residual in fractions(again):
            assert len(parts) > 2
            assert total - sum(parts) == residual
            assert abs(residual) < Fraction(2) ** -48 * total
        for x in again.layers:
            assert sum(x.values.values()) == pytest.approx(x.relative_l2**2, rel=1e-12)
        assert sum(x.relative_l2**2 for x in again.layers) == pytest.approx(again.measure(OUTPUT).total, rel=1e-12)
        assert again.measure(PROJECTION).total == 1.0


def test_the_ends_of_an_answer(of_model, of_checkpoints):
    for e in (of_model, of_checkpoints):
        assert [(end.path, end.origin, end.differing_bits) for end in e.ends] == [(e.a, "replay", 0), (e.b, "replay", 0)]
    assert (of_model.rows, of_model.tokens) == (5, 5)
    assert {x.M for x in of_model.layers} == {5}
    assert {x.layer for x in of_model.layers} >= {"model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"}


def test_packing_is_exactly_nothing(of_model, of_checkpoints):
    for e in (of_model, of_checkpoints):
        (packing,) = [f for f in e.factors if f.category == "packing"]
        assert packing.same
        assert all(m.part("packing") is None for m in e.measures)
        assert "gives back every bit" in packing.a
        assert sentence(e).endswith("packing contributes 0.") or "packing contributes 0. " in sentence(e)


def test_between_two_checkpoints_the_weights_dominate(of_checkpoints):
    weights = of_checkpoints.factors[0]
    assert (weights.name, weights.category, weights.a, weights.b) == ("weights", "weights", "awq", "gptq")
    assert of_checkpoints.measure(OUTPUT).part("weights").share > 0.99
    assert of_checkpoints.measure(LOGPROBS).part("weights").share > 0.9
    assert "comes from weights (awq in " in sentence(of_checkpoints)
    (note,) = of_checkpoints.notes
    assert note.startswith("the weights (relative L2 0.162, 65.7% of codes differ")
    assert note.endswith("quantising again was not asked for")


def test_each_factor_alone_is_its_own_hybrid(of_checkpoints):
    """B's weights under A's kernel, and each part of B's kernel over A's weights, replayed by themselves."""
    a, b = "awq@h100", "gptq@h100"
    subject, weights = model(a, b, prompts=((5, 600, 7),), forced=1)
    found = Hybrids(subject, *paths(a, b), weights.full)
    y = subject.outputs(0, found.choice(0, ()))
    norms = [float(p.double().square().sum()) for p in y]
    assert len(of_checkpoints.factors) > 1 + len(found.parts)
    for part, state, chosen in (("weights", weights.full, ()), *((p.name, 0, (p,)) for p in found.parts)):
        alone = of_checkpoints.measure(OUTPUT).part(part).alone
        if state == 0 and not found.admissible(1 << found.parts.index(chosen[0])):
            assert alone is None
            continue
        other = subject.outputs(state, found.choice(state, chosen))
        apart = [float((q.double() - p.double()).square().sum()) for p, q in zip(y, other, strict=True)]
        assert alone == pytest.approx(sum(d / n for d, n in zip(apart, norms, strict=True)), rel=1e-9), part


@pytest.mark.parametrize("path", ["awq@a100", "gptq@h100"])
def test_a_path_differs_from_itself_in_nothing(path, awq, gptq):
    subject, weights = model(path, path, awq if "awq" in path else gptq)
    e = explained(subject, path, path, weights)
    assert [(m.total, m.parts, m.residual) for m in e.measures] == [(0.0, (), 0.0)] * 3
    assert sentence(e) == f"{path} and {path} are equal, bit for bit; packing contributes 0."
    assert e.evaluations == 1
    assert all(f.same for f in e.factors)
    assert not any(x.differing for x in e.layers)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"partial": UNROUNDED}, "rounding of partial sums"),
        ({"type": "fp16"}, "type of joins"),
        ({"terms": 8}, "tensor core: L, terms per sum"),
        ({"weights": "fused"}, "dequantisation rule"),
        ({"sms": 7, "partial": UNROUNDED}, "rounding of partial sums"),
    ],
)
def test_planted_one_field_of_b_gets_all(plant, fields, part):
    """An H200 is an H100 to every kernel; with one field changed on it, that part is all of the difference.

    awq_gemm's cut of K asks for no number of SMs, so that another number of them is no part.
    """
    a, b = "awq@h100", "awq@h200"
    subject = layer(a, b, m=64, k=1024)
    plain = explained(subject, a, b)
    assert plain.measure(OUTPUT).total == 0
    plant("h200", **fields)
    e = explained(subject, a, b)
    assert [f.name for f in e.factors if not f.same] == [part]
    for m in e.measures:
        assert m.total > 0
        assert [(p.factor, p.share, p.alone, p.value) for p in m.parts] == [(part, 1.0, m.total, m.total)]
    assert sentence(e).startswith("100% of the difference in the layers' outputs comes from")
    assert sentence(e).endswith("; packing contributes 0.")
    assert e.evaluations == 2


def test_planted_two_fields_share_it(plant):
    """Of two, each has half of what it does alone and of what the total loses without it."""
    a, b = "awq@h100", "awq@h200"
    plant("h200", type="fp16", terms=8)
    e = explained(layer(a, b, m=64, k=1024), a, b)
    assert {f.name for f in e.factors if not f.same} == {"type of joins", "tensor core: L, terms per sum"}
    m = e.measure(OUTPUT)
    for p in m.parts:
        assert p.value == pytest.approx((p.alone + p.removed) / 2, rel=1e-12)
        assert p.alone > 0
    assert m.part("type of joins").share > 0.9
    (i,) = m.interactions
    assert i.value == pytest.approx(m.total - sum(p.alone for p in m.parts), rel=1e-9)


def test_every_share_is_the_mean_over_orders_of_swaps():
    """By hand: each coalition's output replayed alone, all orders that keep a union's members together averaged."""
    a, b = "awq@h100", "awq_marlin@a100"
    subject = layer(a, b, m=4, k=1024)
    e = explained(subject, a, b)
    found = Hybrids(subject, *paths(a, b), 0)
    (y,) = subject.outputs(0, found.choice(0, ()))
    count = len(found.parts)

    def value(mask):
        (other,) = subject.outputs(0, found.choice(0, selected(found.parts, mask)))
        return Fraction(float((other.double() - y.double()).square().sum() / y.double().square().sum()))

    known, members = {}, found.unions.members
    shares, orders = [Fraction(0)] * count, 0
    for outer in permutations(members):
        for order in inner(outer):
            masks = [sum(1 << i for i in order[:n]) for n in range(count + 1)]
            if not all(map(found.admissible, masks)):
                continue
            orders += 1
            for n, i in enumerate(order):
                step = [known.setdefault(m, value(m)) if m not in known else known[m] for m in masks[n : n + 2]]
                shares[i] += step[1] - step[0]
    m = e.measure(OUTPUT)
    assert orders > 20
    assert [p.factor for p in m.parts] == [p.name for p in found.parts]
    for part, share in zip(m.parts, shares, strict=True):
        assert part.value == pytest.approx(float(share / orders), rel=1e-9, abs=1e-12 * m.total)
    for i, part in enumerate(m.parts):
        assert (part.alone is None) == (not found.admissible(1 << i))
        assert part.alone is None or part.alone == pytest.approx(float(value(1 << i)), rel=1e-9)


def inner(unions):
    """Every order of the members of unions that stand in a fixed order."""
    if not unions:
        yield ()
        return
    for first in permutations(unions[0]):
        for rest in inner(unions[1:]):
            yield first + rest


def test_hybrids_of_equal_recipes_run_once(monkeypatch):
    subject = layer("awq@a100", B, m=1, k=256)
    ran = []
    outputs = subject.outputs
    monkeypatch.setattr(subject, "outputs", lambda *a: ran.append(1) or outputs(*a))
    e = explained(subject, "awq@a100", B)
    assert e.evaluations + len(e.ends) == len(ran)
    assert e.evaluations < 1 << len([f for f in e.factors if not f.same])


def test_decoded_tokens_are_attributed_with_their_own_recipes(awq, monkeypatch):
    """Tokens that are fed one by one are rows of M = 1, whose recipe a hybrid asks for by that number."""
    subject, weights = model(A, B, awq, forced=4)
    asked = set()
    choice = Hybrids.choice
    monkeypatch.setattr(Hybrids, "choice", lambda *a: lambda name, m: asked.add(m) or choice(*a)(name, m))
    e = explained(subject, A, B, weights)
    assert {c.M for c in subject.calls} == asked == {2, 1}
    assert {x.M for x in e.layers} == {5}
    assert [end.differing_bits for end in e.ends] == [0, 0]


def test_a_bias_added_elsewhere_is_a_factor(relative):
    a, b = "awq@a100", "awq_marlin@a100"
    subject, weights = model(a, b, relative("qwen2"))
    e = explained(subject, a, b, weights)
    assert [end.differing_bits for end in e.ends] == [0, 0]
    (rule,) = [f for f in e.factors if f.category == "output rule"]
    part = e.measure(OUTPUT).part(rule.name)
    assert not rule.same
    assert (rule.a, rule.b) == ("no bias", "RN(y + bias) or no bias")
    assert part is not None
    assert {x.layer for x in e.layers if x.values[rule.name]} <= {x.layer for x in e.layers if "qkv" in x.layer}


def test_sampled_orders_have_intervals_and_repeat(awq):
    a, b = "awq@a100", "awq_marlin@h100"
    subject, weights = model(a, b, awq, forced=1, prompts=((5, 600, 7),))
    one, again, other = (explained(subject, a, b, weights, samples=4, seed=s) for s in (0, 0, 1))
    assert [m.parts for m in one.measures] == [m.parts for m in again.measures]
    assert [m.parts for m in one.measures] != [m.parts for m in other.measures]
    for m in one.measures:
        assert m.samples == 4
        assert Fraction(m.total) - sum(Fraction(p.value) for p in m.parts) == Fraction(m.residual)
        assert all(p.low <= p.value <= p.high for p in m.parts)


def test_intervals_are_over_prompts(awq):
    """With three prompts each part has the spread of its share over resampled prompts; with one prompt there is none."""
    prompts = ((5, 600, 7, 1900), (12, 40, 900, 3), (77, 31, 2000, 8))
    subject, weights = model(A, B, awq, forced=1, prompts=prompts)
    e = explained(subject, A, B, weights)
    alone = []
    for p in prompts:
        one, same = model(A, B, awq, forced=1, prompts=(p,))
        alone.append(explained(one, A, B, same))
    of_one = [x.measure(LOGPROBS) for x in alone]
    assert all(p.low is None and p.high is None for m in of_one for p in m.parts)
    m = e.measure(LOGPROBS)
    slack = 1e-12 * m.total
    assert m.total == pytest.approx(sum(x.total for x in of_one), rel=1e-12)
    for part in m.parts:
        shares = [x.part(part.factor).share for x in of_one]
        assert part.value == pytest.approx(sum(x.part(part.factor).value for x in of_one), rel=1e-9, abs=slack)
        assert min(shares) * m.total - slack <= part.low <= part.value <= part.high <= max(shares) * m.total + slack
    assert all(p.low <= p.value <= p.high for p in e.measure(OUTPUT).parts)
    assert all(p.low is None for p in e.measure(PROJECTION).parts)


def test_progress_reaches_its_end(awq):
    seen = []
    subject, weights = model(A, B, awq, forced=1, prompts=((5, 600),))
    explained(subject, A, B, weights, advance=lambda done, of: seen.append((done, of)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {of for _, of in seen} == {len(seen)}


def test_planted_a_hybrid_that_is_not_finite_names_its_coalition(monkeypatch):
    subject = layer(A, B)
    outputs, seen = subject.outputs, []

    def third(*arguments):
        seen.append(1)
        return [y * (torch.inf if len(seen) == 3 else 1) for y in outputs(*arguments)]

    monkeypatch.setattr(subject, "outputs", third)
    with pytest.raises(QlabError, match=r"of the coalition .* is (inf|nan), not a finite number"):
        explained(subject, A, B)


def test_refusals():
    silent = layer(A, B)
    silent.calls = (replace(silent.calls[0], x=torch.zeros_like(silent.calls[0].x)),)
    with pytest.raises(UnsupportedError, match="A's output of w is zero throughout"):
        explained(silent, A, B)
    with pytest.raises(UnsupportedError, match="its order of summation is not known"):
        explained(layer(A, B, m=300), A, B)
    with pytest.raises(QlabError, match="1 samples leave no interval"):
        explained(layer(A, B), A, B, samples=1)


def test_one_weight_has_nothing_to_mix():
    nothing = OneWeight()
    assert (nothing.full, nothing.factors, nothing.notes) == (0, (), ())
    assert nothing.admissible(0)
    assert not nothing.admissible(1)
    assert nothing.directory(0) == nothing.home


def test_a_union_that_cannot_be_walked_is_dissolved_and_said(monkeypatch):
    """Were the parts of a kernel only to be swapped around the hardware's, they stand no more together, and a note says so."""
    a, b = "awq_marlin@a100", "awq_marlin@h100:vllm"
    subject = layer(a, b, m=1, k=1024)
    found = Hybrids(subject, *paths(a, b), 0)
    (kernel,) = [u for name, u in zip(*found.unions, strict=True) if name.startswith("kernel")]
    alone = next(i for i in range(len(found.parts)) if i not in kernel)
    first, *rest = kernel

    def around(mask):  # one of the kernel's parts, then the other part, then the rest
        if any(mask >> i & 1 for i in rest):
            return bool(mask >> first & 1 and mask >> alone & 1)
        return not mask >> alone & 1 or bool(mask >> first & 1)

    monkeypatch.setattr(hybrids_module.p, "admissible", lambda *a: around)
    e = module.explain(subject, *paths(a, b), OneWeight(), where="here")
    assert len(e.notes) == 1
    assert e.notes[0].endswith("cannot be swapped one after the other")
