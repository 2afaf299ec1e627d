"""Two trees side by side: whether they are one function, and otherwise the first node in which they differ."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from qlab.recipe import (
    Chain,
    Fma,
    Join,
    Node,
    Opaque,
    Round,
    Type,
    Unordered,
    chain,
    join,
    key,
    rounded,
    unfold,
    unordered,
    value_type,
)
from qlab.report.recipe import one_line, spined, walk_text

WIDTH = 160


@dataclass(frozen=True)
class Difference:
    """The first node, parents first, that is another in the second tree."""

    path: str
    """From the root, e.g. ``root, part 2 of 5, chain``; parts in the order of :func:`qlab.report.recipe.spined`."""
    what: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}: {self.found} in place of {self.expected}"


def tree_hash(node: Node, out: Type) -> str:
    """sha256 of a tree as :func:`settled`; ``out`` is the output's type."""
    return hashlib.sha256(key(settled(node, out)).encode()).hexdigest()


def settled(node: Node, out: Type) -> Node:
    """A tree without what cannot be seen from outside, in one form for each function.

    Chains over nothing add nothing but the sign of a zero. The two k that an fma chain begins with commute. Adding two values
    of a narrow type in fp32 and rounding is adding them in that type (Figueroa 1995), and so is what an output does to a sum of
    two. Two atomics have one result.
    """
    found = _settled(node)
    if found is None:
        return node
    if isinstance(found, Round) and found.type == out:
        found = found.node
    if isinstance(found, Join):
        found = _narrow(found, out)
    return spined(found)


def _settled(node: Node) -> Node | None:
    if isinstance(node, Chain):
        order = unfold(node.walk)
        if isinstance(node.step, Fma):
            order = np.concatenate([np.sort(order[:2]), order[2:]])
        return chain(node.step, order) if order.size else None
    if isinstance(node, Opaque):
        return node
    if isinstance(node, Round):
        below = _settled(node.node)
        if below is None:
            return None
        return rounded(_narrow(below, node.type) if isinstance(below, Join) else below, node.type)
    parts = [p for p in map(_settled, node.parts) if p is not None]
    if not parts:
        return None
    if isinstance(node, Unordered) and (len(parts) > 2 or node.scaled):
        return unordered(parts, node.type, scaled=node.scaled)
    total = parts[0]
    for part in parts[1:]:
        total = join((total, part), node.type)
    return total


def _narrow(node: Join, type: Type) -> Join:
    both = len(node.parts) == 2 and all(value_type(p) == type for p in node.parts)
    return Join(node.parts, type) if both and node.type == "fp32" else node


def difference(found: Node, expected: Node, out: Type) -> Difference | None:
    """None where the trees are one function as far as :func:`settled` says."""
    return _difference(settled(found, out), settled(expected, out), "root")


def _difference(a: Node, b: Node, path: str) -> Difference | None:
    if a == b:
        return None
    if type(a) is not type(b):
        return _differs(path, "another kind of node", a, b)
    if isinstance(a, Chain) and isinstance(b, Chain):
        if a.step != b.step:
            over = [f"{c.step} over {walk_text(c.walk)}" for c in (a, b)]
            return Difference(f"{path}, chain", "another step", over[0], over[1])
        return _order(path, a, b)
    if isinstance(a, Round) and isinstance(b, Round):
        if a.type != b.type:
            return _differs(path, f"rounded to {a.type}, not to {b.type}", a, b)
        return _difference(a.node, b.node, f"{path}, what is rounded")
    if isinstance(a, Join | Unordered) and isinstance(b, Join | Unordered):
        if a.type != b.type:
            return _differs(path, f"added in {a.type}, not in {b.type}", a, b)
        if len(a.parts) != len(b.parts):
            return _differs(path, f"{len(a.parts)} parts, not {len(b.parts)}", a, b)
        for i, (p, q) in enumerate(zip(a.parts, b.parts, strict=True), start=1):
            if (below := _difference(p, q, f"{path}, part {i} of {len(a.parts)}")) is not None:
                return below
    return _differs(path, "another node", a, b)


def _order(path: str, a: Chain, b: Chain) -> Difference:
    k, other = unfold(a.walk), unfold(b.walk)
    n = min(len(k), len(other))
    at = next((i for i in range(n) if k[i] != other[i]), n)
    where = f"another order of k from place {at} on" if at < n else f"{len(k)} k, not {len(other)}"
    return _differs(f"{path}, chain", where, a, b)


def _differs(path: str, what: str, a: Node, b: Node) -> Difference:
    return Difference(path, what, _short(a), _short(b))


def _short(node: Node) -> str:
    text = one_line(node)
    return text if len(text) <= WIDTH else text[: WIDTH - 4] + " ..."
