"""Sampled splits: uniform orders, unbiased values, honest intervals."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from qlab.attribution import lattice, sampling
from qlab.attribution.game import Game, attribute
from qlab.errors import QlabError

NEEDS = [(3, 0), (4, 0), (4, 1)]


def precedence(mask):
    return all(not mask >> i & 1 or mask >> j & 1 for i, j in NEEDS)


def random_values(n, seed):
    """Mostly additive with pairwise and wild parts, as divergences are."""
    generator = np.random.default_rng(seed)
    one, two = generator.gamma(1.0, size=n), generator.normal(scale=0.2, size=(n, n))
    bits = np.array([[m >> i & 1 for i in range(n)] for m in range(1 << n)])
    return bits @ one + np.einsum("mi,ij,mj->m", bits, np.triu(two, 1), bits) + generator.normal(scale=0.05, size=1 << n)


@pytest.mark.parametrize("counted", [True, False])
def test_draws_are_uniform_over_admissible_orders(counted):
    game = Game(tuple("ABCDE"), ((1, 2),), precedence)
    every = {
        o for o in permutations(range(5)) if abs(o.index(1) - o.index(2)) == 1 and all(map(precedence, sampling.prefixes(o)))
    }
    draws = sampling.draw(6000, 1, game.masks, precedence, game.lattice() if counted else None)
    counts = Counter(orders[0] for orders in draws)
    assert set(counts) == every
    expected = 6000 / len(every)
    chi_square = sum((c - expected) ** 2 / expected for c in counts.values())
    assert chi_square < 1.8 * len(every)
    assert all(order in every for orders in draws for order in orders)


def test_reverses_are_drawn_where_they_are_admissible():
    free = sampling.draw(5, 0, Game(tuple("ABC")).masks, lambda m: True, None)
    assert all(second == first[::-1] for first, second in free)
    chain = Game(tuple("ABC"), admissible=lambda m: m in (0, 1, 3, 7))
    assert set(sampling.draw(5, 0, chain.masks, chain.admissible, chain.lattice())) == {((0, 1, 2),)}


def test_intervals_cover_the_exact_values():
    """Ten factors; over twenty seeds 95% intervals cover about 95% of 200 values, and none of the ranges is idle."""
    n = 10
    game = Game(tuple("ABCDEFGHIJ"), ((5, 6, 7),), precedence)
    v = random_values(n, 3)
    exact = attribute(game, lambda m: {"v": v[m]})["v"]
    covered = 0
    for seed in range(20):
        found = attribute(game, lambda m: {"v": v[m]}, samples=40, seed=seed)["v"]
        assert sum(found.values) == found.total == exact.total
        assert found.samples == 40
        covered += sum(low <= float(x) <= high for (low, high), x in zip(found.intervals, exact.values, strict=True))
        assert all(low < high for low, high in found.intervals)
    assert 180 <= covered < 200
    assert attribute(game, lambda m: {"v": v[m]}, samples=40, seed=0)["v"].values != found.values


def test_the_mean_over_many_draws_is_the_exact_value():
    """Some orders here have an admissible reverse and some do not; interactions, too, converge."""
    allowed = set(range(16)) - {0b0010, 0b1100}
    game = Game(tuple("ABCD"), admissible=allowed.__contains__)
    v = random_values(4, 5)
    exact = attribute(game, lambda m: {"v": v[m]})["v"]
    draws = sampling.draw(50, 0, game.masks, game.admissible, game.lattice())
    assert {len(d) for d in draws} == {1, 2}
    found = attribute(game, lambda m: {"v": v[m]}, samples=4000)["v"]
    for low_high, x, y in zip(found.intervals, exact.values, found.values, strict=True):
        width = low_high[1] - low_high[0]
        assert abs(float(x - y)) < width
        assert width < 0.02
    for pair, x in exact.interactions.items():
        assert float(found.interactions[pair]) == pytest.approx(float(x), abs=0.02)
    assert found.alone == exact.alone
    assert found.removed == exact.removed


def test_beyond_the_limit_orders_are_drawn():
    n = 24
    asked: list[int] = []

    def value(mask):
        asked.append(mask)
        return {"v": sum((i + 1) / 3 for i in range(n) if mask >> i & 1)}

    found = attribute(Game(tuple(f"f{i}" for i in range(n)), ((0, 1, 2),)), value, limit=600)["v"]
    assert found.samples == 600 // (3 * n)
    assert len(asked) == len(set(asked)) == found.evaluations < 700
    assert sum(found.values) == found.total
    assert [float(x) for x in found.values] == pytest.approx([(i + 1) / 3 for i in range(n)])
    assert attribute(Game(tuple("ABCD")), lambda m: {"v": Fraction(m)}, limit=8)["v"].samples > 0
    assert attribute(Game(tuple("ABCD")), lambda m: {"v": Fraction(m)}, limit=16)["v"].samples == 0


def test_orders_that_chance_does_not_find_are_refused(monkeypatch):
    monkeypatch.setattr(sampling, "TRIES", 50)
    monkeypatch.setattr(lattice, "CAP", 10)
    n = 12
    chain = Game(tuple("ABCDEFGHIJKL"), admissible=lambda m: m & (m + 1) == 0)
    assert attribute(chain, lambda m: {"v": m})["v"].values[3] == 8  # 13 coalitions are few: they are counted
    monkeypatch.setattr(Game, "lattice", lambda self: None)
    with pytest.raises(QlabError, match=f"50 random orders of the {n} factors"):
        attribute(chain, lambda m: {"v": m})


def test_a_biased_draw_is_caught(monkeypatch):
    """Planted: ranks from the lower half of the orders alone."""
    right = sampling._below
    monkeypatch.setattr(sampling, "_below", lambda bound, generator: right((bound + 1) // 2, generator))
    game = Game(tuple("ABCD"))
    v = random_values(4, 5)
    exact = attribute(game, lambda m: {"v": v[m]})["v"]
    found = attribute(Game(tuple("ABCD"), admissible=lambda m: m != 0b1000), lambda m: {"v": v[m]}, samples=2000)["v"]
    assert any(not low <= float(x) <= high for (low, high), x in zip(found.intervals, exact.values, strict=True))
