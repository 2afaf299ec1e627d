"""Recipes: equal functions have equal hashes, different functions different ones, and data survives JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.errors import QlabError
from qlab.hardware import AMPERE, HOPPER
from qlab.recipe import (
    Chain,
    Fma,
    HalfDot,
    Join,
    Node,
    Opaque,
    Output,
    Recipe,
    Round,
    Run,
    TensorCore,
    Tile,
    Type,
    Unordered,
    chain,
    fold,
    join,
    key,
    node_from_plain,
    nodes,
    plain,
    rounded,
    unfold,
    unordered,
    value_type,
    zero,
)
from qlab.weights import round_once

MMA = TensorCore.of(HOPPER)
HALF_MMA = TensorCore.of(AMPERE, "fp16")
FMA, HALF_FMA = Fma(), Fma("fp16")
TORCH: dict[Type, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def leaf(i: int) -> Chain:
    return chain(FMA, [i])


def half(i: int, type: Type = "fp16") -> Node:
    return rounded(leaf(i), type)


def recipe(tree: Node, *, k: int = 64, dtype: Type = "fp16", **arguments: Any) -> Recipe:
    return Recipe.of(2, k, 8, dtype, [Tile((0, 2), (0, 8), tree)], **arguments)


# Orders of k


stretches = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20), st.integers(1, 5), st.integers(-30, 30)), max_size=12)


@given(st.one_of(st.permutations(range(40)), st.lists(st.integers(0, 30), max_size=60)))
def test_fold_and_unfold_any_sequence(order: list[int]) -> None:
    walk = fold(order)
    assert unfold(walk).tolist() == order
    assert unfold(walk).dtype == np.int32
    assert fold(np.array(order, np.int32)) == walk


@given(stretches)
def test_fold_is_a_function_of_the_sequence_alone(runs: list[tuple[int, int, int, int]]) -> None:
    """However it was written as runs, a sequence has one walk."""
    order = unfold(tuple(Run(*r) for r in runs))
    assert unfold(fold(order)).tolist() == order.tolist()
    assert fold(unfold(fold(order))) == fold(order)
    split = tuple(Run(int(k), 1) for k in order)
    assert fold(unfold(split)) == fold(order)


def test_fold_reads_well() -> None:
    assert fold(range(4096)) == (Run(0, 4096),)
    assert fold([0, 1, 8, 9, 16, 17]) == (Run(0, 2, 3, 8),)
    assert fold([3, 2, 1, 0]) == (Run(3, 1, 4, -1),)
    assert fold([5, 5, 5]) == (Run(5, 1, 3, 0),)
    assert fold([0, 1, 4, 5, 2, 3]) == (Run(0, 2, 2, 4), Run(2, 2))
    assert fold([]) == ()
    assert str(Run(0, 32, 4, 128)) == "0:32 +128 x4"
    assert all(type(v) is int for r in fold(np.arange(8)) for v in (r.start, r.length, r.count, r.stride))


# Trees


def test_order_inside_a_fused_sum_does_not_count() -> None:
    rng = np.random.default_rng(0)
    k = rng.permutation(64).reshape(-1, MMA.terms)
    shuffled = rng.permuted(k, axis=1)
    assert chain(MMA, k.ravel()) == chain(MMA, shuffled.ravel())
    assert chain(HALF_MMA, k.ravel()) == chain(HALF_MMA, rng.permuted(k.reshape(-1, 8), axis=1).ravel())
    # Between fused sums, and in every other step, it does.
    assert chain(MMA, k.ravel()) != chain(MMA, k[::-1].ravel())
    for step in (FMA, HALF_FMA, HalfDot()):
        assert chain(step, k.ravel()) != chain(step, shuffled.ravel())
    assert chain(HalfDot(), range(8)) != chain(HalfDot(), [2, 1, 0, 3, 4, 5, 6, 7])
    # A sum of 16 and two sums of 8 differ, even over the same k.
    two = TensorCore(MMA.fraction_bits, 8, MMA.zero_exponent)
    assert key(chain(MMA, k.ravel())) != key(chain(two, k.ravel()))


def test_join_commutes_its_first_two_alone() -> None:
    a, b, c = leaf(0), leaf(1), leaf(2)
    assert join([a, b]) == join([b, a])
    assert join([a, b, c]) == join([b, a, c])
    assert len({key(join(p)) for p in ([a, b, c], [a, c, b], [b, c, a])}) == 3
    assert join([a, b], "fp32") != join([half(0), half(1)], "fp16")


def test_join_flattens_what_leads_and_never_re_associates() -> None:
    a, b, c, d = map(leaf, range(4))
    flat = join([a, b, c, d])
    assert join([join([a, b]), c, d]) == flat
    assert join([c, join([a, b]), d]) == flat  # commuted, then flattened
    assert join([join([join([b, a]), c]), d]) == flat
    assert join([a, join([b, c])]) == join([b, c, a]) != flat
    pairs = join([join([a, b]), join([c, d])])
    assert pairs != flat
    assert pairs == join([join([d, c]), join([b, a])])
    # The last addition of a flat join commutes, too: (a + b) + (c + d) with either sum in front.
    assert pairs == join([a, b, join([c, d])]) == join([c, d, join([a, b])])
    assert key(join([join([a, b]), c, join([d, leaf(4)])])) != key(join([a, b, c, d, leaf(4)]))
    # A join in another type, or under a rounding, is a value of its own.
    halves = join([half(0), half(1)], "fp16")
    assert isinstance(join([halves, half(2)], "fp32"), Join)
    assert len(join([halves, half(2)], "fp32").parts) == 2
    assert len(join([rounded(join([a, b]), "fp16"), half(2)], "fp16").parts) == 2


def test_join_of_one_part_is_the_part() -> None:
    assert join([leaf(0)]) == leaf(0)
    assert join([half(0)], "fp16") == half(0)
    assert join([half(0)]) == half(0)


@pytest.mark.parametrize("make", [join, unordered])
def test_sums_take_parts_of_their_own_type(make: Callable[..., Node]) -> None:
    """An fp16 sum of fp32 values would be rounded twice where an engine adds in fp32, and alone not at all."""
    for parts, type in ([leaf(0), leaf(1)], "fp16"), ([half(0), half(1)], "bf16"), ([leaf(0)], "fp16"), ([], "fp32"):
        with pytest.raises(QlabError, match=f"a sum in {type} needs parts"):
            make(parts, type)
    with pytest.raises(QlabError, match="a sum in fp64"):
        make([leaf(0), leaf(1)], "fp64")
    assert value_type(make([half(0), chain(HALF_FMA, [1])], "fp16")) == "fp16"


def test_rounding_vanishes_where_it_changes_nothing() -> None:
    assert rounded(leaf(0), "fp32") == leaf(0)
    assert rounded(half(0), "fp16") == half(0)
    assert rounded(chain(HALF_FMA, [0]), "fp16") == chain(HALF_FMA, [0])
    assert rounded(join([half(0), half(1)], "fp16"), "fp16") == join([half(0), half(1)], "fp16")
    assert rounded(half(0), "fp32") == half(0)
    assert rounded(Opaque("cuBLAS"), "fp16") == Opaque("cuBLAS")
    # And nowhere else: neither of fp16 and bf16 holds the other, and rounding twice is not rounding once.
    twice = rounded(half(0, "bf16"), "fp16")
    assert twice == Round(Round(leaf(0), "bf16"), "fp16")
    assert len({key(n) for n in (twice, half(0), half(0, "bf16"), leaf(0))}) == 4
    assert rounded(join([half(0), half(1)], "fp32"), "fp16") == Round(join([half(0), half(1)]), "fp16")


def test_the_last_rounding_is_the_outputs() -> None:
    assert recipe(half(0)).hash == recipe(leaf(0)).hash
    assert recipe(half(0), dtype="bf16").hash != recipe(leaf(0), dtype="bf16").hash
    assert recipe(rounded(half(0, "bf16"), "fp16")).hash == recipe(half(0, "bf16")).hash != recipe(leaf(0)).hash


def test_atomics_have_no_order_but_start_at_zero() -> None:
    a, b, c = half(0), half(1), half(2)
    assert unordered([a, b, c], "fp16") == unordered([c, a, b], "fp16")
    assert unordered([a, a, b], "fp16") != unordered([a, b], "fp16")
    assert recipe(unordered([a, b], "fp16")).ordered
    assert not recipe(unordered([a, b, c], "fp16")).ordered
    # 0 + -0 is +0, and -0 + -0 is -0: the only difference to a join.
    assert unordered([a, b], "fp16") != join([a, b], "fp16")
    assert unordered([a], "fp16") != a
    assert len({key(unordered([a, b], "fp16", scaled=s)) for s in (False, True)}) == 2
    assert join([unordered([a, b, c], "fp16"), half(3)], "fp16").parts[0] in (half(3), unordered([c, b, a], "fp16"))


def test_zero_is_a_chain_over_nothing() -> None:
    tree = rounded(join([chain(MMA, range(16)), chain(MMA, range(16, 32))]), "fp16")
    assert zero(tree) == chain(MMA, [])
    assert join([leaf(0), zero(leaf(0))]) != leaf(0)  # it turns -0 into +0


def test_what_is_no_chain() -> None:
    with pytest.raises(QlabError, match="a chain over 24 k does not divide into steps of 16"):
        chain(MMA, range(24))
    for step in (Fma("bf16"), TensorCore(24, 0, -132), TensorCore(24, 8, -132, "bf16"), HalfDot(7)):
        with pytest.raises(QlabError, match="no step of a chain"):
            chain(step, range(56))


def test_values_and_nodes() -> None:
    tree = join([chain(HALF_MMA, range(8)), rounded(join([leaf(8), unordered([half(9)], "fp16")]), "fp16")], "fp32")
    assert value_type(tree) == "fp32"
    assert [value_type(n) for n in nodes(tree)].count("fp16") == 4
    assert sum(isinstance(n, Chain) for n in nodes(tree)) == 3
    assert value_type(Opaque("x")) is None
    with pytest.raises(FrozenInstanceError):
        tree.type = "fp16"  # type: ignore[union-attr, misc]


# The normal form computes what was written down


Spec = tuple[Any, ...]
narrow = st.sampled_from(["fp16", "bf16"])
specs: st.SearchStrategy[Spec] = st.recursive(
    st.tuples(st.just("leaf"), st.integers(0, 5)),
    lambda inner: st.one_of(
        st.tuples(st.just("join"), st.sampled_from(["fp32", "fp32", "fp16", "bf16"]), st.lists(inner, min_size=1, max_size=4)),
        st.tuples(st.just("round"), st.sampled_from(["fp32", "fp16", "bf16"]), inner),
        st.tuples(st.just("atomics"), narrow, st.lists(inner, min_size=1, max_size=2), st.booleans()),
    ),
    max_leaves=10,
)


def build(spec: Spec) -> Node:
    match spec:
        case ("leaf", i):
            return leaf(i)
        case ("round", type, part):
            return rounded(build(part), type)
        case ("join", type, parts):
            return join([rounded(build(p), type) for p in parts], type)
    _, type, parts, scaled = spec
    return unordered([rounded(build(p), type) for p in parts], type, scaled=scaled)


def to(type: Type, x: torch.Tensor) -> torch.Tensor:
    return round_once(x, TORCH[type]).double()


def add(type: Type, parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0]
    for p in parts[1:]:
        total = to(type, total + p)
    return total


def spec_value(spec: Spec, leaves: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What a specification says, every rounding carried out, no rule of the normal form used."""
    match spec:
        case ("leaf", i):
            return leaves[i]
        case ("round", type, part):
            return to(type, spec_value(part, leaves, scale))
        case ("join", type, parts):
            return add(type, [to(type, spec_value(p, leaves, scale)) for p in parts])
    _, type, parts, scaled = spec
    values = [to(type, spec_value(p, leaves, scale)) for p in parts]
    return add(type, [torch.zeros_like(leaves[0]), *(to(type, v * scale) if scaled else v for v in values)])


def node_value(node: Node, leaves: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    match node:
        case Chain():
            return leaves[node.walk[0].start]
        case Round():
            return to(node.type, node_value(node.node, leaves, scale))
        case Join():
            return add(node.type, [node_value(p, leaves, scale) for p in node.parts])
        case Unordered():
            parts = [node_value(p, leaves, scale) for p in node.parts]
            parts = [to(node.type, p * scale) for p in parts] if node.scaled else parts
            return add(node.type, [torch.zeros_like(leaves[0]), *parts])
    raise AssertionError(node)


def leaf_values(seed: int) -> torch.Tensor:
    """[6, 64] fp32 values over a range in which fp16 sums cancel, round, underflow and overflow."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 64, generator=g) * torch.exp2(torch.randint(-27, 17, (6, 64), generator=g))
    values[:, :6] = torch.tensor([-0.0, -1e-9, 70000.0, float("inf"), 1 + 2**-11, 2**-25])
    values[:, 6:14] = torch.randint(-1, 2, (6, 8), generator=g) * 2.0**-24 - 0.0
    return values.double()


@settings(max_examples=300, deadline=None)
@given(specs, st.integers(0, 3))
def test_normal_form_computes_what_was_written(spec: Spec, seed: int) -> None:
    leaves, scale = leaf_values(seed), torch.tensor(0.3).half().double()
    want, got = spec_value(spec, leaves, scale), node_value(build(spec), leaves, scale)
    same = (want == got) & (want.signbit() == got.signbit()) | (want.isnan() & got.isnan())
    assert bool(same.all()), (spec, leaves[:, ~same][:, 0])


@settings(max_examples=200, deadline=None)
@given(specs, st.data())
def test_rewriting_that_changes_nothing_keeps_the_tree(spec: Spec, data: st.DataObject) -> None:
    """First two parts swapped, leading joins of one type nested or flattened, roundings doubled, atomics shuffled."""

    def rewrite(spec: Spec) -> Spec:
        match spec:
            case ("leaf", _):
                return spec
            case ("round", type, part):
                again = ("round", type, rewrite(part))
                return ("round", type, again) if data.draw(st.booleans()) else again
            case ("join", type, parts):
                parts = [rewrite(p) for p in parts]
                if data.draw(st.booleans()):
                    parts[:2] = parts[1::-1]
                if len(parts) > 2 and data.draw(st.booleans()):
                    parts = [("join", type, parts[:-1]), parts[-1]]
                return ("join", type, parts)
        name, type, parts, scaled = spec
        return (name, type, data.draw(st.permutations([rewrite(p) for p in parts])), scaled)

    tree = build(spec)
    assert key(build(rewrite(spec))) == key(tree)
    assert node_from_plain(json.loads(key(tree))) == tree


# Regions


def cuts(draw: st.DrawFn, size: int) -> list[int]:
    return [0, *sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))), size]


Labels = list[list[int]]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[list[int], list[int], Labels]:
    """Cuts of rows and of columns, and a label for each cell."""
    rows, columns = cuts(draw, 12), cuts(draw, 20)
    cells = st.lists(st.integers(0, 2), min_size=len(columns) - 1, max_size=len(columns) - 1)
    return rows, columns, draw(st.lists(cells, min_size=len(rows) - 1, max_size=len(rows) - 1))


TREES = [(leaf(0), Output()), (leaf(1), Output()), (leaf(1), Output(True))]


def shattered(tiling: tuple[list[int], list[int], Labels], draw: Callable[[st.SearchStrategy[Any]], Any]) -> list[Tile]:
    """Each cell cut at random, trees made anew, all shuffled."""
    rows, columns, labels = tiling
    across = list(enumerate(pairwise(columns)))
    work = [(a, b, c, d, labels[i][j]) for i, (a, b) in enumerate(pairwise(rows)) for j, (c, d) in across]
    tiles = []
    while work:
        a, b, c, d, label = work.pop()
        at = draw(st.integers(0, 40))
        if a < at < b:
            work += [(a, at, c, d, label), (at, b, c, d, label)]
        elif c < at - 12 < d:
            work += [(a, b, c, at - 12, label), (a, b, at - 12, d, label)]
        else:
            tree, output = TREES[label]
            tiles.append(Tile((a, b), (c, d), copy.deepcopy(tree), output))
    return list(draw(st.permutations(tiles)))


def labels_at(tiling: tuple[list[int], list[int], Labels]) -> np.ndarray:
    rows, columns, labels = tiling
    return np.repeat(np.repeat(np.array(labels), np.diff(rows), axis=0), np.diff(columns), axis=1)


@settings(max_examples=150, deadline=None)
@given(tilings(), st.data())
def test_cutting_and_order_of_tiles_do_not_count(tiling: tuple[list[int], list[int], Labels], data: st.DataObject) -> None:
    one, other = (Recipe.of(12, 64, 20, "fp16", shattered(tiling, data.draw)) for _ in range(2))
    assert one.hash == other.hash
    assert one.regions == other.regions
    assert Recipe.from_plain(json.loads(json.dumps(one.plain()))) == one
    painted = np.full((12, 20), -1)
    for r in one.regions:
        for c in r.columns:
            cell = painted[slice(*r.rows), slice(*c)]
            assert (cell == -1).all()
            cell[:] = TREES.index((r.tree, r.output))
    assert np.array_equal(painted, labels_at(tiling))


@settings(max_examples=100, deadline=None)
@given(tilings(), tilings(), st.data())
def test_hashes_are_equal_where_outputs_are(one: Any, other: Any, data: st.DataObject) -> None:
    a, b = (Recipe.of(12, 64, 20, "fp16", shattered(t, data.draw)) for t in (one, other))
    assert (a.hash == b.hash) == np.array_equal(labels_at(one), labels_at(other))


def test_neighbours_with_one_tree_are_one_region() -> None:
    tiles = [Tile((r, r + 4), (c, c + 4), leaf(0)) for r in (0, 4) for c in (0, 4, 8)]
    (region,) = Recipe.of(8, 64, 12, "fp16", tiles).regions
    assert (region.rows, region.columns) == ((0, 8), ((0, 12),))
    tiles[1] = Tile((0, 4), (4, 8), leaf(1))
    assert [(r.rows, r.columns) for r in Recipe.of(8, 64, 12, "fp16", tiles).regions] == [
        ((0, 4), ((0, 4), (8, 12))),
        ((0, 4), ((4, 8),)),
        ((4, 8), ((0, 12),)),
    ]


def test_trees_made_on_the_fly_do_not_alias() -> None:
    """Trees that die between tiles may get one address; each tile still keeps its own."""
    r = Recipe.of(1, 1000, 1000, "fp16", (Tile((0, 1), (i, i + 1), chain(FMA, [i])) for i in range(1000)))
    assert [region.tree for region in r.regions] == [chain(FMA, [i]) for i in range(1000)]


TILE = ((0, 4), (0, 8))
REFUSED: list[tuple[list[tuple[tuple[int, int], tuple[int, int]]], str]] = [
    ([], "the tiles leave a part of the 4 x 8 output without a sum"),
    ([((0, 4), (0, 7))], "the tiles leave a part of the 4 x 8 output without a sum"),
    ([((0, 2), (0, 8)), ((2, 4), (0, 4)), ((3, 4), (4, 8))], "leave a part"),
    ([TILE, ((1, 2), (3, 4))], "the tile of rows 1:2, columns 3:4 overlaps another"),
    ([TILE, TILE], "the tile of rows 0:4, columns 0:8 overlaps another"),
    ([((0, 4), (0, 9))], "the tile of rows 0:4, columns 0:9 is empty or leaves the 4 x 8 output"),
    ([TILE, ((4, 5), (0, 8))], "the tile of rows 4:5, columns 0:8 is empty or leaves"),
    ([((-1, 4), (0, 8))], "the tile of rows -1:4, columns 0:8 is empty or leaves"),
    ([((0, 4), (-8, 8))], "the tile of rows 0:4, columns -8:8 is empty or leaves"),
    ([TILE, ((2, 2), (0, 8))], "the tile of rows 2:2, columns 0:8 is empty or leaves"),
    ([((4, 0), (0, 8))], "the tile of rows 4:0, columns 0:8 is empty or leaves"),
]


@pytest.mark.parametrize(("places", "sentence"), REFUSED, ids=[s for _, s in REFUSED])
def test_tiles_that_do_not_fit(places: list[tuple[tuple[int, int], tuple[int, int]]], sentence: str) -> None:
    with pytest.raises(QlabError, match=sentence):
        Recipe.of(4, 64, 8, "fp16", [Tile(rows, columns, leaf(0)) for rows, columns in places])


def test_what_is_no_recipe() -> None:
    for k in (-1, 64):
        with pytest.raises(QlabError, match="leaves the rows 0:64 of the weight"):
            recipe(join([leaf(3), Chain(FMA, (Run(k, 1),))]))
    with pytest.raises(QlabError, match="no tensor core adds products of bf16 numbers in fp16"):
        recipe(chain(HALF_MMA, range(64)), dtype="bf16")
    with pytest.raises(QlabError, match="no recipe has dtype 'fp32'"):
        recipe(leaf(0), dtype="fp32")
    with pytest.raises(QlabError, match="weights 'dense'"):
        recipe(leaf(0), weights="dense")
    for arguments in (False, "fused"), (True, "twice"):
        with pytest.raises(QlabError, match="no output rule"):
            Output(*arguments)


# Hash and JSON


def full() -> Recipe:
    """A recipe with every kind of node, step and rule."""
    mma = join([chain(MMA, range(32)), rounded(chain(MMA, range(32, 64)), "fp16")])
    dots = unordered([rounded(chain(HalfDot(), range(i, i + 16)), "fp16") for i in (0, 16, 32, 48)], "fp16")
    half_sums = join([chain(HALF_MMA, range(32)), chain(HALF_FMA, range(32, 64))], "fp16")
    tiles = [
        Tile((0, 8), (0, 64), mma, Output(True, "fused")),
        Tile((0, 8), (64, 128), mma, Output(True, "added")),
        Tile((8, 16), (0, 96), dots),
        Tile((8, 16), (96, 128), Opaque("cuBLAS")),
        Tile((16, 20), (0, 128), join([half_sums, leaf(5)]), Output(False, "added")),
    ]
    return Recipe.of(20, 64, 128, "fp16", tiles, weights="integer", rows="sorted")


def test_json_round_trip() -> None:
    r = full()
    back = Recipe.from_plain(json.loads(json.dumps(r.plain())))
    assert back == r
    assert back.hash == r.hash
    assert back.plain() == r.plain()
    assert (r.opaque, r.ordered) == ("cuBLAS", False)
    assert r.plain()["trees"].count(plain(r.regions[0].tree)) == 1  # shared by two regions
    for region in r.regions:
        assert node_from_plain(plain(region.tree)) == region.tree


def test_hash_is_stable() -> None:
    """A change of these two is a change of the format, and wants another SCHEMA."""
    assert full().hash == "02e9554607a9324f2a55d25c28f2d520ef2b2d203a7004b4643d0e702f18f5f5"
    marlin_like = join([chain(MMA, np.arange(64).reshape(2, 32)[i]) for i in range(2)])
    small = Recipe.of(1, 64, 64, "bf16", [Tile((0, 1), (0, 64), marlin_like)])
    assert small.hash == "163c513468959c8a3243fb399441a8491ae935b9c1be60faf96d71aa01011f26"


def test_everything_that_changes_the_function_changes_the_hash() -> None:
    order = np.arange(64)
    trees: list[Node] = [
        chain(MMA, order),
        chain(TensorCore(24, 16, -133), order),
        chain(TensorCore(25, 8, -133), order),
        chain(TensorCore(25, 16, -132), order),
        chain(TensorCore(25, 16, -133, "fp16"), order),
        chain(FMA, order),
        chain(HALF_FMA, order),
        chain(HalfDot(), order),
        chain(HalfDot(16), order),
        chain(MMA, np.roll(order, 16)),
        chain(MMA, order[:32]),
        join([chain(MMA, order[:32]), chain(MMA, order[32:])]),
        join([half(0), half(1)], "fp16"),
        join([half(0), half(1)], "fp32"),
        Opaque("a"),
        Opaque("b"),
    ]
    recipes = [recipe(t) for t in trees]
    tree = trees[0]
    recipes += [
        recipe(tree, dtype="bf16"),
        recipe(tree, weights="integer"),
        recipe(tree, weights="fused"),
        recipe(tree, rows="sorted"),
        recipe(tree, k=128),
        Recipe.of(1, 64, 8, "fp16", [Tile((0, 1), (0, 8), tree)]),
        Recipe.of(2, 64, 16, "fp16", [Tile((0, 2), (0, 16), tree)]),
    ]
    for output in Output(True), Output(False, "added"), Output(True, "added"), Output(True, "fused"):
        recipes.append(Recipe.of(2, 64, 8, "fp16", [Tile((0, 2), (0, 8), tree, output)]))
    assert len({r.hash for r in recipes}) == len(recipes)


def test_trees_not_in_normal_form_are_brought_into_it() -> None:
    data = recipe(join([leaf(0), leaf(1), leaf(2)])).plain()
    a, b, c = data["trees"][0][2]
    data["trees"][0] = ["join", "fp32", [c, ["join", "fp32", [b, a]]]]
    assert Recipe.from_plain(data).hash == recipe(join([leaf(0), leaf(1), leaf(2)])).hash
    data["trees"][0] = ["join", "fp32", [a]]
    assert Recipe.from_plain(data).hash == recipe(leaf(0)).hash
    data["trees"][0] = ["chain", ["mma", 25, 16, -133, "fp32"], [[8, 8, 1, 0], [0, 8, 1, 0], [16, 16, 1, 0]]]
    assert Recipe.from_plain(data).hash == recipe(chain(MMA, range(32))).hash


def spots(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside JSON data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for path in [path] if path] + [p for name, value in inner for p in spots(value, (*path, name))]


WHOLE = full().plain()
DAMAGE: list[Any] = [None, -1, 10**9, 10**30, 0.5, float("nan"), "x", [], [[]], {}, True, "drop"]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(spots(WHOLE)), st.sampled_from(DAMAGE))
def test_damaged_json_is_a_sentence(path: tuple[Any, ...], value: Any) -> None:
    """Damage is refused, or gives a sound recipe that survives its own round trip; nothing else happens."""
    data = copy.deepcopy(WHOLE)
    parent = data
    for step in path[:-1]:
        parent = parent[step]
    if value == "drop":
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    try:
        r = Recipe.from_plain(data)
    except QlabError:
        return
    assert Recipe.from_plain(json.loads(json.dumps(r.plain()))).hash == r.hash
    assert (r.hash == full().hash) == (r.plain() == WHOLE)


@pytest.mark.parametrize("data", [None, 3, "x", [], {}, {"schema": "qlab.recipe/0"}, {"schema": "qlab.recipe/1"}], ids=str)
def test_what_is_not_even_damaged(data: Any) -> None:
    with pytest.raises(QlabError, match=r"not a recipe|not 'qlab\.recipe/1'"):
        Recipe.from_plain(data)


def test_deep_nesting_in_json_is_a_sentence() -> None:
    data = full().plain()
    node: Any = data["trees"][0]
    for _ in range(5000):
        node = ["round", "bf16", node]
    data["trees"][0] = node
    with pytest.raises(QlabError, match="RecursionError"):
        Recipe.from_plain(data)
