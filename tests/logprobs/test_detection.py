"""The test keeps its level under a true null, has power, and no verdict says more than the bits do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qlab.engine.run import Scored
from qlab.errors import QlabError
from qlab.logprobs.detection import Verdict, detect, rejection
from qlab.logprobs.telling import auc, roc, tell, tokens_needed, tokens_resampled
from qlab.serial import from_plain, to_plain

TRIALS = 1500


def bound(level, trials=TRIALS):
    """Rejections of a test that keeps its level, but for one time in 10000."""
    return trials * level + 3.72 * math.sqrt(trials * level * (1 - level))


def distances_of(rng, kinds, prompts):
    """[1 + kinds, prompts]: the true candidate's distances first; ``near`` is as far, ``far`` 5 times, ``close`` 1.5 times."""
    common = rng.gamma(8, 1 / 8, prompts)  # hard prompts are hard for everyone
    factors = [1.0, *({"near": 1.0, "close": 1.5, "far": 5.0}[k] for k in kinds)]
    return np.stack([f * common * rng.gamma(20, 1 / 20, prompts) for f in factors])


@pytest.mark.parametrize(
    ("kinds", "prompts"),
    [(("near",), 7), (("near",) * 4, 8), (("near", "far", "far"), 7), (("close", "near"), 10), (("near", "near"), 16)],
)
def test_false_positives_of_a_true_null(kinds, prompts):
    rng = np.random.default_rng(prompts)
    trials = TRIALS if prompts <= 10 else 150
    p = np.array([rejection(distances_of(rng, kinds, prompts))[0] for _ in range(trials)])
    for level in (0.01, 0.05):
        assert (p <= level).sum() <= bound(level, trials)
    assert p.min() >= 0.5**prompts


def test_the_level_is_used_up_where_one_rival_is_as_near():
    rng = np.random.default_rng(0)
    p = np.array([rejection(distances_of(rng, ("near",), 7))[0] for _ in range(TRIALS)])
    exact = 6 / 128  # the largest multiple of 1/128 below 0.05
    assert abs((p <= 0.05).sum() - TRIALS * exact) <= bound(exact) - TRIALS * exact


def test_rivals_on_both_sides_do_not_shed_each_other():
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(TRIALS):
        e = rng.uniform(0.1, 0.3, 7) * rng.choice([-1, 1], 7)
        rejected += rejection(np.stack([np.ones(7), 1 + e, 1 - e]))[0] <= 0.01
    assert rejected <= bound(0.01)


def test_power_and_the_smallest_p():
    rng = np.random.default_rng(1)
    p = np.array([rejection(distances_of(rng, ("far", "close"), 12)) for _ in range(100)])
    assert (p[:, 1] <= 0.01).all()
    assert (p[:, 2] <= 0.01).mean() > 0.7
    assert (p[:, 0] > 0.01).all()
    for prompts in (6, 7):
        p = rejection(np.stack([np.full(prompts, 1.0), np.full(prompts, 1.2), *(np.full(prompts, 9.0) for _ in range(6))]))
        assert p[1:].max() == p[1] == 0.5**prompts  # however many candidates there are, and however far


def test_a_rival_not_far_enough_costs_one_more_sign_vector():
    p = rejection(np.stack([np.full(7, 1.0), np.full(7, 1.2), np.full(7, 2.0)]))
    assert p[1] == 2 / 128


def test_many_prompts_take_random_signs():
    d = np.stack([np.full(20, 1.0), np.full(20, 1.3)])
    assert rejection(d)[1] == 1 / 20001
    assert rejection(d[::-1])[1] == 1.0


def sequences(seed, noise, prompts=8, base=0.0, rows=6):
    found = []
    for s in range(prompts):
        x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(s)) - 3
        x = x + base + noise * torch.randn(rows, 5, generator=torch.Generator().manual_seed(1000 * seed + s))
        found.append(Scored(torch.arange(rows + 1) + s, 3, torch.arange(5, 10).expand(rows, 5), x))
    return tuple(found)


def test_where_all_bits_agree_the_answer_is_a_class():
    v = detect(
        sequences(1, 0.01),
        {"awq@h100": sequences(1, 0.01), "awq@h200": sequences(1, 0.01), "awq@a100": sequences(2, 0.01)},
    )
    assert (v.answer, v.classes) == ("consistent", (("awq@h100", "awq@h200"),))
    assert v.error_rate == 1 / 256 == v.smallest_p
    assert v.sentence == "consistent with class {awq@h100, awq@h200}; the others are rejected at p <= 0.0039"
    assert from_plain(Verdict, to_plain(v)) == v


def test_one_other_bit_is_no_agreement():
    trace = sequences(1, 0.01)
    trace[3].logprobs[2, 1] = torch.nextafter(trace[3].logprobs[2, 1], torch.tensor(0.0))
    v = detect(trace, {"a": sequences(1, 0.01), "b": sequences(2, 0.01)})
    assert (v.answer, v.classes, v.error_rate) == ("named", (("a",),), 0.01)
    assert v.candidates[0].equal_rows == 47 / 48


def test_a_trace_with_noise_of_its_own():
    trace = sequences(7, 0.01)
    v = detect(trace, {"right": sequences(8, 0.01), "wrong": sequences(9, 0.01, base=0.3), "twin": sequences(8, 0.01)})
    assert (v.answer, v.classes) == ("named", (("right", "twin"),))
    assert v.sentence == "class {right, twin}, at an error rate of 0.01"
    v = detect(trace, {"right": sequences(8, 0.01), "same noise": sequences(9, 0.01)})
    assert v.answer == "undecided"
    assert v.sentence == "undecided between {right} and {same noise}, at an error rate of 0.01"


def test_few_prompts_say_so():
    v = detect(sequences(7, 0.01, 6), {"right": sequences(8, 0.01, 6), "wrong": sequences(9, 0.01, 6, base=0.3)})
    assert v.answer == "undecided"
    assert v.sentence.endswith("; 6 prompts cannot give p < 0.01, 7 can")
    assert v.smallest_p == 1 / 64


def test_no_other_class():
    same = {"a": sequences(1, 0.01), "b": sequences(1, 0.01)}
    v = detect(sequences(1, 0.01), same)
    assert (v.answer, v.error_rate) == ("consistent", 1.0)
    assert "there is no other class to tell it from" in v.sentence
    assert detect(sequences(2, 0.01), same).answer == "undecided"


def test_rounding_joins_classes():
    trace, other = sequences(1, 1e-6), sequences(2, 1e-6)
    assert detect(trace, {"a": trace, "b": other}).classes == (("a",),)
    assert detect(trace, {"a": trace, "b": other}, decimals=2, top_k=3).classes == (("a", "b"),)


def test_bad_candidates_are_named():
    trace = sequences(1, 0.01)
    with pytest.raises(QlabError, match=r"candidate b re-executed 7 of the trace's 8 sequences"):
        detect(trace, {"b": sequences(1, 0.01, 7)})
    with pytest.raises(QlabError, match=r"candidate b: the two sequences hold other tokens"):
        detect(trace, {"b": trace[::-1]})
    bad = sequences(1, 0.01)
    bad[0].logprobs[0] = math.nan
    with pytest.raises(QlabError, match=r"candidate b: some of its log-probabilities or the trace's are not finite"):
        detect(trace, {"b": bad})
    with pytest.raises(QlabError, match="at least one candidate"):
        detect(trace, {})
    with pytest.raises(QlabError, match="alpha 0: name an error rate"):
        detect(trace, {"b": trace}, alpha=0)


def test_auc_is_mann_whitneys():
    rng = np.random.default_rng(0)
    neg, pos = rng.integers(0, 5, 12).astype(float), rng.integers(1, 7, 12).astype(float)
    slow = np.mean([1.0 if y > x else 0.5 if y == x else 0.0 for x in neg for y in pos])
    f = auc(neg, pos)
    assert f.value == pytest.approx(slow, rel=1e-15)
    assert f.low < slow < f.high <= 1
    r = roc(neg, pos)
    assert np.trapezoid(r.true, r.false) == pytest.approx(slow, rel=1e-12)
    assert (r.false[0], r.true[0], r.false[-1], r.true[-1]) == (0, 0, 1, 1)


def test_one_function_cannot_be_told_from_itself():
    for scores in (np.zeros(8), np.full(8, 0.3)):
        t = tell("m@h100", "m@h200", "m@h100", scores, scores, 50)
        assert (t.auc.value, t.auc.low, t.auc.high) == (0.5, 0.5, 0.5)
        assert t.tokens.value == t.tokens.low == math.inf
    varied = np.random.default_rng(0).gamma(2, 1, 25)
    t = tell("m@h100", "m@h200", "m@h100", varied, varied, 50)
    assert t.auc.value == 0.5
    assert t.tokens.value == math.inf == t.resampled.value


def test_tokens_needed_by_formula_and_by_resampling():
    rng = np.random.default_rng(3)
    neg, pos = rng.normal(1, 0.5, 400), rng.normal(1.5, 0.5, 400)
    z = 2.3263478740408408
    expected = math.ceil((z * (neg.std(ddof=1) + pos.std(ddof=1)) / (pos.mean() - neg.mean())) ** 2) * 10
    f = tokens_needed(neg, pos, 10)
    assert f.value == expected
    assert f.low <= expected <= f.high < 2 * expected
    e = tokens_resampled(neg, pos, 10, outer=20)
    assert 0.7 * expected < e.value < 1.4 * expected
    assert e.low <= e.value <= e.high
    assert tokens_needed(pos, neg, 10).value == math.inf  # nearer than the claimed path: never told by distance
    assert tokens_needed(np.zeros(7), np.ones(7), 10).value == 10
    assert tokens_resampled(neg[:19], pos[:19], 10) is None
