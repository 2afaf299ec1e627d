"""How a recipe's tree cuts K, read from the tree: its pieces, what is rounded, in which order they are joined.

:func:`read` understands the trees of the kernels here: pieces of one chain or of several warps' chains, joined from the first
to the last or back, as PyTorch's ``sum(0)`` does, or by atomics. What it read it writes again, and gives an answer only where
that is the tree it was given. With the pieces at hand a kernel with other split-K, other joins or other roundings is a change
of one field. It shares little with qlab/recipes/scheme.py on purpose: faults are planted by schemes (bench/planted_schemes.py),
and what names them should not read them off the code that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlab.attribution.rewrites import Rewrite, filled, first_k, pairs, rebuilt
from qlab.errors import QlabError
from qlab.recipe import Chain, Join, Node, Round, Step, Type, Unordered, chain, join, key, nodes, rounded, unfold, unordered
from qlab.recipes.rules import CHUNK
from qlab.recipes.scheme import torch_sum

Order = Literal["ascending", "descending", "torch.sum", "pairs", "atomics"]
Partial = Literal["none", "pieces", "total"]
Walk = NDArray[np.int32]
Piece = tuple[Walk, ...]
"""The k of each warp's chain, in order."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """One tree. :meth:`tree` writes it out."""

    step: Step
    pieces: tuple[Piece, ...]
    """From the smallest k to the largest."""
    order: Order
    partial: Partial = "none"
    """What is rounded to ``rounding`` before something is added: each piece's sum, or the running total."""
    rounding: Type = "fp32"
    type: Type = "fp32"
    """Of the joins of pieces."""

    def tree(self) -> Node:
        """Raises QlabError for chains that do not divide into steps and for parts of another type than the join's."""
        sums = [self._sum(piece) for piece in self.pieces]
        if self.partial == "pieces":
            sums = [rounded(s, self.rounding) for s in sums]
        if self.order == "atomics":
            return unordered(sums, self.type)
        if self.order == "torch.sum":
            return torch_sum(sums, self.type)
        if self.order == "pairs":
            return join(pairs(sums, self.type), self.type)
        total, *rest = sums[::-1] if self.order == "descending" else sums
        for part in rest:
            total = join((part, rounded(total, self.rounding) if self.partial == "total" else total), self.type)
        return total

    def _sum(self, piece: Piece) -> Node:
        """Warps join as Marlin's do: ``acc0 + (acc1 + (acc3 + acc2))``."""
        return join([chain(self.step, walk) for walk in reversed(piece)])

    @property
    def interleaved(self) -> bool:
        """Whether pieces of one chain take turns along K, as slices do whose sums PyTorch adds: it shows from two turns on."""
        found = self.pieces
        return len(found) > 1 and (self.order == "torch.sum" or int(found[0][0].max()) > int(found[1][0].min()))


def read(tree: Node) -> Pieces | None:
    """The pieces of a tree; None for one that is not joined as any kernel here does it."""
    chains = _chains(tree)
    roundings = {n.type for n in nodes(tree) if isinstance(n, Round)}
    if not chains or len({c.step for c in chains}) > 1 or len(roundings) > 1:
        return None
    rounding: Type = roundings.pop() if roundings else "fp32"
    partials: tuple[Partial, ...] = ("pieces", "total") if rounding != "fp32" else ("none",)
    kind = tree.type if isinstance(tree, Join | Unordered) else "fp32"
    orders: tuple[Order, ...] = ("atomics",) if isinstance(tree, Unordered) else ("ascending", "torch.sum", "descending")
    text = key(tree)
    for groups, order, partial in product(_groupings(tree), orders, partials):
        found = Pieces(chains[0].step, groups, order, partial, rounding, kind)
        try:
            if key(found.tree()) == text:
                return found
        except QlabError:  # parts of another type than the join's
            continue
    return None


def _groupings(tree: Node) -> list[tuple[Piece, ...]]:
    """Which chains may be warps of one piece: the candidates, the likeliest first."""
    groups = _groups(tree)
    flat = [c for g in groups for c in g]
    each, one = _sorted([[c] for c in flat]), _sorted([flat])
    if any(isinstance(n, Chain) and not filled(n) for n in nodes(tree)):  # torch.sum's +0
        return [each]
    if any(len(g) > 1 for g in groups):
        return [_sorted(groups), each]
    # Chains of one join are warps where they take turns of 32 k, pieces otherwise.
    warps = len(flat) in (2, 4) and first_k(flat[1]) - first_k(flat[0]) == CHUNK
    return [one, each] if warps else [each, one]


def _groups(node: Node) -> list[list[Chain]]:
    if isinstance(node, Chain):
        return [[node]] if filled(node) else []
    if isinstance(node, Round):
        return _groups(node.node)
    if not isinstance(node, Join | Unordered):
        return []
    own = [p for p in node.parts if isinstance(p, Chain) and filled(p)]
    below: list[list[Chain]] = []
    for p in node.parts:
        if _flat(p):
            below.append(_chains(p))
        elif not isinstance(p, Chain):
            below += _groups(p)
    together = any(len(g) > 1 for g in below)
    return [*([own] if own and together else [[c] for c in own]), *below]


def _flat(node: Node) -> bool:
    inner = _bare(node)
    return isinstance(inner, Join) and all(isinstance(p, Chain) for p in inner.parts)


def _chains(node: Node) -> list[Chain]:
    return [n for n in nodes(node) if isinstance(n, Chain) and n.walk]


def _bare(node: Node) -> Node:
    return node.node if isinstance(node, Round) else node


def _sorted(groups: Sequence[Sequence[Chain]]) -> tuple[Piece, ...]:
    pieces = [tuple(unfold(c.walk) for c in sorted(g, key=first_k)) for g in groups]
    return tuple(sorted(pieces, key=lambda p: int(p[0].min())))


def changed(change: Callable[[Pieces], Pieces | None]) -> Rewrite:
    """Every tree that :func:`read` understands, with its pieces changed; the others stay."""

    def tree(node: Node) -> Node:
        found = read(node)
        new = change(found) if found else None
        return node if new is None else new.tree()

    return lambda said: rebuilt(said, tree)


def merged(pieces: Pieces, count: int) -> Pieces | None:
    """``count`` pieces in place of more: neighbours become one, or slices take turns among fewer."""
    have = len(pieces.pieces)
    if have <= count or len({len(p) for p in pieces.pieces}) > 1:
        return None
    if pieces.interleaved and count > 1:
        return dealt(pieces, count)
    per = -(-have // count)
    groups = [pieces.pieces[i : i + per] for i in range(0, have, per)]
    one = tuple(tuple(_together(warp, pieces.interleaved) for warp in zip(*g, strict=True)) for g in groups)
    return replace(pieces, pieces=one)


def _together(walks: Sequence[Walk], interleaved: bool) -> Walk:
    k = np.concatenate(walks)
    return k.reshape(-1, CHUNK)[np.argsort(k.reshape(-1, CHUNK).min(axis=1))].ravel() if interleaved else k


def dealt(pieces: Pieces, count: int) -> Pieces | None:
    """Chunks of 32 k dealt in turn to ``count`` slices of one chain, whatever order each chunk's k have."""
    if any(len(p) > 1 or len(p[0]) % CHUNK for p in pieces.pieces):
        return None
    chunks = _together([p[0] for p in pieces.pieces], True).reshape(-1, CHUNK)
    slices = [chunks[i::count].ravel() for i in range(min(count, len(chunks)))]
    return replace(pieces, pieces=tuple((s,) for s in slices))


def doubled(pieces: Pieces) -> Pieces | None:
    """Each piece cut in two: slices take turns among twice as many, other pieces are halved where they are long enough."""
    if pieces.order == "atomics":
        return None
    if pieces.interleaved:
        return dealt(pieces, 2 * len(pieces.pieces))
    unit = max(CHUNK, pieces.step.terms)
    halves: list[Piece] = []
    for piece in pieces.pieces:
        most = max(len(w) for w in piece) // unit
        cuts = [min(len(w), -(-most // 2) * unit) for w in piece]
        first = tuple(w[:c] for w, c in zip(piece, cuts, strict=True))
        second = tuple(w[c:] for w, c in zip(piece, cuts, strict=True))
        halves += [first, second] if all(len(w) for w in second) else [piece]
    return replace(pieces, pieces=tuple(halves)) if len(halves) > len(pieces.pieces) else None


def halved(pieces: Pieces) -> Pieces | None:
    """Half as many pieces."""
    have = len(pieces.pieces)
    return merged(pieces, -(-have // 2)) if have > 2 else None


def whole(pieces: Pieces) -> Pieces | None:
    """K in one piece; its sum is rounded no more than the output is."""
    return merged(pieces, 1)


def other_way(pieces: Pieces) -> Pieces | None:
    """Joined from the other end; PyTorch's sum in turn."""
    others: dict[Order, Order] = {"ascending": "descending", "descending": "ascending", "torch.sum": "ascending"}
    return replace(pieces, order=others[pieces.order]) if pieces.order in others else None


def in_pairs(pieces: Pieces) -> Pieces | None:
    """Neighbours joined first."""
    return None if pieces.order == "atomics" else replace(pieces, order="pairs")


def last_swapped(pieces: Pieces) -> Pieces | None:
    """The two pieces that are joined last, exchanged; with PyTorch's sum its last two."""
    found = list(pieces.pieces)
    if len(found) < 3 or pieces.order == "atomics":
        return None
    a, b = (0, 1) if pieces.order == "descending" else (-1, -2)
    found[a], found[b] = found[b], found[a]
    return replace(pieces, pieces=tuple(found))


def rounding(what: Partial, to: Type) -> Callable[[Pieces], Pieces | None]:
    """What is rounded to ``to`` before it is added; a sum in fp16 keeps its rounded parts."""

    def change(pieces: Pieces) -> Pieces | None:
        if pieces.type != "fp32" or pieces.order == "atomics" or (pieces.order in ("torch.sum", "pairs") and what == "total"):
            return None
        return replace(pieces, partial=what, rounding=to if what != "none" else "fp32")

    return change


def summed_in(to: Type) -> Callable[[Pieces], Pieces | None]:
    """Pieces rounded to ``to`` and added in it."""
    return lambda p: None if p.type != "fp32" or p.order == "atomics" else replace(p, partial="pieces", rounding=to, type=to)
