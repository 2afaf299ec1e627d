"""Exact splits: brute force over permutations, the axioms, the games of the papers."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.attribution import lattice
from qlab.attribution.game import Game, attribute
from qlab.attribution.lattice import Lattice, factors_of
from qlab.errors import QlabError

LETTERS = "ABCDEFGHIJKLMNOP"
AMOUNTS = st.one_of(st.integers(-4, 4), st.floats(allow_nan=False, allow_infinity=False, width=16))


def together(order, unions):
    """Whether the members of each union stand consecutively: from first to last as many as there are."""
    at = [[order.index(i) for i in u] for u in unions]
    return all(max(places) - min(places) == len(places) - 1 for places in at if places)


def prefix(order, length):
    return sum(1 << i for i in order[:length])


def by_force(game, v):
    """Values and interactions over all permutations, one by one."""
    n = len(game.names)
    orders = [
        o
        for o in permutations(range(n))
        if together(o, game.unions) and all(game.admissible(prefix(o, k)) for k in range(n + 1))
    ]
    values = [
        sum(Fraction(v[prefix(o, o.index(i) + 1)]) - Fraction(v[prefix(o, o.index(i))]) for o in orders) / len(orders)
        for i in range(n)
    ] if orders else None  # fmt: skip
    interactions = {}
    for i, j in combinations(range(n), 2):
        seconds = []
        for o in orders:
            first = min(o.index(i), o.index(j))
            swapped = list(o)
            swapped[first : first + 2] = reversed(o[first : first + 2])
            if abs(o.index(i) - o.index(j)) == 1 and tuple(swapped) in orders:
                s = prefix(o, first)
                corners = (v[s | 1 << i | 1 << j], v[s | 1 << i], v[s | 1 << j], v[s])
                seconds.append(sum(Fraction(c) * sign for c, sign in zip(corners, (1, -1, -1, 1), strict=True)))
        interactions[i, j] = sum(seconds) / len(seconds) if seconds else None
    return values, interactions


def solve(game, v, **options):
    return attribute(game, lambda mask: {"v": v[mask]}, **options)["v"]


@st.composite
def games(draw):
    """Up to five factors, a random partition, and either precedences or any family of coalitions; a value for each."""
    n = draw(st.integers(1, 5))
    label = draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    unions = tuple(tuple(i for i in range(n) if label[i] == u) for u in sorted(set(label)))
    full = (1 << n) - 1
    if draw(st.booleans()):
        # i needs j only if j comes first in some order, so that there is an order without unions.
        rank = draw(st.permutations(range(n)))
        pairs = [(i, j) for i in range(n) for j in range(n) if rank[j] < rank[i]]
        needs = draw(st.lists(st.sampled_from(pairs), max_size=4)) if pairs else []
        allowed = {m for m in range(full + 1) if all(not m >> i & 1 or m >> j & 1 for i, j in needs)}
    else:
        refused = draw(st.sets(st.integers(0, full), max_size=8))
        allowed = set(range(full + 1)) - refused | {0, full}
    values = draw(st.lists(AMOUNTS, min_size=full + 1, max_size=full + 1))
    return Game(tuple(LETTERS[:n]), unions, allowed.__contains__), values


@given(games())
@settings(max_examples=250, deadline=None)
def test_random_games_are_split_as_by_force(case):
    game, v = case
    values, interactions = by_force(game, v)
    if values is None:
        with pytest.raises(QlabError, match="no order that swaps"):
            solve(game, v)
        return
    asked: list[int] = []
    found = attribute(game, lambda m: asked.append(m) or {"v": v[m], "twice": 2 * Fraction(v[m])})
    assert list(found["v"].values) == values
    assert found["v"].interactions == interactions
    assert sum(found["v"].values) == found["v"].total == Fraction(v[-1]) - Fraction(v[0])
    assert found["twice"].values == tuple(2 * x for x in values)
    assert len(asked) == len(set(asked)) == found["v"].evaluations
    assert all(map(game.admissible, asked))
    for i in range(len(game.names)):
        one, rest = 1 << i, game.full ^ 1 << i
        assert found["v"].alone[i] == (Fraction(v[one]) - Fraction(v[0]) if game.admissible(one) else None)
        assert found["v"].removed[i] == (Fraction(v[-1]) - Fraction(v[rest]) if game.admissible(rest) else None)
    for union, of_union in zip(game.unions, found["v"].unions, strict=True):
        assert of_union == sum(values[i] for i in union)


def test_no_mask_off_the_admissible_orders_is_evaluated():
    """A chain: A before B before C, D free; ABC of 16 coalitions remain 8, one of them in the middle of nothing."""
    allowed = {0b0000, 0b0001, 0b0011, 0b0111, 0b1000, 0b1001, 0b1011, 0b1111, 0b0110}
    asked: list[int] = []
    attribute(Game(tuple("ABCD"), admissible=allowed.__contains__), lambda m: asked.append(m) or {"v": 0.0})
    assert set(asked) == allowed - {0b0110}
    assert asked[:2] == [0, 0b1111]


def test_symmetric_factors_share_alike_and_a_dummy_gets_nothing():
    n = 6
    v = [math.sqrt((m & 0b11111).bit_count()) for m in range(1 << n)]  # the last factor changes nothing
    found = solve(Game(tuple(LETTERS[:n])), v)
    assert len(set(found.values[:5])) == 1
    assert found.values[5] == 0
    assert found.alone[5] == found.removed[5] == 0
    assert all(found.interactions[i, 5] == 0 for i in range(5))
    assert sum(found.values) == Fraction(math.sqrt(5))


def test_cancelling_factors_interact_negatively():
    """F and L of the tensor core, each of which alone does more than both."""
    v = [0.0, 1.22, 1.42, 0.88]
    found = solve(Game(("F", "L")), v)
    assert [float(x) for x in found.values] == pytest.approx([0.34, 0.54])
    assert float(found.interactions[0, 1]) == pytest.approx(-1.76)
    assert [float(x) for x in found.alone] == [1.22, 1.42]
    assert [float(x) for x in found.removed] == pytest.approx([-0.54, -0.34])
    assert sum(found.values) == Fraction(0.88)


def test_the_glove_game():
    """One left glove, two right ones: Shapley (2/3, 1/6, 1/6); with a union of the left and one right, Owen (3/4, 1/4, 0)."""
    v = [int(m & 1 and m & 0b110 > 0) for m in range(8)]
    assert solve(Game(tuple("LRS")), v).values == (Fraction(2, 3), Fraction(1, 6), Fraction(1, 6))
    owen = solve(Game(tuple("LRS"), ((0, 1),)), v)
    assert owen.values == (Fraction(3, 4), Fraction(1, 4), 0)
    assert owen.unions == (1, 0)


def test_the_airport_game():
    """Littlechild and Owen 1973: a runway's cost, where each length is paid for in equal parts by those who need it."""
    costs = [1, 4, 9, 9, 16]
    v = [max([0] + [c for i, c in enumerate(costs) if m >> i & 1]) for m in range(32)]
    expected, paid, before = [], Fraction(0), 0
    for i, c in enumerate(costs):
        paid += Fraction(c - before, len(costs) - i)
        expected.append(paid)
        before = c
    assert list(solve(Game(tuple(LETTERS[:5])), v).values) == expected


def test_unanimity_games_under_precedence():
    """Faigle and Kern 1992: a unanimity game's unit is shared by hierarchical strength.

    That is the share of orders in which one comes last among the members.
    """
    needs = [(2, 0), (3, 0), (4, 1)]
    game = Game(tuple("ABCDE"), admissible=lambda m: all(not m >> i & 1 or m >> j & 1 for i, j in needs))
    orders = [o for o in permutations(range(5)) if all(o.index(j) < o.index(i) for i, j in needs)]
    members = (0, 2, 4)
    v = [int(all(m >> i & 1 for i in members)) for m in range(32)]
    last = [max(members, key=o.index) for o in orders]
    assert list(solve(game, v).values) == [Fraction(last.count(i), len(orders)) for i in range(5)]
    assert solve(game, v).alone[2] is None


def test_interactions_have_the_weights_of_grabisch_and_roubens():
    n = 5
    v = [(m * m % 37) / 8 for m in range(1 << n)]
    found = solve(Game(tuple(LETTERS[:n])), v)
    for i, j in combinations(range(n), 2):
        others = [m for m in range(1 << n) if not m >> i & 1 and not m >> j & 1]
        index = sum(
            Fraction(math.factorial(m.bit_count()) * math.factorial(n - m.bit_count() - 2), math.factorial(n - 1))
            * Fraction(v[m | 1 << i | 1 << j] - v[m | 1 << i] - v[m | 1 << j] + v[m])
            for m in others
        )
        assert found.interactions[i, j] == index


def test_sums_are_exact_where_floats_are_not():
    v = [0.0, 1e300, 1e-300, 1.0, 0.1, 0.2, 0.3, 0.1 + 0.2]
    found = solve(Game(tuple("ABC")), v)
    assert sum(found.values) == Fraction(0.1 + 0.2)
    assert found.residual == Fraction(0.1 + 0.2) - sum(Fraction(float(x)) for x in found.values)
    assert found.residual != 0
    third = solve(Game(tuple("ABC")), [Fraction(m.bit_count(), 3) for m in range(8)])
    assert third.values == (Fraction(1, 3),) * 3
    assert third.residual == 1 - 3 * Fraction(1 / 3)


def test_twelve_factors_are_split_exactly():
    n = 12
    names = tuple(f"part {i}" for i in range(n))
    seen = []
    found = attribute(
        Game(names, ((0, 1, 2), (3, 4, 5, 6))),
        lambda m: {"v": math.sqrt(m.bit_count())},
        advance=lambda done, of: seen.append((done, of)),
    )
    assert found["v"].samples == 0
    assert [done for done, _ in seen] == list(range(1, found["v"].evaluations + 1))
    assert {of for _, of in seen} == {found["v"].evaluations}
    whole = attribute(Game(names), lambda m: {"v": math.sqrt(m.bit_count())})["v"]
    assert whole.evaluations == 4096
    assert whole.samples == 0
    assert len(set(whole.values)) == 1


def test_unions_are_dissolved_where_they_block():
    """B needs C, and C needs A: with A and B together nothing goes."""
    needs = [(1, 2), (2, 0)]
    game = Game(tuple("ABCDE"), ((0, 1), (3, 4)), lambda m: all(not m >> i & 1 or m >> j & 1 for i, j in needs))
    with pytest.raises(QlabError, match="A, B"):
        attribute(game, lambda m: {"v": 0.0})
    loose = game.loosened()
    assert loose.unions == ((3, 4), (2,), (0,), (1,))
    assert sum(solve(loose, list(range(32))).values) == 31
    free = Game(tuple("ABC"), ((0, 1),))
    assert free.loosened() is free


def test_impossible_games_say_so():
    ends = Game(tuple("AB"), admissible=lambda m: m in (0, 3))
    with pytest.raises(QlabError, match="merge"):
        attribute(ends, lambda m: {"v": 0.0})
    with pytest.raises(QlabError, match="merge"):
        ends.loosened()
    for broken, message in (
        (lambda: Game(("A", "A")), "named twice"),
        (lambda: Game(("A", "B"), ((0, 1), (1,))), "more than one union"),
        (lambda: Game(("A",), ((1,),)), "names factor 1"),
        (lambda: Game(("A",), admissible=lambda m: m == 0), "all of the factors"),
        (lambda: attribute(Game(("A",)), lambda m: {"v": math.nan}), "not a finite number"),
        (lambda: attribute(Game(("A",)), lambda m: {"v": 0.0} if m else {"w": 0.0}), "'v'"),
        (lambda: attribute(Game(("A",)), lambda m: {"v": 0.0}, samples=1), "at least 2"),
    ):
        with pytest.raises(QlabError, match=message):
            broken()


def test_nothing_differs():
    found = solve(Game(()), [0.0])
    assert found.total == 0
    assert found.values == ()


@pytest.mark.parametrize(
    ("of", "name", "fault"),
    [
        (Lattice, "steps", lambda self: ((m, i, 1) for m, i, _ in STEPS(self))),
        (Lattice, "squares", lambda self: ((m, i, j, 1) for m, i, j, _ in SQUARES(self))),
        (lattice, "exchangeable", lambda *a: True),
        (lattice, "following", lambda mask, unions: factors_of(sum(unions) & ~mask)),
    ],
)
def test_planted_faults_are_caught(monkeypatch, of, name, fault):
    """Steps of equal weight, neighbours that change places across unions, unions that are torn apart."""
    monkeypatch.setattr(of, name, fault)
    game = Game(tuple("ABCDE"), ((0, 1, 2),), lambda m: not m >> 2 & 1 or m >> 1 & 1)
    v = [m * m % 11 for m in range(32)]
    try:
        found = solve(game, v)
    except AssertionError:
        return
    assert (list(found.values), found.interactions) != by_force(game, v)


STEPS, SQUARES = Lattice.steps, Lattice.squares
