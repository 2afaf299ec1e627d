"""Admissible orders of swapping factors, counted along the coalitions that they pass through.

A coalition is a bit mask, bit i for factor i. An order is admissible where the members of each union stand consecutively and
every prefix is an admissible coalition. Orders are not listed: a coalition tells which union is open, if any, and so which
factors may come next; the number of orders through a coalition is that of the ways to it times that of the ways onward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

CAP = 1 << 16
"""Most coalitions that are held: 16 factors without unions or constraints."""
Order = tuple[int, ...]


def factors_of(mask: int) -> Iterator[int]:
    """Indices of the bits that are set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def following(mask: int, unions: tuple[int, ...]) -> Iterator[int]:
    """Factors that may come next if the members of each union (given as masks) stand consecutively."""
    rest = 0
    for union in unions:
        left = union & ~mask
        if left and left != union:
            return factors_of(left)
        rest |= left
    return factors_of(rest)


@dataclass(frozen=True)
class Lattice:
    """The coalitions on admissible orders, each with the number of ways to it and onward."""

    unions: tuple[int, ...]
    """As masks; together they hold every factor."""
    ways: dict[int, int]
    """Coalition to the number of admissible orders of its members that lead to it, smaller coalitions first."""
    onward: dict[int, int]
    """Coalition to the number of ways from it to all factors."""

    @property
    def orders(self) -> int:
        """How many orders are admissible."""
        return self.onward.get(0, 0)

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """Coalition, factor that comes next, number of admissible orders in which it does."""
        for mask, ways in self.ways.items():
            for i in following(mask, self.unions):
                if after := self.onward.get(mask | 1 << i):
                    yield mask, i, ways * after

    def squares(self) -> Iterator[tuple[int, int, int, int]]:
        """Coalition S, factors i < j, number of admissible orders in which the two come next, either one first.

        Only where both ways from S to S with i and j are admissible: otherwise there is no second difference.
        """
        for mask, ways in self.ways.items():
            first = [i for i in following(mask, self.unions) if mask | 1 << i in self.onward]
            for at, i in enumerate(first):
                for j in first[at + 1 :]:
                    after = self.onward.get(mask | 1 << i | 1 << j)
                    if after and exchangeable(mask, i, j, self.unions):
                        yield mask, i, j, 2 * ways * after

    def order(self, rank: int) -> Order:
        """The admissible order of a rank from 0 to ``orders`` - 1: a uniform rank gives a uniform order."""
        mask = 0
        found: list[int] = []
        while len(found) < sum(u.bit_count() for u in self.unions):
            for i in following(mask, self.unions):
                after = self.onward.get(mask | 1 << i, 0)
                if rank < after:
                    break
                rank -= after
            found.append(i)
            mask |= 1 << i
        return tuple(found)


def exchangeable(mask: int, i: int, j: int, unions: tuple[int, ...]) -> bool:
    """Whether i then j and j then i may both follow ``mask``, as far as unions go: they share one or are alone in theirs."""
    return all(second in following(mask | 1 << one, unions) for one, second in ((i, j), (j, i)))


def lattice(unions: tuple[int, ...], admissible: Callable[[int], bool], cap: int = CAP) -> Lattice | None:
    """The lattice of the factors in ``unions``, which are masks; None where more than ``cap`` coalitions can be reached.

    ``admissible`` is asked at most once for each coalition.
    """
    ways: dict[int, int] = {0: 1}
    level = ways
    while level:
        refused: set[int] = set()
        after: dict[int, int] = {}
        for mask, count in level.items():
            for i in following(mask, unions):
                to = mask | 1 << i
                if to in after:
                    after[to] += count
                elif to not in refused:
                    if admissible(to):
                        after[to] = count
                    else:
                        refused.add(to)
        if len(ways) + len(after) > cap:
            return None
        ways.update(after)
        level = after
    full = sum(unions)
    onward: dict[int, int] = {}
    for mask in reversed(ways):
        count = 1 if mask == full else sum(onward.get(mask | 1 << i, 0) for i in following(mask, unions))
        if count:
            onward[mask] = count
    return Lattice(unions, {m: w for m, w in ways.items() if m in onward}, onward)
