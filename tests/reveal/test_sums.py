"""Sums written in Python, of which the tree is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlab.recipe import Chain, Fma, Join, Node, chain, join, unfold
from qlab.reveal import Called, Found, RevealError, difference, find
from qlab.reveal.topology import leaves

Shape = int | frozenset["Shape"]


def shape(node: Node) -> Shape:
    """A node of fma chains and joins as nested pairs without order."""
    if isinstance(node, Chain):
        assert isinstance(node.step, Fma)
        first, *rest = (int(k) for k in unfold(node.walk))
        parts: list[Shape] = [first, *rest]
    else:
        assert isinstance(node, Join)
        parts = [shape(p) for p in node.parts]
    total = parts[0]
    for part in parts[1:]:
        total = frozenset((total, part))
    return total


def asked(function: Callable[[Tensor], Tensor], k: int, dtype: torch.dtype = torch.float32) -> Found:
    return find(Called(lambda x: function(x[0]).reshape(1, 1), 1, k, dtype))


@st.composite
def trees(draw: st.DrawFn) -> object:
    """Nested pairs over 3 to 12 leaves in any order."""
    parts: list[object] = list(draw(st.permutations(range(draw(st.integers(3, 12))))))
    while len(parts) > 1:
        a = parts.pop(draw(st.integers(0, len(parts) - 1)))
        b = parts.pop(draw(st.integers(0, len(parts) - 1)))
        parts.append((a, b))
    return parts[0]


def add(tree: object, x: Tensor) -> Tensor:
    return x[tree] if isinstance(tree, int) else add(tree[0], x) + add(tree[1], x)  # type: ignore[index]


def unordered(tree: object) -> Shape:
    return tree if isinstance(tree, int) else frozenset(unordered(t) for t in tree)  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(trees())
def test_any_binary_tree_in_fp32(tree: object) -> None:
    found = asked(lambda x: add(tree, x), len(list(leaves(tree))))  # type: ignore[arg-type]
    assert shape(found.node) == unordered(tree)
    assert found.ordered
    assert found.exact is None  # no engine replays fp32 activations


def sequential(x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for v in x:
        total = total + v
    return total


def pairwise(x: Tensor) -> Tensor:
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]


def strided(x: Tensor) -> Tensor:
    return sequential(torch.stack([sequential(x[i::4]) for i in range(4)]))


@pytest.mark.parametrize("k", [5, 96, 200])
def test_a_sequential_sum(k: int) -> None:
    assert asked(sequential, k).node == chain(Fma(), range(k))


def test_a_sum_in_turn_backwards() -> None:
    found = asked(lambda x: sequential(x.flip(0)), 96).node
    assert difference(found, chain(Fma(), range(96)[::-1]), "fp32") is None
    assert difference(found, chain(Fma(), range(96)), "fp32") is not None


def test_a_pairwise_sum() -> None:
    def node(start: int, stop: int) -> Node:
        middle = (start + stop) // 2
        return chain(Fma(), [start, middle]) if stop - start == 2 else join([node(start, middle), node(middle, stop)])

    assert difference(asked(pairwise, 128).node, node(0, 128), "fp32") is None


def test_four_sums_of_every_fourth() -> None:
    found = asked(strided, 96)
    assert difference(found.node, join([chain(Fma(), range(i, 96, 4)) for i in range(4)]), "fp32") is None


def test_a_sum_in_half_precision() -> None:
    found = asked(sequential, 80, torch.float16)
    assert found.node == chain(Fma("fp16"), range(80))
    assert found.exact


def test_matmul_on_the_cpu() -> None:
    """Whatever the library does, replaying what was found gives its bits."""
    ones = torch.ones((96, 8), dtype=torch.float16)
    assert find(Called(lambda x: x @ ones, 2, 96, torch.float16)).exact


def test_an_exact_sum_has_no_order() -> None:
    with pytest.raises(RevealError, match="has no order to reveal"):
        asked(lambda x: x.double().sum().half(), 64, torch.float16)


def test_weights_that_are_not_one() -> None:
    with pytest.raises(RevealError, match="are the weights all 1"):
        asked(lambda x: 3 * sequential(x), 16)


def test_elements_that_answer_alike() -> None:
    def two(x: Tensor) -> Tensor:
        a, b = sequential(x[0]), sequential(x[0].flip(0))
        return torch.stack([torch.stack([a, a, b]), torch.stack([a, b, b])])

    target = Called(two, 2, 40, torch.float32)
    find(target)
    assert target.alike().tolist() == [[True, True, False], [True, False, False]]
