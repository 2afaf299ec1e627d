"""The largest log-probabilities, and draws: their order, their distribution, their repetition."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from qlab.engine.run import Sampling
from qlab.engine.sampling import draw, largest, uniform


def test_largest_first_and_the_smaller_id_of_equals():
    p = torch.tensor([[-1.0, -0.0, -2.0, 0.0, -1.0, float("-inf"), 1e-30], [-3.0, -3.0, -3.0, -3.0, -3.0, -3.0, -2.5]])
    assert largest(p, 7).tolist() == [[6, 1, 3, 0, 4, 2, 5], [6, 0, 1, 2, 3, 4, 5]]
    random = -torch.rand((20, 999), generator=torch.Generator().manual_seed(1)).mul(300).round().div(10)
    assert torch.equal(largest(random, 50), random.sort(descending=True, stable=True).indices[:, :50])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    logprobs = torch.tensor([0.02, 0.3, 0.08, 0.25, 0.05, 0.2, 0.1]).double().log()
    want = (logprobs / temperature).softmax(0)
    tokens = [draw(logprobs, Sampling(temperature, 3), s, position) for s in range(4) for position in range(1500)]
    counts = torch.bincount(torch.tensor(tokens), minlength=7)
    assert stats.chisquare(counts.numpy(), (want * len(tokens)).numpy()).pvalue > 1e-3
    off = want.roll(1) * 0.1 + want * 0.9
    assert stats.chisquare(counts.numpy(), (off * len(tokens)).numpy()).pvalue < 1e-3  # the test can tell


def test_the_number_that_decides_is_known():
    """Pinned: a change would draw other tokens from the same seed on another version."""
    assert uniform(0, 0, 1) == 0.5 * 2 * uniform(0, 0, 1)
    assert len({uniform(seed, s, p) for seed in range(5) for s in range(5) for p in range(40)}) == 1000
    assert stats.kstest([uniform(1, 2, p) for p in range(2000)], "uniform").pvalue > 1e-3


def test_ids_that_cannot_come():
    logprobs = torch.tensor([float("-inf"), 0.0, float("-inf")]).double()
    assert {draw(logprobs, Sampling(1.0, 1), 0, p) for p in range(200)} == {1}
