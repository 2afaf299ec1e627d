"""A difference split among factors so that the parts add up to it: Shapley values over the admissible orders of swapping.

A value function says how far a coalition of factors, taken from B, leads away from A. A factor's value is the mean, over all
admissible orders, of what the difference grows by when the factor is swapped. Without unions and constraints that is the
Shapley value (Shapley 1953, A value for n-person games, Contributions to the Theory of Games II); with unions alone, whose
members then stand consecutively, Owen's (Owen 1977, Values of games with a priori unions, Essays in Mathematical Economics and
Game Theory); with constraints of precedence alone, Faigle and Kern's (1992, The Shapley value for cooperative games under
precedence constraints, International Journal of Game Theory 21). Here any family of coalitions may be admissible.

The interaction of two factors is the mean of v(S+i+j) - v(S+i) - v(S+j) + v(S) over the admissible orders in which they stand
next to each other, behind S, and may change places; in an unconstrained game it is the Shapley interaction index (Grabisch and
Roubens 1999, An axiomatic approach to the concept of interaction among players in cooperative games, International Journal of
Game Theory 28), whose weights are s! (n-s-2)! / (n-1)!.

Floats are binary fractions and are added as such: nothing is rounded, and the parts equal the total exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import combinations

from qlab.attribution import sampling
from qlab.attribution.lattice import Lattice, exchangeable, factors_of, lattice
from qlab.attribution.sampling import Draw
from qlab.errors import QlabError

LIMIT = 4096
"""Most coalitions of an exact split: twelve factors without unions or constraints."""
Number = Fraction | float | int
Value = Callable[[int], Mapping[str, Number]]
Advance = Callable[[int, int], None]
"""Called after each evaluation with how many were made and how many there will be."""
Step = tuple[int, int, int]
"""Coalition, factor that is swapped next, weight."""
Square = tuple[int, int, int, int]
"""Coalition, two factors that are swapped next in either order, weight."""


def everything(mask: int) -> bool:
    """Every coalition is admissible."""
    return True


@dataclass(frozen=True)
class Game:
    """Factors, which of them stay together, and which coalitions can be built. Raises QlabError where these do not fit."""

    names: tuple[str, ...]
    unions: tuple[tuple[int, ...], ...] = ()
    """Factors whose members are swapped consecutively, as indices into ``names``. A factor in none is a union of its own."""
    admissible: Callable[[int], bool] = everything
    """Whether a coalition (bit i for factor i) can be built; it must say yes to none and to all of the factors."""

    def __post_init__(self) -> None:
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise QlabError(f"factor {twice[0]!r} is named twice")
        seen = Counter(i for union in self.unions for i in union)
        for i, count in seen.items():
            if not 0 <= i < len(self.names):
                raise QlabError(f"a union names factor {i}; there are {len(self.names)}")
            if count > 1:
                raise QlabError(f"factor {self.names[i]!r} stands in more than one union")
        alone = tuple((i,) for i in range(len(self.names)) if i not in seen)
        object.__setattr__(self, "unions", tuple(u for u in self.unions if u) + alone)
        for mask, what in ((0, "none"), (self.full, "all")):
            if not self.admissible(mask):
                raise QlabError(f"{what} of the factors is no admissible coalition, though it is one of the two ends")

    @property
    def full(self) -> int:
        """The coalition of all factors."""
        return (1 << len(self.names)) - 1

    @property
    def masks(self) -> tuple[int, ...]:
        """The unions as coalitions."""
        return tuple(sum(1 << i for i in union) for union in self.unions)

    def coalition(self, mask: int) -> str:
        """A coalition in words."""
        return " + ".join(self.names[i] for i in factors_of(mask)) or "none"

    def lattice(self) -> Lattice | None:
        """The coalitions on admissible orders, counted; None where there are too many."""
        return lattice(self.masks, self.admissible)

    def loosened(self) -> Game:
        """This game, or, where its unions leave no admissible order, one with as few and as small unions dissolved as will do.

        The members of a dissolved union become unions of their own. Raises QlabError where no order is admissible even so. A
        game too large to be counted is returned as it is.
        """
        several = sorted((u for u in self.unions if len(u) > 1), key=len)
        for count in range(len(several) + 1):
            for dissolved in combinations(several, count):
                game = replace(self, unions=tuple(u for u in self.unions if u not in dissolved))
                found = game.lattice()
                if found is None or found.orders:
                    return game if dissolved else self
        raise QlabError(
            f"no order of the factors {', '.join(self.names)} has admissible coalitions alone; merge those that cannot be "
            "swapped alone"
        )


@dataclass(frozen=True)
class Attribution:
    """One value function's total, split. Tuples go by the game's factors; all fractions are exact."""

    total: Fraction
    """v(all) - v(none)."""
    values: tuple[Fraction, ...]
    """Each factor's part; they add up to ``total``."""
    alone: tuple[Fraction | None, ...]
    """v(the factor) - v(none); None where that coalition is not admissible."""
    removed: tuple[Fraction | None, ...]
    """v(all) - v(all but the factor); None likewise."""
    interactions: dict[tuple[int, int], Fraction | None]
    """For i < j; None where no admissible order has them exchangeable (or no drawn one)."""
    unions: tuple[Fraction, ...]
    """Sum of the values of each of the game's unions."""
    evaluations: int
    """Coalitions that were evaluated."""
    samples: int
    """Draws of an order, with its reverse where admissible; 0 where all orders were averaged."""
    intervals: tuple[tuple[float, float] | None, ...]
    """95% interval of each value over the draws; None where it is exact."""

    @property
    def residual(self) -> Fraction:
        """What rounding the values to floats leaves: the total minus the sum of the floats."""
        return self.total - sum((Fraction(float(v)) for v in self.values), Fraction(0))


def attribute(
    game: Game,
    value: Value,
    *,
    samples: int | None = None,
    seed: int = 0,
    limit: int = LIMIT,
    advance: Advance = lambda done, of: None,
) -> dict[str, Attribution]:
    """Split every value function of ``value`` among the game's factors.

    ``value`` gives a coalition's values by name, finite floats or fractions, the same names for each. It is asked once for each
    coalition on an admissible order, and for each admissible one of a single factor or of all but one; first for the two ends.
    All orders are averaged where that takes at most ``limit`` coalitions. Where it takes more, or ``samples`` is given, so many
    draws of an order are (by default as many as stay within ``limit``), by numpy's generator seeded with ``seed``.

    Raises QlabError where no order is admissible, where a value is not finite or a name is missing, and for fewer than two
    samples.
    """
    if samples is not None and samples < 2:
        raise QlabError(f"{samples} samples leave no interval; give at least 2")
    count = len(game.names)
    game = replace(game, admissible=cache(game.admissible))
    found = game.lattice()
    if found is not None and not found.orders:
        raise QlabError(
            "no order that swaps the members of each union consecutively has admissible coalitions alone: "
            f"{'; '.join(', '.join(game.names[i] for i in u) for u in game.unions if len(u) > 1) or 'there is no union'}; "
            "dissolve a union (Game.loosened) or merge the factors that cannot be swapped alone"
        )
    draws: tuple[Draw, ...] = ()
    if found is not None and samples is None and len(found.ways) <= limit:
        steps, squares = list(found.steps()), list(found.squares())
    else:
        draws = sampling.draw(samples or max(2, limit // max(1, 3 * count)), seed, game.masks, game.admissible, found)
        steps, squares = _drawn_steps(draws), _drawn_squares(game, draws)
    ends = (0, game.full)
    near = [m for i in range(count) for m in (1 << i, game.full ^ 1 << i) if game.admissible(m)]
    corners = [m | extra for m, i, j, _ in squares for extra in (1 << i, 1 << j)]
    inner = sorted({m for m, _, _ in steps} | set(near) | set(corners), key=lambda m: (m.bit_count(), m))
    values = _evaluated(game, value, [*dict.fromkeys([*ends, *inner])], advance)
    return {name: _split(game, v, steps, squares, draws) for name, v in values.items()}


def _drawn_steps(draws: Iterable[Draw]) -> list[Step]:
    """The steps of the draws: each draw weighs 2, so that an antithetic pair's orders weigh 1 each."""
    weights: Counter[tuple[int, int]] = Counter()
    for orders in draws:
        for order in orders:
            for mask, i in zip([0, *sampling.prefixes(order)], order, strict=False):
                weights[mask, i] += 2 // len(orders)
    return [(mask, i, w) for (mask, i), w in weights.items()]


def _drawn_squares(game: Game, draws: Iterable[Draw]) -> list[Square]:
    """The neighbours that may change places; of the drawn order only, since each costs an evaluation."""
    weights: Counter[tuple[int, int, int]] = Counter()
    for order, *_ in draws:
        for mask, i, j in zip([0, *sampling.prefixes(order)], order, order[1:], strict=False):
            if exchangeable(mask, i, j, game.masks) and game.admissible(mask | 1 << j):
                weights[mask, min(i, j), max(i, j)] += 1
    return [(*square, w) for square, w in weights.items()]


def _evaluated(game: Game, value: Value, masks: list[int], advance: Advance) -> dict[str, dict[int, Fraction]]:
    """Every value function on ``masks``. Raises QlabError naming the coalition."""
    found: dict[str, dict[int, Fraction]] = {}
    for done, mask in enumerate(masks):
        given = value(mask)
        if not done:
            found = {name: {} for name in given}
        if set(given) != set(found):
            name = sorted(set(given) ^ set(found))[0]
            raise QlabError(f"value {name!r} is given for some coalitions only; {game.coalition(mask)} differs from none")
        for name, v in given.items():
            if not isinstance(v, Fraction | int) and not math.isfinite(v):
                raise QlabError(f"value {name!r} of the coalition {game.coalition(mask)} is {v}, not a finite number")
            found[name][mask] = Fraction(v) if isinstance(v, Fraction | int) else Fraction(float(v))
        advance(done + 1, len(masks))
    return found


def _split(
    game: Game, values: dict[int, Fraction], steps: list[Step], squares: list[Square], draws: tuple[Draw, ...]
) -> Attribution:
    """Weighted means of the differences, in integers: all values over one denominator."""
    unit = math.lcm(*(v.denominator for v in values.values()))
    v = {mask: x.numerator * (unit // x.denominator) for mask, x in values.items()}
    count, full = len(game.names), game.full
    orders = sum(w for mask, _, w in steps if not mask)
    parts = [0] * count
    for mask, i, w in steps:
        parts[i] += w * (v[mask | 1 << i] - v[mask])
    shares = tuple(Fraction(p, orders * unit) for p in parts)
    total = Fraction(v[full] - v[0], unit)
    assert sum(shares, Fraction(0)) == total, "the parts of an attribution must add up to its total"

    pairs: dict[tuple[int, int], list[int]] = {pair: [0, 0] for pair in combinations(range(count), 2)}
    for mask, i, j, w in squares:
        bit_i, bit_j = 1 << i, 1 << j
        pairs[i, j][0] += w * (v[mask | bit_i | bit_j] - v[mask | bit_i] - v[mask | bit_j] + v[mask])
        pairs[i, j][1] += w
    without = [full ^ 1 << i for i in range(count)]
    return Attribution(
        total=total,
        values=shares,
        alone=tuple(Fraction(v[1 << i] - v[0], unit) if 1 << i in v else None for i in range(count)),
        removed=tuple(Fraction(v[full] - v[m], unit) if m in v else None for m in without),
        interactions={pair: Fraction(x, w * unit) if w else None for pair, (x, w) in pairs.items()},
        unions=tuple(sum((shares[i] for i in union), Fraction(0)) for union in game.unions),
        evaluations=len(values),
        samples=len(draws),
        intervals=_intervals(shares, v, unit, draws) if draws else (None,) * count,
    )


def _intervals(
    shares: tuple[Fraction, ...], v: dict[int, int], unit: int, draws: tuple[Draw, ...]
) -> tuple[tuple[float, float], ...]:
    parts: list[list[float]] = [[] for _ in shares]
    for orders in draws:
        sums = [0] * len(shares)
        for order in orders:
            for mask, i in zip([0, *sampling.prefixes(order)], order, strict=False):
                sums[i] += v[mask | 1 << i] - v[mask]
        for of_factor, s in zip(parts, sums, strict=True):
            of_factor.append(float(Fraction(s, len(orders) * unit)))
    return tuple(sampling.interval(p, float(share)) for p, share in zip(parts, shares, strict=True))
