"""Distances against a slow reading of their definition, and the cases in which log-probabilities cannot be paired."""

from __future__ import annotations

import math

import pytest
import torch

from qlab.engine.run import Scored
from qlab.errors import QlabError
from qlab.logprobs.distance import compare, distances, fingerprint, row_distances, sequence_distance

VOCABULARY, ROWS, PROMPT, K = 40, 11, 6, 5


def logits(seed=0, noise=0.0):
    x = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x + noise * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scored(x, k=K, wanted=None, tokens=None, prompt=PROMPT):
    logp = x.log_softmax(1).float()
    ids = logp.sort(dim=1, descending=True, stable=True).indices[:, :k] if k else torch.arange(VOCABULARY).expand(ROWS, -1)
    ids = ids if wanted is None else torch.cat([ids, wanted], 1)
    return Scored(torch.arange(ROWS + 1) if tokens is None else tokens, prompt, ids, logp.gather(1, ids))


def slow(a, b, k):
    """d_r from Python floats, one id at a time."""
    found = []
    for r in range(ROWS):
        other = dict(zip(b.ids[r].tolist(), b.logprobs[r].tolist(), strict=True))
        rest = min(b.logprobs[r, :K].tolist())
        mine = list(zip(a.ids[r, :k].tolist(), a.logprobs[r, :k].tolist(), strict=True))
        found.append(math.sqrt(sum((v - other.get(i, rest)) ** 2 for i, v in mine)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_against_the_definition(noise, k):
    a, b = scored(logits()), scored(logits(2, noise))
    torch.testing.assert_close(row_distances(a, b, top_k=k), slow(a, b, k), rtol=1e-14, atol=0)
    assert sequence_distance(a, b, top_k=k) == pytest.approx(float(slow(a, b, k).square().sum().sqrt()), rel=1e-14)


def test_the_generator_comes_first():
    a, b = scored(logits()), scored(logits(2, 3.0))
    assert not torch.equal(row_distances(a, b), row_distances(b, a))


def test_wanted_ids_are_looked_up_and_not_compared():
    a = scored(logits())
    b = scored(logits(2, 3.0), wanted=a.ids)
    exact = (
        logits().log_softmax(1).float().gather(1, a.ids).double() - logits(2, 3.0).log_softmax(1).float().gather(1, a.ids)
    ).norm(dim=1)
    torch.testing.assert_close(row_distances(a, b), exact, rtol=1e-14, atol=0)
    assert int(compare(a, b).unlisted.sum()) == 0 < int(compare(a, scored(logits(2, 3.0))).unlisted.sum())
    with pytest.raises(QlabError, match="lists one id twice"):
        compare(b, a)
    torch.testing.assert_close(row_distances(b, a, top_k=K), slow(scored(logits(2, 3.0)), a, K), rtol=1e-14, atol=0)


def test_what_an_engine_could_not_give_counts_as_not_listed():
    a = scored(logits())
    bare, b = scored(logits(2, 3.0)), scored(logits(2, 3.0), wanted=a.ids)
    b.logprobs[:, K:] = math.nan
    assert torch.equal(compare(a, b).unlisted, compare(a, bare).unlisted)
    assert torch.equal(row_distances(a, b), row_distances(a, bare))


def test_the_stand_in_is_no_wanted_value():
    a, b = scored(logits()), scored(logits(2, 3.0), k=K, wanted=None)
    low = logits(2, 3.0).log_softmax(1).float()
    wanted = torch.cat([b.ids[:, :1], low.argmin(1, keepdim=True)], 1)  # some candidate's ids, the last of them improbable
    with_wanted = scored(logits(2, 3.0), wanted=wanted)
    assert torch.equal(row_distances(a, with_wanted), row_distances(a, b))


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_the_whole_vocabulary_in_order_of_ids(k):
    whole, again = scored(logits(), k=0), scored(logits(2, 0.5), k=0)
    a = scored(logits(), k=k)
    assert torch.equal(row_distances(whole, again, top_k=k), row_distances(a, again, top_k=k))
    assert torch.equal(compare(whole, again, top_k=k).flips, whole.logprobs.argmax(1) != again.logprobs.argmax(1))
    assert fingerprint([whole], top_k=k) == fingerprint([a], top_k=k)


def test_the_counts():
    a, b = scored(logits()), scored(logits())
    assert compare(a, b).identical.all()
    assert not compare(a, b).flips.any()
    b.logprobs[3, 2] = torch.nextafter(b.logprobs[3, 2], torch.tensor(0.0))
    b.ids[4, [0, 1]] = b.ids[4, [1, 0]]
    b.logprobs[4, [0, 1]] = b.logprobs[4, [1, 0]]
    found = compare(a, b)
    assert (~found.identical).nonzero().flatten().tolist() == [3]
    assert found.flips.nonzero().flatten().tolist() == [4]
    assert float(found.largest.max()) == abs(float(a.logprobs[3, 2].double() - b.logprobs[3, 2].double())) > 0
    assert fingerprint([a]) != fingerprint([b])


def test_rows_of_the_prompt_and_generated_ones():
    a, b = scored(logits()), scored(logits(2, 0.3))
    d = slow(a, b, K)
    assert sequence_distance(a, b, "prompt") == pytest.approx(float(d[:PROMPT].norm()), rel=1e-14)
    assert sequence_distance(a, b, "generated") == pytest.approx(float(d[PROMPT:].norm()), rel=1e-14)
    with pytest.raises(QlabError, match="rows 'decoded' is none of all, prompt, generated"):
        sequence_distance(a, b, "decoded")


def test_tokens_that_split_apart():
    a = scored(logits())
    tokens = a.tokens.clone()
    tokens[-1] += 1
    b = scored(logits(2, 0.3), tokens=tokens)
    assert sequence_distance(a, b) == sequence_distance(a, b, "generated") == math.inf
    assert sequence_distance(a, b, "prompt") == pytest.approx(float(slow(a, b, K)[:PROMPT].norm()), rel=1e-14)
    with pytest.raises(QlabError, match="only a re-execution of the same tokens"):
        row_distances(a, b)
    tokens[PROMPT - 1] += 1
    with pytest.raises(QlabError, match="sequence 1: the two sequences begin with other prompts"):
        distances([a, a], [a, b])
    with pytest.raises(QlabError, match="2 sequences cannot be compared with 1"):
        distances([a, a], [a])


def test_rounding_as_an_api_does():
    a, b = scored(logits()), scored(logits(2, 1e-7))
    assert 0 < sequence_distance(a, b) < 1e-4
    assert sequence_distance(a, b, decimals=2) == 0
    assert compare(a, b, decimals=2).identical.all()
    assert fingerprint([a], decimals=2) == fingerprint([b], decimals=2) != fingerprint([a])
    c = scored(logits(2, 0.3))
    rounded = Scored(c.tokens, c.prompt, c.ids, (c.logprobs.double() * 1e4).round().div(1e4).float())
    assert sequence_distance(a, c, decimals=4) == pytest.approx(sequence_distance(a, rounded, decimals=4), rel=1e-9)


def test_infinite_and_nan_log_probabilities():
    a, b = scored(logits()), scored(logits())
    a.logprobs[2, -1] = b.logprobs[2, -1] = -math.inf
    assert torch.equal(row_distances(a, b), torch.zeros(ROWS, dtype=torch.float64))
    b.logprobs[5] = math.nan
    assert row_distances(a, b).isnan().nonzero().flatten().tolist() == [5]
    assert math.isnan(sequence_distance(a, b))


def test_more_than_is_listed():
    with pytest.raises(QlabError, match="top_k 6: a row lists 5 log-probabilities; name a number from 1 to 5"):
        row_distances(scored(logits()), scored(logits()), top_k=6)
