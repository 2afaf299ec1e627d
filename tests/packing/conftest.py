"""Weights that a wrong layout cannot hide in, and vLLM's packing helpers where its sources are at hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlab.weights import Int4Weight, sequential_groups

GROUPS = (32, 64, 128, 256)
"""Of the weights below, whose K is 256: the last is the whole column."""


def distinct_weight(
    k: int = 256,
    n: int = 128,
    group_size: int = 64,
    *,
    low: int = 0,
    high: int = 15,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Int4Weight:
    """Random codes, zero points from ``low`` to ``high`` with both present, and no two scales alike."""
    g = torch.Generator().manual_seed(seed)
    groups = k // group_size
    codes = torch.randint(0, 16, (k, n), generator=g, dtype=torch.uint8)
    zeros = torch.randint(low, high + 1, (groups, n), generator=g, dtype=torch.uint8)
    zeros[0, 0], zeros[-1, -1] = low, high
    bits = torch.randperm(groups * n, generator=g) + (0x0400 if dtype == torch.float16 else 0x0080)  # normal numbers
    scales = bits.to(torch.int16).view(dtype).reshape(groups, n)
    index = sequential_groups(k, group_size)
    if act_order:
        index = index[torch.randperm(k, generator=g)].contiguous()
    return Int4Weight(codes, zeros, scales, index, name="layer")


@pytest.fixture
def make() -> Callable[..., Int4Weight]:
    return distinct_weight


@pytest.fixture(params=GROUPS)
def weight(request: pytest.FixtureRequest) -> Int4Weight:
    """In order, zero points 1 to 15: what every asymmetric layout can hold."""
    return distinct_weight(group_size=request.param, low=1)


@pytest.fixture(params=[(g, act) for g in GROUPS for act in (False, True) if not (act and g == 256)], ids=str)
def any_order(request: pytest.FixtureRequest) -> Int4Weight:
    """In order and in act-order, zero points 1 to 15."""
    group_size, act_order = request.param
    return distinct_weight(group_size=group_size, low=1, act_order=act_order)


def eights(weight: Int4Weight) -> Int4Weight:
    """The same weight with every zero point 8."""
    return replace(weight, zeros=torch.full_like(weight.zeros, 8))


@pytest.fixture
def symmetric(any_order: Int4Weight) -> Int4Weight:
    return eights(any_order)


@pytest.fixture(scope="session")
def vllm() -> Any:
    """vLLM's packing helpers, or a skip that says how to get them."""
    spec = importlib.util.spec_from_file_location("vllm_helpers", Path(__file__).with_name("vllm_helpers.py"))
    assert spec is not None
    assert spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    source = helpers.find()
    if source is None:
        pytest.skip("needs vLLM's Python sources: install vllm or set QLAB_VLLM_SOURCE to its wheel or unpacked folder")
    return helpers.load(source)
