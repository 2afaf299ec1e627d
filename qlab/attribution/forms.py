"""A tree of sums told without its lengths, and what of it a map shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qlab.recipe import Chain, Join, Node, Opaque, Round, Unordered, nodes


def form(node: Node) -> list[Any]:
    """A tree without the lengths of its chains, as nested lists: what stays comparable where K changes."""
    if isinstance(node, Chain):
        return ["chain", str(node.step)] if node.walk else ["zero"]
    if isinstance(node, Join):
        first, second, *rest = map(form, node.parts)
        return ["join", node.type, *sorted((first, second), key=json.dumps), *rest]
    if isinstance(node, Unordered):
        return ["unordered", node.type, node.scaled, *sorted(map(form, node.parts), key=json.dumps)]
    return ["round", node.type, form(node.node)] if isinstance(node, Round) else ["opaque", node.name]


@dataclass(frozen=True)
class Summary:
    """What is told of a tree, which itself is let go: a map may meet many thousands."""

    form: str
    """As JSON."""
    chains: int
    """Those that are not empty."""
    opaque: str
    """Names of sums that are not modelled, joined; empty where there is none."""
    atomics: bool
    """Whether an order is left to atomics."""

    @classmethod
    def of(cls, tree: Node) -> Summary:
        """Of one tree."""
        below = list(nodes(tree))
        return cls(
            json.dumps(form(tree)),
            sum(isinstance(n, Chain) and bool(n.walk) for n in below),
            "; ".join(sorted({n.name for n in below if isinstance(n, Opaque)})),
            any(isinstance(n, Unordered) and len(n.parts) > 2 for n in below),
        )
