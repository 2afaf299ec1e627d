"""Error rates: exact figures against scipy and by simulation, the fitted law, the rule and its verdict, the claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from qlab.errors import QlabError, UnsupportedError
from qlab.inputs import random_activations, random_weight
from qlab.lab.run import SAME
from qlab.lab.run import Layer as LabLayer
from qlab.logprobs.row_bench import Layer
from qlab.logprobs.row_counts import Counted, Rule, calibrate, verify_by_kernels
from qlab.logprobs.row_errors import (
    CALIBRATION,
    ERROR,
    Spread,
    crossing,
    exclusion_rows,
    fit,
    lower,
    majority_error,
    majority_rows,
    upper,
)
from qlab.logprobs.row_predictions import Predictions, predict
from qlab.logprobs.row_rates import ALL, Rate, measure
from qlab.logprobs.rows import verify_by_replay
from qlab.serial import from_plain, to_plain
from tests.logprobs.row_cases import LAYERS, activations, flipped, paths, recorded

PAIR = ("awq", "awq_marlin")


def test_bounds_are_clopper_and_pearsons() -> None:
    for hits, trials in ((0, 50), (3, 40), (39, 40)):
        ours = stats.binomtest(hits, trials).proportion_ci(1 - 2e-3, "exact")
        assert upper(hits, trials, 1e-3) == pytest.approx(ours.high)
        assert lower(hits, trials, 1e-3) == pytest.approx(ours.low)
    assert (upper(5, 5), lower(0, 5), upper(0, 0), lower(0, 0)) == (1, 0, 1, 0)
    assert upper(0, 768) == pytest.approx(1 - CALIBRATION ** (1 / 768))


def test_a_bound_is_too_low_as_seldom_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = rng.binomial(60, 0.07, 4000)
    missed = np.mean([upper(int(h), 60, 0.05) < 0.07 for h in hits])
    assert 0.005 < missed <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_majorities_err_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    for wrong, rows in ((0.3, 9), (0.3, 10), (0.1, 3), (0.45, 1)):
        seen = (2 * rng.binomial(rows, wrong, 40_000) >= rows).mean()
        assert seen == pytest.approx(majority_error(wrong, rows), abs=0.01)
    for wrong in (1e-3, 0.02, 0.1, 0.3, 0.4):
        n = int(majority_rows(wrong, 1e-6))
        assert n % 2 == 1
        assert majority_error(wrong, n) <= 1e-6
        assert n == 1 or majority_error(wrong, n - 2) > 1e-6
    assert majority_rows(1e-9, 1e-6) == 1
    assert majority_rows(0.5, 1e-6) == math.inf


def test_rows_that_exclude() -> None:
    rng = np.random.default_rng(3)
    n = int(exclusion_rows(0.7, 1e-2))
    assert 0.7**n <= 1e-2 < 0.7 ** (n - 1)
    assert (rng.random((50_000, n)) < 0.7).all(1).mean() < 0.013
    assert (exclusion_rows(1.0, 1e-6), exclusion_rows(0.0, 1e-6)) == (math.inf, 1)


def test_the_law_finds_its_own_parameters() -> None:
    rng = np.random.default_rng(4)
    for mean, rho in ((0.35, 0.01), (0.001, 0.002), (0.35, 0.0)):
        p = rng.beta(mean * (1 / rho - 1), (1 - mean) * (1 / rho - 1), 1500) if rho else mean
        found = fit(rng.binomial(800, p, 1500), 800)
        assert found.mean == pytest.approx(mean, rel=0.1)
        assert found.correlation == pytest.approx(rho, rel=0.3, abs=1e-3)
    assert fit([0] * 100, 512) == Spread(512, upper(0, 51_200), 0.0)
    assert fit([512] * 100, 512).mean == pytest.approx(1, abs=1e-3)


def test_tails_are_scipys() -> None:
    law = Spread(100, 0.2, 0.05)
    a, b = 0.2 * 19, 0.8 * 19
    assert law.at_least(30) == pytest.approx(stats.betabinom.sf(29, 100, a, b))
    assert law.at_most(5) == pytest.approx(stats.betabinom.cdf(5, 100, a, b))
    assert (Spread(9, 0.0, 0.0).at_least(1), Spread(9, 0.0, 0.0).at_least(0)) == (0, 1)


def test_crossing_bounds_the_votes_that_go_wrong() -> None:
    rng = np.random.default_rng(5)
    one, other = Spread(60, 0.15, 0.02), Spread(60, 0.4, 0.03)
    draw = [
        rng.binomial(60, rng.beta(s.mean * (1 / s.correlation - 1), (1 - s.mean) * (1 / s.correlation - 1), 50_000))
        for s in (one, other)
    ]
    seen = (draw[0] >= draw[1]).mean()
    assert 0 < seen < crossing(one, other) < 20 * seen
    with pytest.raises(ValueError, match="not of one linear"):
        crossing(one, Spread(61, 0.5, 0.0))


@pytest.fixture(scope="module")
def rules() -> dict[str, Rule]:
    return {gpu: calibrate(activations(64), PAIR, gpu, ("a100", "h100"), 16) for gpu in ("a100", "h100")}


def test_the_claim_by_kernels(rules: dict[str, Rule]) -> None:
    """awq_gemm from Marlin, generated on A100 or H100, verified on either, with at most 32 rows below 1e-6."""
    for rule in rules.values():
        assert len(rule.told) == 4
        assert all(t.wrong == 0 and t.rows == 768 for t in rule.told)
        assert rule.rows_needed <= 32
        assert rule.rows_needed_sharp <= rule.rows_needed
        assert CALIBRATION + majority_error(rule.bound, 32) < ERROR
        assert from_plain(Rule, to_plain(rule)) == rule


@pytest.mark.parametrize("generator", ["awq@a100", "awq@h100", "awq_marlin@a100", "awq_marlin@h100"])
def test_the_generators_method_is_named(generator: str, rules: dict[str, Rule]) -> None:
    rows = recorded(generator)
    for rule in rules.values():
        found = verify_by_kernels(rows, LAYERS, rule)
        assert found.answer == generator.split("@")[0]
        assert found.error < ERROR
        assert found.origin == "replay"
        own, other = sorted(found.counts, key=lambda c: c.share)
        assert own.votes == 24
        assert own.share == pytest.approx(own.predicted[generator], abs=1e-3)
        assert other.share == pytest.approx(other.predicted[generator], abs=0.03)
        assert from_plain(Counted, to_plain(found)) == found
    few = verify_by_kernels(rows[:3], LAYERS, rules["h100"])
    assert few.answer == ""
    assert few.error > ERROR
    assert "9 are needed" in few.sentence


def test_a_noisy_generator_is_still_named(rules: dict[str, Rule]) -> None:
    """A few flipped bits, as another GPU would have them, turn no vote; rows of the other method do."""
    rows = [flipped(r, 1) for r in recorded("awq_marlin@a100")]
    assert verify_by_kernels(rows, LAYERS, rules["h100"]).answer == "awq_marlin"
    mixed = recorded("awq@a100")[:12] + recorded("awq_marlin@a100")[12:]
    found = verify_by_kernels(mixed, LAYERS, rules["h100"])
    assert found.answer == ""
    assert [c.votes for c in found.counts] == [12, 12]


def test_refusals(rules: dict[str, Rule]) -> None:
    rows = recorded("awq@a100")
    with pytest.raises(QlabError, match="cannot be counted in a digest"):
        verify_by_kernels(recorded("awq@a100", whole=False), LAYERS, rules["h100"])
    with pytest.raises(QlabError, match="one recorded row"):
        verify_by_kernels([], LAYERS, rules["h100"])
    with pytest.raises(UnsupportedError, match="do not run natively here"):
        verify_by_kernels(rows, LAYERS, rules["h100"], native=True)
    with pytest.raises(QlabError, match="two methods"):
        calibrate(activations(4), ("awq", "awq"), "h100", ("a100",), 4)
    with pytest.raises(UnsupportedError, match="opaque"):
        calibrate(activations(4), PAIR, "h100", ("a100",), 300)
    with pytest.raises(QlabError, match="no two paths"):
        measure(activations(4), paths("awq@a100 awq@h100"), [300])


def all_rates(found: tuple[Rate, ...]) -> dict[tuple[str, str], Rate]:
    return {(r.generator, r.candidate): r for r in found if r.linear == ALL}


def test_predicted_rates_and_the_claim_by_replay() -> None:
    found, refused = measure(activations(64), paths("awq@a100 awq_marlin@a100 awq@h100 awq_marlin@h100 awq_marlin@h200"), [16])
    assert refused == {}
    rates = all_rates(found)
    assert len(rates) == 10
    for (a, b), r in rates.items():
        assert (r.rows, r.elements) == (768, 64 * 3 * (1024 + 512 + 2048 + 512))
        assert r.low <= r.share <= r.high
        if {a, b} == {"awq_marlin@h100", "awq_marlin@h200"}:
            assert (r.same, r.differing, r.needed, r.needed_bound) == (True, 0, math.inf, math.inf)
        elif a.split("@")[0] != b.split("@")[0]:
            assert 0.33 < r.share < 0.36
            assert r.passed == 0
            assert r.needed_bound <= 32
        else:
            assert 1e-4 < r.share < 1e-3
            assert 20 < r.needed < r.needed_bound < 100
            assert r.needed == math.ceil(math.log(1e-6) / math.log(r.passed / r.tried))
    kinds = {r.linear for r in found}
    assert kinds == {ALL, "qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    one = [r for r in found if (r.generator, r.candidate) == ("awq@a100", "awq@h100") and r.linear != ALL]
    assert sum(r.differing for r in one) == rates["awq@a100", "awq@h100"].differing
    assert sum(r.passed for r in one) == rates["awq@a100", "awq@h100"].passed


def test_a_wrong_candidate_survives_as_often_as_predicted() -> None:
    """All rows of a run on another text than the calibration's: awq@h100 passes as many of awq@a100's as the rate says."""
    t = verify_by_replay(recorded("awq@a100", 0), LAYERS, paths("awq@h100")).candidates[0]
    assert t.rows == len(recorded("awq@a100", 0))
    one = t.equal / t.rows
    (rate,) = [r for r in measure(activations(48), paths("awq@a100 awq@h100"), [16])[0] if r.linear == ALL]
    assert lower(rate.passed, rate.tried, 1e-4) < one < upper(rate.passed, rate.tried, 1e-4)


def test_atomics_in_the_rates() -> None:
    """A path with atomics has a rate with itself, passes by reach, and excludes by equality where it generated."""
    layers = [LabLayer("x", {SAME: random_weight(512, 64, symmetric=True)}, {SAME: random_activations(24, 512)})]
    rates = all_rates(measure(layers, paths("gptq@a100 gptq@h100 gptq_marlin@h100"), [8])[0])
    assert rates["gptq@a100", "gptq@a100"].share > 0.2
    assert rates["gptq@a100", "gptq@a100"].passed == 24
    assert rates["gptq@a100", "gptq@h100"].passed == 24
    assert rates["gptq@a100", "gptq_marlin@h100"].passed == 0
    assert rates["gptq_marlin@h100", "gptq@a100"].passed == 0
    assert not rates["gptq@a100", "gptq@a100"].same


def test_methods_of_two_checkpoints_are_told_too() -> None:
    rule = calibrate(activations(24, "both"), ("awq", "gptq_marlin", "gptq"), "h100", ("a100",), 16)
    wrong = {t.generator: t.wrong for t in rule.told}
    assert (wrong["awq@a100"], wrong["gptq_marlin@a100"]) == (0, 0)
    assert 0 < wrong["gptq@a100"] < 20  # its atomics differ from themselves in as many elements as from Marlin, now and then
    assert rule.bound > 0.03
    counts = verify_by_kernels(recorded("gptq@a100"), LAYERS, rule).counts
    assert max(counts, key=lambda c: c.votes).method == "gptq"


def test_one_function_is_never_told_from_itself() -> None:
    """The AWQ and the GPTQ form of Marlin on one weight: every row is a tie, and a tie is an error."""
    weight, x = random_weight(512, 64, symmetric=True), random_activations(20, 512)
    methods = ("vllm.marlin.awq", "vllm.marlin.gptq")
    rule = calibrate([LabLayer("l", {SAME: weight}, {SAME: x})], methods, "h100", ("h100",), 4)
    assert (rule.bound, rule.rows_needed, rule.rows_needed_sharp) == (1, math.inf, math.inf)
    rows = recorded("awq@a100")[:1]
    from dataclasses import replace

    own = [replace(r, x=x[0], y=x[0][:64]) for r in rows]
    found = verify_by_kernels(own, lambda path, linear: Layer(weight), rule)
    assert (found.answer, found.ties) == ("", 1)


def test_predictions_survive_json() -> None:
    layers = [LabLayer("x", {SAME: random_weight(512, 128, symmetric=True)}, {SAME: random_activations(16, 512)})]
    made = predict(lambda: layers, ["awq", "awq_marlin"], ["a100", "h100"], [8, 300])
    assert from_plain(Predictions, to_plain(made)) == made
    assert [r.M for r in made.rules] == [8, 8]
    assert any("opaque" in reason for reason in made.refused.values())
