"""Rewrites of a recipe's tree that make it wrong in one part: the deliberate errors of mutations.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

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
    Unordered,
    chain,
    join,
    nodes,
    rounded,
    unfold,
    unordered,
    zero,
)
from qlab.recipes import recipe
from tests.golden.truth import Evidence

Rewrite = Callable[[Evidence], Recipe | None]
"""The wrong recipe for what a kernel computed; None where there is nothing to get wrong."""


def mapped(node: Node, change: Callable[[Node], Node]) -> Node:
    """The tree in normal form with ``change`` applied to every node, from the leaves up."""
    if isinstance(node, Join):
        node = join([mapped(p, change) for p in node.parts], node.type)
    elif isinstance(node, Unordered):
        node = unordered([mapped(p, change) for p in node.parts], node.type, scaled=node.scaled)
    elif isinstance(node, Round):
        node = rounded(mapped(node.node, change), node.type)
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
        tiles = [
            Tile(r.rows, c, known.setdefault(id(r.tree), tree(r.tree)), output(r.output))
            for r in said.regions
            for c in r.columns
        ]
        found = Recipe.of(said.M, said.K, said.N, said.dtype, tiles, **fields)  # type: ignore[arg-type]
    except QlabError:  # a chain that no longer divides into steps, a sum of parts of another type
        return None
    return None if found.hash == said.hash else found


def steps(change: Callable[[TensorCore], TensorCore | Fma]) -> Rewrite:
    """Another step in every chain of a tensor core."""

    def node(n: Node) -> Node:
        return chain(change(n.step), unfold(n.walk)) if isinstance(n, Chain) and isinstance(n.step, TensorCore) else n

    return lambda e: rebuilt(e.recipe, lambda t: mapped(t, node))


def trees(change: Callable[[Node], Node]) -> Rewrite:
    return lambda e: rebuilt(e.recipe, lambda t: mapped(t, change))


def fraction_bits(by: int) -> Rewrite:
    return steps(lambda s: replace(s, fraction_bits=s.fraction_bits + by))


def zero_exponent(by: int, matters: bool) -> Rewrite:
    """e_zero moved, where the inputs and accumulators are such that it can matter, or where they are not."""
    move = steps(lambda s: replace(s, zero_exponent=s.zero_exponent + by))

    def go(e: Evidence) -> Recipe | None:
        fp32 = all(n.step.accumulator == "fp32" for r in e.recipe.regions for n in nodes(r.tree) if isinstance(n, Chain))
        return move(e) if (e.recipe.dtype == "fp16" and fp32) != matters else None

    return go


def _accumulator(step: TensorCore) -> TensorCore:
    return replace(step, accumulator="fp16" if step.accumulator == "fp32" else "fp32")


def other_accumulator(e: Evidence) -> Recipe | None:
    """fp16 accumulators for fp32 and back; a bf16 kernel has no fp16 ones."""
    return steps(_accumulator)(e) if e.recipe.dtype == "fp16" else None


def blocks(order: Callable[[np.ndarray], np.ndarray]) -> Rewrite:
    """The steps of each chain in another order."""

    def node(n: Node) -> Node:
        return chain(n.step, order(unfold(n.walk).reshape(-1, n.step.terms)).ravel()) if isinstance(n, Chain) else n

    return trees(node)


def swap_last_blocks(blocks: np.ndarray) -> np.ndarray:
    return np.r_[blocks[:-2], blocks[-1:], blocks[-2:-1]] if len(blocks) > 2 else blocks


def within_one_sum(n: Node) -> Node:
    if isinstance(n, Chain) and isinstance(n.step, TensorCore):
        return chain(n.step, unfold(n.walk).reshape(-1, n.step.terms)[:, ::-1].ravel())
    return n


def joins(order: Callable[[list[Node]], list[Node]]) -> Rewrite:
    """The parts of each join of three or more in another order."""
    return trees(lambda n: join(order(list(n.parts)), n.type) if isinstance(n, Join) and len(n.parts) > 2 else n)


def swap_last_two(parts: list[Node]) -> list[Node]:
    full = [i for i, p in enumerate(parts) if _filled(p)]
    if len(full) > 2:
        parts[full[-1]], parts[full[-2]] = parts[full[-2]], parts[full[-1]]
    return parts


def pairs(parts: list[Node]) -> list[Node]:
    """Neighbours first."""
    while len(parts) > 2:
        parts = [join(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts


def join_type(e: Evidence) -> Recipe | None:
    """Joins in the activations' dtype for fp32."""
    kind = e.recipe.dtype

    def node(n: Node) -> Node:
        return join([rounded(p, kind) for p in n.parts], kind) if isinstance(n, Join) and n.type == "fp32" else n

    return rebuilt(e.recipe, lambda t: mapped(t, node))


def _unrounded(n: Node) -> Node:
    return n.node if isinstance(n, Round) else n


def without_rounding(e: Evidence) -> Recipe | None:
    """Partial sums kept in fp32; ExLlama's two atomic additions become one of fp32."""

    def node(n: Node) -> Node:
        if isinstance(n, Join):
            return join([_unrounded(p) for p in n.parts])
        if isinstance(n, Unordered) and len(n.parts) == 2 and not n.scaled:
            return join([_unrounded(p) for p in n.parts])
        return n

    return rebuilt(e.recipe, lambda t: mapped(t, node))


def with_rounding(e: Evidence) -> Recipe | None:
    """Every part of a join rounded to the activations' dtype first."""
    kind = e.recipe.dtype

    def node(n: Node) -> Node:
        return join([rounded(p, kind) for p in n.parts], n.type) if isinstance(n, Join) else n

    return rebuilt(e.recipe, lambda t: mapped(t, node))


def _has(said: Recipe, kind: type) -> bool:
    return any(isinstance(n, Chain) and isinstance(n.step, kind) for r in said.regions for n in nodes(r.tree))


def scale_before(e: Evidence) -> Recipe | None:
    """Whole-column scales multiplied into the weights rather than into the sum."""
    if e.recipe.weights != "integer" or _has(e.recipe, HalfDot) or any(r.output.bias == "fused" for r in e.recipe.regions):
        return None
    if any(isinstance(n, Unordered) and n.scaled for r in e.recipe.regions for n in nodes(r.tree)):
        return None
    return rebuilt(e.recipe, output=lambda o: replace(o, scale=False), weights="rounded")


def scale_after(e: Evidence) -> Recipe | None:
    """Whole-column scales multiplied into the rounded sum rather than into the weights."""
    if e.given.weight.groups > 1 or e.recipe.weights == "integer":
        return None
    return rebuilt(e.recipe, output=lambda o: replace(o, scale=True), weights="integer")


def scale_before_dot(e: Evidence) -> Recipe | None:
    """ExLlama with fp32 multiply-adds of rounded weights for its fp16 dots."""

    def node(n: Node) -> Node:
        return chain(Fma(), unfold(n.walk)) if isinstance(n, Chain) and isinstance(n.step, HalfDot) else n

    return rebuilt(e.recipe, lambda t: mapped(t, node), weights="rounded") if _has(e.recipe, HalfDot) else None


def weights(to: str, of: str) -> Rewrite:
    return lambda e: rebuilt(e.recipe, weights=to) if e.recipe.weights == of and not e.given.weight.symmetric else None


def fused_symmetric(e: Evidence) -> Recipe | None:
    weight = e.given.weight
    exact = weight.symmetric and bool(torch.isfinite(8 * weight.scales).all())
    return rebuilt(e.recipe, weights="fused") if exact and e.recipe.weights == "rounded" else None


def unscaled(e: Evidence) -> Recipe | None:
    return rebuilt(e.recipe, output=lambda o: replace(o, scale=False, bias="added" if o.bias == "fused" else o.bias))


def bias(to: str) -> Rewrite:
    def output(o: Output) -> Output:
        return replace(o, bias=to) if o.scale and o.bias != "none" else o  # type: ignore[arg-type]

    return lambda e: rebuilt(e.recipe, output=output)


def fewer_sms(e: Evidence) -> Recipe | None:
    other = recipe(e.kernel, e.problem, replace(e.gpu, sms=108))
    return None if other.hash == e.recipe.hash else other


def other_reduction(e: Evidence) -> Recipe | None:
    """Marlin's pieces handed on in the activations' dtype for fp32, and back."""
    name = e.kernel.removesuffix(".fp16")
    if not name.startswith("vllm.marlin.") or name.endswith(".atomic"):
        return None
    other = recipe(f"{name}.fp16" if name == e.kernel else name, e.problem, e.gpu)
    return None if other.hash == e.recipe.hash else other


def top_to_bottom(e: Evidence) -> Recipe | None:
    """Pieces of an output joined in the other order: from the first k for Marlin, from the last for Machete."""
    if not e.kernel.startswith(("vllm.marlin.", "vllm.machete.")):
        return None

    def tree(t: Node) -> Node:
        pieces = sorted(_pieces(t), key=_first_k, reverse=e.kernel.startswith("vllm.machete."))
        return join(pieces) if len(pieces) > 2 else t

    return rebuilt(e.recipe, tree)


def _pieces(tree: Node) -> list[Node]:
    """The sums of thread blocks under a tree of joins: chains that interleave belong to one block."""
    chains = sorted((n for n in nodes(tree) if isinstance(n, Chain)), key=_first_k)
    if not isinstance(tree, Join) or any(isinstance(n, Round | Unordered) for n in nodes(tree)):
        return []
    blocks: list[list[Chain]] = []
    end = -1
    for c in chains:
        k = unfold(c.walk)
        if int(k.min()) > end:
            blocks.append([])
        blocks[-1].append(c)
        end = max(end, int(k.max())) if len(blocks[-1]) > 1 else int(k.max())
    return [_block(b) for b in blocks]


def _block(chains: list[Chain]) -> Node:
    """Marlin's ``acc0 + (acc1 + (acc3 + acc2))``."""
    total: Node = chains[-1]
    for c in reversed(chains[:-1]):
        total = join((c, total))
    return total


def _first_k(node: Node) -> int:
    return min(int(unfold(n.walk).min()) for n in nodes(node) if isinstance(n, Chain))


def sum_in_turn(e: Evidence) -> Recipe | None:
    """Eight partial sums added one after the other, where PyTorch keeps four accumulators."""
    return _partials(e, lambda parts: parts)


def sum_in_pairs(e: Evidence) -> Recipe | None:
    return _partials(e, pairs)


def _partials(e: Evidence, order: Callable[[list[Node]], list[Node]]) -> Recipe | None:
    if e.kernel not in ("vllm.awq_gemm", "vllm.awq_triton"):
        return None

    def tree(t: Node) -> Node:
        kinds: tuple[type, ...] = (Round,) if e.kernel == "vllm.awq_gemm" else (Chain,)
        parts = order(sorted((n for n in nodes(t) if isinstance(n, kinds) and _filled(n)), key=_first_k))
        return join([join(parts), zero(parts[0])])

    return rebuilt(e.recipe, tree)


def _filled(node: Node) -> bool:
    return any(len(n.walk) for n in nodes(node) if isinstance(n, Chain))


def rows(e: Evidence) -> Recipe | None:
    """Act-order rows in the checkpoint's order for the sorted one, and back."""
    if not e.problem.act_order:
        return None
    return rebuilt(e.recipe, rows="natural" if e.recipe.rows == "sorted" else "sorted")
