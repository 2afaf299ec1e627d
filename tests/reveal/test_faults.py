"""Faults planted in a recipe: each must be found, named, and put where it was planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qlab.recipe import Chain, Fma, HalfDot, Join, Node, TensorCore, chain, join, rounded, unfold
from qlab.reveal import Found, difference
from qlab.reveal.compare import Difference
from tests.reveal.conftest import change_chain, region, reveal_tree

K = 512
TREE = region("vllm.marlin.gptq", 1, K, 256)[1].tree
MIDDLE = 288
"""Where a chain starts that no sampled stretch holds."""


def core(step: object) -> TensorCore:
    assert isinstance(step, TensorCore)
    return step


def swapped(c: Chain) -> Node:
    k = unfold(c.walk)
    k[[3, 20]] = k[[20, 3]]
    return chain(c.step, k)


def narrow(c: Chain) -> Node:
    return Chain(replace(core(c.step), accumulator="fp16", zero_exponent=-21), c.walk)


FAULTS: dict[str, tuple[Callable[[Chain], Node], str]] = {
    "F": (lambda c: Chain(replace(core(c.step), fraction_bits=24, zero_exponent=-132), c.walk), "another step: mma F=24"),
    "L": (lambda c: Chain(replace(core(c.step), terms=8), c.walk), "another step: mma F=25 L=8"),
    "steps the other way round": (lambda c: chain(c.step, unfold(c.walk)[::-1]), "another order of k from place 0 on"),
    "two k in each other's step": (swapped, "another order of k from place 3 on"),
    "rounded on the way": (lambda c: rounded(c, "fp16"), "another kind of node: RN fp16"),
    "fp16 accumulator": (narrow, "another step: mma F=25 L=16 e0=-21 fp16"),
}


def found_and_named(planted: Node) -> tuple[Found, Difference]:
    found = reveal_tree(planted, K)
    assert difference(found.node, planted, "fp16") is None
    assert found.exact
    named = difference(found.node, TREE, "fp16")
    assert named is not None
    return found, named


def chains(node: Node) -> list[Chain]:
    if isinstance(node, Chain):
        return [node]
    assert isinstance(node, Join)
    return [c for p in node.parts for c in chains(p)]


def piece(i: int) -> Node:
    """The sum of one block: its four warps' chains."""
    warps = {c.walk[0].start % 128 // 32: c for c in chains(TREE) if c.walk[0].start // 128 == i}
    total: Node = warps[3]
    for w in (2, 1, 0):
        total = join((warps[w], total))
    return total


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", [0, MIDDLE])
def test_a_fault_in_one_chain(fault: str, at: int) -> None:
    plant, said = FAULTS[fault]
    _, named = found_and_named(change_chain(TREE, at, plant))
    assert said in str(named)
    assert f"k {at}:{at + 32}" in named.expected


def test_every_chain_with_another_step() -> None:
    planted = TREE
    for at in range(0, K, 32):
        planted = change_chain(planted, at, FAULTS["F"][0])
    found, named = found_and_named(planted)
    assert found.core is not None
    assert found.core.fraction_bits == 24
    assert named.what == "another step"


def test_two_joins_in_each_other_s_place() -> None:
    """The second and the third block to be added change places."""
    ordered: Node = piece(3)
    for i in (1, 2, 0):
        ordered = join((piece(i), ordered))
    _, named = found_and_named(ordered)
    assert "part 1 of 7" in named.path


def test_a_sum_from_the_first_block_up() -> None:
    total = piece(0)
    for i in (1, 2, 3):
        total = join((total, piece(i)))
    found_and_named(total)


def test_partial_sums_handed_on_in_fp16() -> None:
    total = piece(3)
    for i in (2, 1, 0):
        total = join((piece(i), rounded(total, "fp16")))
    _, named = found_and_named(total)
    assert "another" in named.what or "parts" in named.what


def dot(start: int, low: range, high: range) -> Node:
    return join([chain(Fma("fp16"), [start + k for k in part]) for part in (low, high)])


def test_dots_of_halves_are_told_from_others() -> None:
    """ExLlama's dot product takes even and odd k apart."""
    exllama = join([dot(s, range(0, 8, 2), range(1, 8, 2)) for s in range(0, 24, 8)])
    assert reveal_tree(exllama, 24).node == Chain(HalfDot(), chain(Fma(), range(24)).walk)
    halves = join([dot(s, range(4), range(4, 8)) for s in range(0, 24, 8)])
    found = reveal_tree(halves, 24).node
    assert difference(found, halves, "fp16") is None
    assert isinstance(found, Join)
