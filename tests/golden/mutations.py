"""Deliberate errors in recipes, as rewrites of their trees: each must give other bits than the real kernels somewhere.

    python -m tests.golden.mutations [--recording DIR] [--enough 3]

prints, for each family of kernels, how many recorded problems catch an error and on how many it was tried. An error that
nothing can catch is listed with the proof that it changes no bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.record_golden import load
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
from tests.golden.truth import GOLDEN, SILICON, Evidence, golden, silicon

Rewrite = Callable[[Evidence], Recipe | None]
"""The wrong recipe for what a kernel computed; None where there is nothing to get wrong."""


@dataclass(frozen=True)
class Mutation:
    name: str
    rewrite: Rewrite
    equivalent: str = ""
    """Why it changes no bit, for one that does not."""


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
            Tile(r.rows, c, known.setdefault(id(r.tree), tree(r.tree)), output(r.output)) for r in said.regions for c in r.columns
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


def _fraction_bits(by: int) -> Rewrite:
    return steps(lambda s: replace(s, fraction_bits=s.fraction_bits + by))


def _zero_exponent(by: int, matters: bool) -> Rewrite:
    """e_zero moved, where the inputs and accumulators are such that it can matter, or where they are not."""
    move = steps(lambda s: replace(s, zero_exponent=s.zero_exponent + by))

    def go(e: Evidence) -> Recipe | None:
        fp32 = all(n.step.accumulator == "fp32" for r in e.recipe.regions for n in nodes(r.tree) if isinstance(n, Chain))
        return move(e) if (e.recipe.dtype == "fp16" and fp32) != matters else None

    return go


def _accumulator(step: TensorCore) -> TensorCore:
    return replace(step, accumulator="fp16" if step.accumulator == "fp32" else "fp32")


def _other_accumulator(e: Evidence) -> Recipe | None:
    """fp16 accumulators for fp32 and back; a bf16 kernel has no fp16 ones."""
    return steps(_accumulator)(e) if e.recipe.dtype == "fp16" else None


def _blocks(order: Callable[[np.ndarray], np.ndarray]) -> Rewrite:
    """The steps of each chain in another order."""

    def node(n: Node) -> Node:
        return chain(n.step, order(unfold(n.walk).reshape(-1, n.step.terms)).ravel()) if isinstance(n, Chain) else n

    return trees(node)


def _swap_last_blocks(blocks: np.ndarray) -> np.ndarray:
    return np.r_[blocks[:-2], blocks[-1:], blocks[-2:-1]] if len(blocks) > 2 else blocks


def _within_one_sum(n: Node) -> Node:
    if isinstance(n, Chain) and isinstance(n.step, TensorCore):
        return chain(n.step, unfold(n.walk).reshape(-1, n.step.terms)[:, ::-1].ravel())
    return n


def _joins(order: Callable[[list[Node]], list[Node]]) -> Rewrite:
    """The parts of each join of three or more in another order."""
    return trees(lambda n: join(order(list(n.parts)), n.type) if isinstance(n, Join) and len(n.parts) > 2 else n)


def _swap_last_two(parts: list[Node]) -> list[Node]:
    full = [i for i, p in enumerate(parts) if _filled(p)]
    if len(full) > 2:
        parts[full[-1]], parts[full[-2]] = parts[full[-2]], parts[full[-1]]
    return parts


def _pairs(parts: list[Node]) -> list[Node]:
    """Neighbours first."""
    while len(parts) > 2:
        parts = [join(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts


def _join_type(e: Evidence) -> Recipe | None:
    """Joins in the activations' dtype for fp32."""
    kind = e.recipe.dtype

    def node(n: Node) -> Node:
        return join([rounded(p, kind) for p in n.parts], kind) if isinstance(n, Join) and n.type == "fp32" else n

    return rebuilt(e.recipe, lambda t: mapped(t, node))


def _unrounded(n: Node) -> Node:
    return n.node if isinstance(n, Round) else n


def _without_rounding(e: Evidence) -> Recipe | None:
    """Partial sums kept in fp32; ExLlama's two atomic additions become one of fp32."""

    def node(n: Node) -> Node:
        if isinstance(n, Join):
            return join([_unrounded(p) for p in n.parts])
        if isinstance(n, Unordered) and len(n.parts) == 2 and not n.scaled:
            return join([_unrounded(p) for p in n.parts])
        return n

    return rebuilt(e.recipe, lambda t: mapped(t, node))


def _with_rounding(e: Evidence) -> Recipe | None:
    """Every part of a join rounded to the activations' dtype first."""
    kind = e.recipe.dtype

    def node(n: Node) -> Node:
        return join([rounded(p, kind) for p in n.parts], n.type) if isinstance(n, Join) else n

    return rebuilt(e.recipe, lambda t: mapped(t, node))


def _has(said: Recipe, kind: type) -> bool:
    return any(isinstance(n, Chain) and isinstance(n.step, kind) for r in said.regions for n in nodes(r.tree))


def _scale_before(e: Evidence) -> Recipe | None:
    """Whole-column scales multiplied into the weights rather than into the sum."""
    if e.recipe.weights != "integer" or _has(e.recipe, HalfDot) or any(r.output.bias == "fused" for r in e.recipe.regions):
        return None
    if any(isinstance(n, Unordered) and n.scaled for r in e.recipe.regions for n in nodes(r.tree)):
        return None
    return rebuilt(e.recipe, output=lambda o: replace(o, scale=False), weights="rounded")


def _scale_after(e: Evidence) -> Recipe | None:
    """Whole-column scales multiplied into the rounded sum rather than into the weights."""
    if e.given.weight.groups > 1 or e.recipe.weights == "integer":
        return None
    return rebuilt(e.recipe, output=lambda o: replace(o, scale=True), weights="integer")


def _scale_before_dot(e: Evidence) -> Recipe | None:
    """ExLlama with fp32 multiply-adds of rounded weights for its fp16 dots."""

    def node(n: Node) -> Node:
        return chain(Fma(), unfold(n.walk)) if isinstance(n, Chain) and isinstance(n.step, HalfDot) else n

    return rebuilt(e.recipe, lambda t: mapped(t, node), weights="rounded") if _has(e.recipe, HalfDot) else None


def _weights(to: str, of: str) -> Rewrite:
    return lambda e: rebuilt(e.recipe, weights=to) if e.recipe.weights == of and not e.given.weight.symmetric else None


def _fused_symmetric(e: Evidence) -> Recipe | None:
    weight = e.given.weight
    exact = weight.symmetric and bool(torch.isfinite(8 * weight.scales).all())
    return rebuilt(e.recipe, weights="fused") if exact and e.recipe.weights == "rounded" else None


def _unscaled(e: Evidence) -> Recipe | None:
    return rebuilt(e.recipe, output=lambda o: replace(o, scale=False, bias="added" if o.bias == "fused" else o.bias))


def _bias(to: str) -> Rewrite:
    def output(o: Output) -> Output:
        return replace(o, bias=to) if o.scale and o.bias != "none" else o  # type: ignore[arg-type]

    return lambda e: rebuilt(e.recipe, output=output)


def _fewer_sms(e: Evidence) -> Recipe | None:
    other = recipe(e.kernel, e.problem, replace(e.gpu, sms=108))
    return None if other.hash == e.recipe.hash else other


def _other_reduction(e: Evidence) -> Recipe | None:
    """Marlin's pieces handed on in the activations' dtype for fp32, and back."""
    name = e.kernel.removesuffix(".fp16")
    if not name.startswith("vllm.marlin.") or name.endswith(".atomic"):
        return None
    other = recipe(f"{name}.fp16" if name == e.kernel else name, e.problem, e.gpu)
    return None if other.hash == e.recipe.hash else other


def _top_to_bottom(e: Evidence) -> Recipe | None:
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


def _sum_in_turn(e: Evidence) -> Recipe | None:
    """Eight partial sums added one after the other, where PyTorch keeps four accumulators."""
    return _partials(e, lambda parts: parts)


def _sum_in_pairs(e: Evidence) -> Recipe | None:
    return _partials(e, _pairs)


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


def _rows(e: Evidence) -> Recipe | None:
    """Act-order rows in the checkpoint's order for the sorted one, and back."""
    if not e.problem.act_order:
        return None
    return rebuilt(e.recipe, rows="natural" if e.recipe.rows == "sorted" else "sorted")


MUTATIONS = (
    Mutation("F + 1", _fraction_bits(1)),
    Mutation("F - 1", _fraction_bits(-1)),
    Mutation("L halved", steps(lambda s: replace(s, terms=s.terms // 2))),
    Mutation("L doubled", steps(lambda s: replace(s, terms=s.terms * 2))),
    Mutation("accumulator fp16 for fp32 and back", _other_accumulator),
    Mutation("e_zero + 64 where zeros can be the largest term", _zero_exponent(64, True)),
    Mutation("steps of a chain from the last to the first", _blocks(lambda b: b[::-1])),
    Mutation("last two steps of a chain swapped", _blocks(_swap_last_blocks)),
    Mutation("last two parts of a join swapped", _joins(_swap_last_two)),
    Mutation("joins in pairs", _joins(_pairs)),
    Mutation("joins in the activations' dtype for fp32", _join_type),
    Mutation("rounding of partial sums dropped", _without_rounding),
    Mutation("rounding of partial sums added", _with_rounding),
    Mutation("whole-column scale before the sum", _scale_before),
    Mutation("whole-column scale after the sum", _scale_after),
    Mutation("ExLlama's scale before the dot", _scale_before_dot),
    Mutation("output scale dropped", _unscaled),
    Mutation("weights fused for rounded", _weights("fused", "rounded")),
    Mutation("weights rounded for fused", _weights("rounded", "fused")),
    Mutation("bias added for fused", _bias("added")),
    Mutation("bias fused for added", _bias("fused")),
    Mutation("108 SMs for 132", _fewer_sms),
    Mutation("Marlin's reduction fp16 for fp32 and back", _other_reduction),
    Mutation("pieces joined in the other order", _top_to_bottom),
    Mutation("torch.sum in turn", _sum_in_turn),
    Mutation("torch.sum in pairs", _sum_in_pairs),
    Mutation("act-order rows natural for sorted and back", _rows),
    Mutation(
        "e_zero + 64 with fp16 inputs and fp32 accumulators",
        _zero_exponent(64, False),
        "A zero term counts only through its exponent e_zero, and only when that is the largest. fp16 products have exponents "
        "from -28 on. Every sum is a multiple of 2^(its largest exponent - F), hence of 2^(-28 - F), so a nonzero accumulator "
        "has an exponent of -28 - F or more: -53 with F = 25. With e_zero = -133 + 64 = -69 some nonzero term is larger, and "
        "a sum of zeros alone is +0 whatever e_zero is.",
    ),
    Mutation(
        "order of k within one fused sum",
        trees(_within_one_sum),
        "The truncated terms of a fused sum are added exactly, as integers, and each is truncated below the largest exponent "
        "of all, so their order cannot matter. The normal form sorts them: it is the same recipe.",
    ),
    Mutation(
        "weights fused for rounded with the zero point 8",
        _fused_symmetric,
        "-8 * s is exact unless it overflows, so RN(q * s + RN(-8 * s)) is one rounding of (q - 8) * s, as is "
        "RN((q - 8) * s). Tried where 8 * s is finite.",
    ),
)


FAMILIES = {
    "marlin": "vllm.marlin.",
    "machete": "vllm.machete.",
    "awq_gemm": "vllm.awq_gemm",
    "ExLlama": "vllm.gptq_gemm",
    "awq_triton": "vllm.awq_triton",
    "triton": "triton.",
}
"""Families of kernels, by how their names begin."""


@dataclass
class Tally:
    """On how many problems an error was tried in one family, and how many of those caught it."""

    tried: int = 0
    caught: int = 0
    first: str = ""
    """The first that did."""


def tally(evidence: Iterable[Evidence], enough: int | None = None) -> dict[tuple[str, str], Tally]:
    """(mutation, family) of every mutation on every ordered record; equal recipes for one problem count once.

    One that ``enough`` problems have caught is tried no more, nor, after 20 times as many, one that none can catch.
    """
    found = {(m.name, family): Tally() for m in MUTATIONS for family in FAMILIES}
    known: set[tuple[str, str, str]] = set()
    for e in evidence:
        family = next(f for f, start in FAMILIES.items() if e.kernel.startswith(start))
        key = (family, e.name, e.recipe.hash)
        if not e.recipe.ordered or key in known:
            continue
        known.add(key)
        for m in MUTATIONS:
            t = found[m.name, family]
            if enough is not None and (t.caught >= enough or (m.equivalent and t.tried >= 20 * enough)):
                continue
            wrong = m.rewrite(e)
            if wrong is None or not wrong.ordered:
                continue
            t.tried += 1
            if e.fault(wrong):
                t.caught += 1
                t.first = t.first or f"{e.kernel} on {e.name}"
    return found


def ground_truth(folder: Path, most: int = 1 << 23) -> Iterator[Evidence]:
    """A golden recording, or a large one, in ``folder``; problems of at most ``most`` products."""
    found = golden(*load(folder)) if (folder / "golden.json").exists() else silicon(folder, 300_000)
    return (e for e in found if e.products <= most)


def recording() -> Path:
    """The golden recording, or, before there is one, the H100's large recording."""
    return GOLDEN if (GOLDEN / "golden.json").exists() else SILICON / "h100"


def show(found: dict[tuple[str, str], Tally]) -> None:
    """Caught of tried, by error and family."""
    table = Table("error in the recipe", *FAMILIES, box=box.SIMPLE_HEAD)
    for m in MUTATIONS:
        cells = [found[m.name, family] for family in FAMILIES]
        table.add_row(m.name, *(f"{t.caught} of {t.tried}" if t.tried else "" for t in cells))
    Console(width=150).print(table)
    for m in MUTATIONS:
        if m.equivalent:
            print(f"{m.name}: changes no bit. {m.equivalent}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, default=recording(), help="folder with golden.json or silicon.json")
    parser.add_argument("--enough", type=int, help="try an error in a family until so many problems have caught it")
    options = parser.parse_args()
    show(tally(ground_truth(options.recording), options.enough))


if __name__ == "__main__":
    main()
