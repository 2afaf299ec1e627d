"""Rewrites of a recipe that change one part of its arithmetic and leave everything else: what a wrong kernel would compute.

Each takes a recipe and gives the changed one in normal form, or None where there is nothing to change: the part is not there,
or the result would be the same recipe, or no recipe at all (a chain that no longer divides into steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qlab.errors import QlabError
from qlab.recipe import (
    Chain,
    Fma,
    HalfDot,
    Join,
    Node,
    Output,
    Recipe,
    Round,
    TensorCore,
    Tile,
    Type,
    Unordered,
    chain,
    join,
    nodes,
    rounded,
    unfold,
    unordered,
)

Rewrite = Callable[[Recipe], "Recipe | None"]
FP16_ZERO = 112
"""How far apart the exponents of a zero term lie for fp16 and fp32 accumulators, on every GPU of the table: 127 - 15."""
Steps = NDArray[np.int32]
"""The k of a chain, one fused sum to a row."""


def mapped(node: Node, change: Callable[[Node], Node]) -> Node:
    """The tree in normal form with ``change`` applied to every node, from the leaves up."""
    if isinstance(node, Join):
        node = join([mapped(p, change) for p in node.parts], node.type)
    elif isinstance(node, Unordered):
        node = unordered([mapped(p, change) for p in node.parts], node.type, scaled=node.scaled)
    elif isinstance(node, Round):
        inner = mapped(node.node, change)
        node = rounded(inner, node.type)
        if node is inner:  # a rounding that does nothing any more: what is below was changed already
            return node
    return change(node)


def rebuilt(
    said: Recipe,
    tree: Callable[[Node], Node] = lambda n: n,
    output: Callable[[Output], Output] = lambda o: o,
    **changed: str,
) -> Recipe | None:
    """The recipe with its trees, output rules and fields changed; None where that is the same recipe, or none at all."""
    fields = {"weights": said.weights, "rows": said.rows} | changed
    known: dict[int, Node] = {}
    try:
        for r in said.regions:
            if id(r.tree) not in known:
                known[id(r.tree)] = tree(r.tree)
        tiles = [Tile(r.rows, c, known[id(r.tree)], output(r.output)) for r in said.regions for c in r.columns]
        found = Recipe.of(said.M, said.K, said.N, said.dtype, tiles, **fields)  # type: ignore[arg-type]
    except QlabError:  # a chain that no longer divides into steps, a sum of parts of another type
        return None
    return None if found.hash == said.hash else found


def trees(change: Callable[[Node], Node]) -> Rewrite:
    """``change`` applied to every node of every tree."""
    return lambda said: rebuilt(said, lambda t: mapped(t, change))


def steps(change: Callable[[TensorCore], TensorCore | Fma]) -> Rewrite:
    """Another step in every chain of a tensor core."""

    def node(n: Node) -> Node:
        return chain(change(n.step), unfold(n.walk)) if isinstance(n, Chain) and isinstance(n.step, TensorCore) else n

    return trees(node)


def fraction_bits(by: int) -> Rewrite:
    """F moved by so many bits."""
    return steps(lambda s: replace(s, fraction_bits=s.fraction_bits + by))


def terms(factor: float) -> Rewrite:
    """L times ``factor``."""
    return steps(lambda s: replace(s, terms=int(s.terms * factor)))


def zero_exponent(by: int) -> Rewrite:
    """e_zero moved."""
    return steps(lambda s: replace(s, zero_exponent=s.zero_exponent + by))


def _accumulator(step: TensorCore) -> TensorCore:
    if step.accumulator == "fp32":
        return replace(step, accumulator="fp16", zero_exponent=step.zero_exponent + FP16_ZERO)
    return replace(step, accumulator="fp32", zero_exponent=step.zero_exponent - FP16_ZERO)


def other_accumulator(said: Recipe) -> Recipe | None:
    """fp16 accumulators for fp32 and back; a bf16 kernel has no fp16 ones."""
    return steps(_accumulator)(said) if said.dtype == "fp16" else None


def wider_accumulator(said: Recipe) -> Recipe | None:
    """fp32 accumulators for fp16, whose sums are stored in fp16 all the same."""

    def node(n: Node) -> Node:
        if isinstance(n, Chain) and isinstance(n.step, TensorCore) and n.step.accumulator == "fp16":
            return rounded(chain(_accumulator(n.step), unfold(n.walk)), "fp16")
        return n

    return trees(node)(said)


def multiply_adds(said: Recipe) -> Recipe | None:
    """One fused multiply-add after the other in place of a tensor core's fused sums, in the accumulator's type."""
    return steps(lambda s: Fma(s.accumulator))(said)


def blocks(order: Callable[[Steps], Steps], size: int = 0) -> Rewrite:
    """The steps of each chain in another order, or stretches of ``size`` k where those are whole steps."""

    def node(n: Node) -> Node:
        if not isinstance(n, Chain) or (size and (size % n.step.terms or (n.walk and len(unfold(n.walk)) % size))):
            return n
        return chain(n.step, order(unfold(n.walk).reshape(-1, size or n.step.terms)).ravel())

    return trees(node)


def swap_last_blocks(blocks: Steps) -> Steps:
    """The last two steps of a chain exchanged."""
    return np.r_[blocks[:-2], blocks[-1:], blocks[-2:-1]] if len(blocks) > 2 else blocks


def dots(order: NDArray[np.integer]) -> Rewrite:
    """The k of each dot of ``len(order)`` in another order: position i takes the dot's ``order[i]``-th smallest k."""

    def node(n: Node) -> Node:
        if not isinstance(n, Chain) or not isinstance(n.step, TensorCore):
            return n
        k = unfold(n.walk)
        if len(k) % len(order):
            return n
        return chain(n.step, np.sort(k.reshape(-1, len(order)), axis=1)[:, order].ravel())

    return trees(node)


def within_one_sum(n: Node) -> Node:
    """The k of each fused sum from the last to the first."""
    if isinstance(n, Chain) and isinstance(n.step, TensorCore):
        return chain(n.step, unfold(n.walk).reshape(-1, n.step.terms)[:, ::-1].ravel())
    return n


def joins(order: Callable[[list[Node], Type], list[Node]]) -> Rewrite:
    """The parts of each join of three or more, with the join's type, in another order."""
    return trees(lambda n: join(order(list(n.parts), n.type), n.type) if isinstance(n, Join) and len(n.parts) > 2 else n)


def swap_last_two(parts: list[Node], type: Type = "fp32") -> list[Node]:
    """The last two parts exchanged that sum something."""
    full = [i for i, p in enumerate(parts) if filled(p)]
    if len(full) > 2:
        parts[full[-1]], parts[full[-2]] = parts[full[-2]], parts[full[-1]]
    return parts


def pairs(parts: list[Node], type: Type = "fp32") -> list[Node]:
    """Neighbours first."""
    while len(parts) > 2:
        parts = [join(parts[i : i + 2], type) for i in range(0, len(parts), 2)]
    return parts


def filled(node: Node) -> bool:
    """Whether a node sums any k."""
    return any(len(n.walk) for n in nodes(node) if isinstance(n, Chain))


def first_k(node: Node) -> int:
    """The smallest k that a node sums."""
    runs = (r for n in nodes(node) if isinstance(n, Chain) for r in n.walk)
    return min(r.start + min(0, r.stride) * (r.count - 1) for r in runs)


def join_type(said: Recipe) -> Recipe | None:
    """Joins in the activations' dtype for fp32, their parts rounded to it."""
    kind = said.dtype

    def node(n: Node) -> Node:
        return join([rounded(p, kind) for p in n.parts], kind) if isinstance(n, Join) and n.type == "fp32" else n

    return trees(node)(said)


def _unrounded(n: Node) -> Node:
    if isinstance(n, Round):
        return _unrounded(n.node)
    if isinstance(n, Join) or (isinstance(n, Unordered) and len(n.parts) == 2 and not n.scaled):
        return join([_unrounded(p) for p in n.parts])
    return n


def without_rounding(said: Recipe) -> Recipe | None:
    """Partial sums kept and joined in fp32; ExLlama's two atomic additions become one."""
    return rebuilt(said, _unrounded)


def with_rounding(said: Recipe) -> Recipe | None:
    """Every part of a join rounded to the activations' dtype first."""
    kind = said.dtype

    def node(n: Node) -> Node:
        return join([rounded(p, kind) for p in n.parts], n.type) if isinstance(n, Join) else n

    return trees(node)(said)


def has(said: Recipe, kind: type) -> bool:
    """Whether some chain has a step of that kind."""
    return any(isinstance(n, Chain) and isinstance(n.step, kind) for r in said.regions for n in nodes(r.tree))


def scale_before(said: Recipe) -> Recipe | None:
    """Whole-column scales multiplied into the weights rather than into the sum."""
    if said.weights != "integer" or has(said, HalfDot) or any(r.output.bias == "fused" for r in said.regions):
        return None
    if any(isinstance(n, Unordered) and n.scaled for r in said.regions for n in nodes(r.tree)):
        return None
    return rebuilt(said, output=lambda o: replace(o, scale=False), weights="rounded")


def scale_after(said: Recipe) -> Recipe | None:
    """Scales multiplied into the rounded sum rather than into the weights; for weights with whole-column scales only."""
    if said.weights == "integer":
        return None
    return rebuilt(said, output=lambda o: replace(o, scale=True), weights="integer")


def scale_before_dot(said: Recipe) -> Recipe | None:
    """ExLlama with fp32 multiply-adds of rounded weights for its fp16 dots."""

    def node(n: Node) -> Node:
        return chain(Fma(), unfold(n.walk)) if isinstance(n, Chain) and isinstance(n.step, HalfDot) else n

    return rebuilt(said, lambda t: mapped(t, node), weights="rounded") if has(said, HalfDot) else None


def weights(to: str, of: str) -> Rewrite:
    """Another rule by which weights are decoded."""
    return lambda said: rebuilt(said, weights=to) if said.weights == of else None


def unscaled(said: Recipe) -> Recipe | None:
    """The output's scale left out."""
    return rebuilt(said, output=lambda o: replace(o, scale=False, bias="added" if o.bias == "fused" else o.bias))


def bias(to: str) -> Rewrite:
    """A scaled output's bias added or fused."""

    def output(o: Output) -> Output:
        return replace(o, bias=to) if o.scale and o.bias != "none" else o  # type: ignore[arg-type]

    return lambda said: rebuilt(said, output=output)


def rows(said: Recipe) -> Recipe | None:
    """Act-order rows in the checkpoint's order for the sorted one, and back."""
    return rebuilt(said, rows="natural" if said.rows == "sorted" else "sorted")
