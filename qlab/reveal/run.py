"""From a name and a shape to the revealed element, beside the kernel's recipe."""

from __future__ import annotations

import time

import numpy as np

from qlab.recipe import WEIGHTS, Recipe, Region, key, plain
from qlab.recipes.build import type_name
from qlab.reveal.compare import difference, tree_hash
from qlab.reveal.find import add_scaling, find
from qlab.reveal.result import SCHEMA, Comparison, Found, Revealed
from qlab.reveal.subject import Asked, Subject, subject
from qlab.reveal.target import Called


def reveal(asked: Asked) -> Revealed:
    """Finds what one output element of a kernel is, and compares it with the kernel's recipe where there is one.

    Raises QlabError for what cannot be asked, RevealError where the answers fit no sum.
    """
    began = time.perf_counter()
    s = subject(asked)
    target = s.target(s.weight)
    found, calls = find(target), 0
    if s.scaled is not None:
        scaled = s.target(s.scaled)
        found, calls = add_scaling(found, scaled, asked.group_size), scaled.calls
    alike = target.alike() if isinstance(target, Called) else None
    out = type_name(target.out_dtype)
    return Revealed(
        schema=SCHEMA,
        kernel=s.kernel,
        source=s.source,
        native=s.native,
        gpu=s.gpu,
        M=asked.m,
        K=asked.k,
        N=asked.n,
        dtype=type_name(asked.dtype),
        group_size=asked.group_size,
        row=asked.row,
        column=asked.column,
        tree=plain(found.node),
        tree_hash=tree_hash(found.node, out),
        core=found.core,
        weights=found.weights or "",
        scale_after_sum=found.output.scale,
        ordered=found.ordered,
        exact=found.exact,
        evidence=found.evidence,
        assumed=found.assumed,
        alike=() if alike is None or not found.ordered else tuple(rectangles(alike)),
        calls=target.calls + calls,
        seconds=time.perf_counter() - began,
        comparison=_compared(found, s, alike if found.ordered else None),
    )


def _compared(found: Found, s: Subject, alike: np.ndarray | None) -> Comparison | None:
    if s.recipe is None or s.region is None or s.recipe.opaque:
        return None
    out = s.recipe.dtype
    differs = difference(found.node, s.region.tree, out)
    rules = ""
    if found.weights is not None:
        mine, theirs = (found.weights, found.output), (s.recipe.weights, s.region.output)
        symmetric = s.scaled is not None and s.scaled.symmetric
        if mine != theirs and not (symmetric and {mine[0], theirs[0]} == {"rounded", "fused"} and mine[1] == theirs[1]):
            rules = f"w = {WEIGHTS[mine[0]]}, {mine[1]} in place of w = {WEIGHTS[theirs[0]]}, {theirs[1]}"
    return Comparison(
        recipe=s.recipe.hash,
        gpu=s.gpu,
        tree_hash=tree_hash(s.region.tree, out),
        equal=differs is None and not rules,
        identical=key(found.node) == key(s.region.tree),
        rules=rules,
        difference=differs,
        region="" if alike is None else _fit(alike, s.recipe, s.region),
    )


def _fit(alike: np.ndarray, recipe: Recipe, region: Region) -> str:
    """Whether the elements that answered alike are the recipe's region."""
    mine = np.zeros((recipe.M, recipe.N), bool)
    for a, b in region.columns:
        mine[slice(*region.rows), a:b] = True
    inside, outside = int((alike & mine).sum()), int((alike & ~mine).sum())
    if inside == mine.sum() and not outside:
        return f"exactly the {inside} elements of the recipe's region answered alike"
    return f"{inside} of the {int(mine.sum())} elements of the recipe's region answered alike, and {outside} outside of it"


def rectangles(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(row, stop, column, stop) of the True elements: equal rows together, runs of columns."""
    out = []
    i = 0
    while i < len(mask):
        j = i + 1
        while j < len(mask) and (mask[j] == mask[i]).all():
            j += 1
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[i].astype(np.int8), [0]])))
        out += [(i, j, int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        i = j
    return out
