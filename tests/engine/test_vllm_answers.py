"""Rows from what vLLM returns: both forms, its extra token, equals, ids that it does not list."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.engine import vllm_answers
from qlab.engine.run import Request
from qlab.errors import QlabError
from tests.engine.vllm_like import FlatLogprobs, Logprob, listed

V = 40
PROMPT, NEW = (3, 7, 1, 9), (2, 5, 11)


def distributions() -> torch.Tensor:
    """float32 [rows, V] in steps that make equals, as float16 logits do; the first row has many at its top."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randint(0, 30, (len(PROMPT) + len(NEW) - 1, V), generator=g).float() / 8
    logits[0, [30, 4, 22, 17, 9, 35]] = 9.0
    return logits.log_softmax(1)


def answer(rows: torch.Tensor, k: int, flat: bool):
    """vLLM's prompt_logprobs and logprobs."""
    actual = [*PROMPT[1:], *NEW]
    places = [listed(row, token, k) for row, token in zip(rows, actual, strict=True)]
    split = len(PROMPT) - 1
    if flat:
        prompt, sampled = FlatLogprobs(), FlatLogprobs()
        prompt.add([], [])
        for i, (ids, values) in enumerate(places):
            (prompt if i < split else sampled).add(ids, values)
        return prompt, sampled
    dicts = [{t: Logprob(v) for t, v in zip(ids, values, strict=True)} for ids, values in places]
    return [None, *dicts[:split]], dicts[split:]


def reference(row: torch.Tensor, k: int) -> list[int]:
    return sorted(range(V), key=lambda t: (-float(row[t]), t))[:k]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("k", [5, 8])
def test_the_largest_come_first_and_smaller_ids_before_larger(flat, k):
    rows = distributions()
    asked = vllm_answers.how_many(Request((PROMPT,), len(NEW), top_k=k), V)
    assert asked == k + vllm_answers.MARGIN
    found = vllm_answers.scored(Request((PROMPT,), len(NEW), top_k=k), 0, *answer(rows, asked, flat), NEW, V)
    assert found.tokens.tolist() == [*PROMPT, *NEW]
    assert found.prompt == len(PROMPT)
    assert found.ids.tolist() == [reference(row, k) for row in rows]
    assert torch.equal(found.logprobs, rows.gather(1, found.ids))
    assert found.logprobs.dtype == torch.float32


def test_the_actual_token_does_not_push_itself_in():
    """An unlikely token stands first in vLLM's list; without a margin the k largest are still the k largest."""
    rows = torch.arange(V, dtype=torch.float32).repeat(len(PROMPT) + len(NEW) - 1, 1).log_softmax(1)
    found = vllm_answers.scored(Request((PROMPT,), len(NEW), top_k=4), 0, *answer(rows, 4, True), NEW, V)
    assert found.ids.tolist() == [[39, 38, 37, 36]] * 6


@pytest.mark.parametrize("flat", [True, False])
def test_wanted_ids_stand_behind_and_are_nan_where_they_are_not_listed(flat, monkeypatch):
    rows = distributions()
    wanted = torch.stack([row.argsort()[[0, -1, 20]] for row in rows])  # the least, the most probable, one between
    request = Request((PROMPT,), len(NEW), top_k=5, wanted=(wanted,))
    assert vllm_answers.how_many(request, V) == V
    whole = vllm_answers.scored(request, 0, *answer(rows, V, flat), NEW, V)
    assert torch.equal(whole.ids[:, 5:], wanted)
    assert torch.equal(whole.logprobs, rows.gather(1, whole.ids))
    part = vllm_answers.scored(request, 0, *answer(rows, 6, flat), NEW, V)
    assert part.logprobs[:, 5:].isnan().tolist()[-1][:2] == [True, False]
    known = ~part.logprobs.isnan()
    assert torch.equal(part.logprobs[known], whole.logprobs[known])
    assert bool(part.logprobs[:, 5].isnan().all())  # the least probable, which is nowhere the actual token


def test_a_larger_vocabulary_is_asked_for_more_than_the_top_k_where_ids_are_wanted():
    ask = Request((PROMPT,), 1, top_k=5)
    wanted = replace(ask, wanted=(torch.zeros((4, 1), dtype=torch.int64),))
    assert vllm_answers.how_many(ask, 32000) == 5 + vllm_answers.MARGIN
    assert vllm_answers.how_many(wanted, 32000) == vllm_answers.MORE
    assert vllm_answers.how_many(wanted, vllm_answers.SMALL) == vllm_answers.SMALL
    assert vllm_answers.how_many(replace(ask, top_k=0), 32000) == 32000
    assert vllm_answers.how_many(replace(ask, top_k=30), V) == V


@pytest.mark.parametrize("block", [1, 3 * V, 2**24])
def test_the_whole_vocabulary_comes_in_order_of_ids(block, monkeypatch):
    monkeypatch.setattr(vllm_answers, "BLOCK", block)
    rows = distributions()
    request = Request((PROMPT,), len(NEW), top_k=0)
    found = vllm_answers.scored(request, 0, *answer(rows, V, True), NEW, V)
    assert torch.equal(found.ids, torch.arange(V).repeat(len(rows), 1))
    assert torch.equal(found.logprobs, rows)


def test_what_is_missing_is_refused():
    rows = distributions()
    request = Request((PROMPT,), len(NEW), top_k=5)
    prompt, sampled = answer(rows, 10, True)
    with pytest.raises(QlabError, match="generated 2 tokens for prompt 0, not 3"):
        vllm_answers.scored(request, 0, prompt, sampled, NEW[:2], V)
    with pytest.raises(QlabError, match="did not take the tokens forced after prompt 0"):
        vllm_answers.scored(replace(request, forced=((2, 5, 12),)), 0, prompt, sampled, NEW, V)
    for broken in (([*answer(rows, 10, False)[0][:-1]], sampled), (prompt, answer(rows, 10, False)[1][1:])):
        with pytest.raises(QlabError, match=r"of 3 and 3 positions"):
            vllm_answers.scored(request, 0, *broken, NEW, V)
