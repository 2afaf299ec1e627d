"""Recipes, as things to be revealed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qlab import hardware
from qlab.backends.registry import Problem
from qlab.recipe import Chain, Join, Node, Recipe, Region, Round, join, rounded
from qlab.recipes import recipe
from qlab.reveal import Found, Model, Replayed, add_scaling, find, scaled_weight, unit_weight
from qlab.reveal.subject import region_of


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def region(
    kernel: str,
    m: int,
    k: int,
    n: int,
    group: int = 128,
    gpu: str = "h100",
    dtype: torch.dtype = torch.float16,
    *,
    column: int = 0,
) -> tuple[Recipe, Region]:
    """A kernel's recipe, and its region of the element (0, column)."""
    problem = Problem(m, k, n, group, dtype, symmetric=True, act_order=False)
    r = recipe(kernel, problem, hardware.gpu(gpu))
    return r, region_of(r, 0, column)


def reveal_model(model: Model, k: int, group: int = 128, dtype: torch.dtype = torch.float16, zero: int = 8) -> Found:
    """What probes find of a model's replay, the place of the scale included."""
    found = find(Replayed(model, unit_weight(k, 1, group, dtype)))
    return add_scaling(found, Replayed(model, scaled_weight(k, 1, group, dtype, zero)), group)


def reveal_tree(tree: Node, k: int, dtype: torch.dtype = torch.float16) -> Found:
    """What probes find of a tree's replay."""
    return find(Replayed(Model(tree), unit_weight(k, 1, k, dtype)))


def change_chain(node: Node, at: int, change: Callable[[Chain], Node]) -> Node:
    """The tree with another node in place of the chain that starts at k ``at``."""
    if isinstance(node, Chain):
        return change(node) if node.walk and node.walk[0].start == at else node
    if isinstance(node, Round):
        return rounded(change_chain(node.node, at, change), node.type)
    assert isinstance(node, Join)
    return join([change_chain(p, at, change) for p in node.parts], node.type)
