"""vLLM's awq_gemm: eight interleaved slices, PyTorch's sum over them, and nothing that depends on the number of SMs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem
from qlab.hardware import gpu
from qlab.recipe import Chain, Join, Node, Output, Recipe, Round, TensorCore, chain, join, nodes, rounded, unfold, zero
from qlab.recipes import recipe
from qlab.recipes.awq_gemm import slice_walk
from qlab.recipes.scheme import torch_sum

A100, H100 = gpu("a100"), gpu("h100")
PROBLEM = Problem(M=3, K=1024, N=256, group_size=128, dtype=torch.float16, symmetric=False, act_order=False)


def slice_order(k: int, index: int) -> np.ndarray:
    return unfold(slice_walk(k, index))


def awq_gemm(problem: Problem, key: str = "h100") -> Recipe:
    return recipe("vllm.awq_gemm", problem, gpu(key))


def chains(node: Node) -> list[list[int]]:
    return [unfold(n.walk).tolist() for n in nodes(node) if isinstance(n, Chain)]


def test_slices_interleave() -> None:
    assert slice_order(1024, 0).tolist() == [*range(32), *range(256, 288), *range(512, 544), *range(768, 800)]
    assert slice_order(1024, 7).tolist()[:32] == list(range(224, 256))
    assert slice_order(128, 4).tolist() == []
    for k in 64, 256, 1056, 4096:
        every = np.concatenate([slice_order(k, i) for i in range(8)])
        assert np.array_equal(np.sort(every), np.arange(k))


def test_the_sum_is_pytorchs() -> None:
    """(((P0 + P4) + (P1 + P5)) + (P2 + P6)) + (P3 + P7), onto +0, in fp32."""
    step = TensorCore.of(H100.step)
    p = [rounded(chain(step, slice_order(1024, i)), "fp16") for i in range(8)]
    lanes = [join([p[i], p[i + 4]]) for i in range(4)]
    want = join([*lanes, zero(p[0])])
    (region,) = awq_gemm(PROBLEM).regions
    assert region.tree == want
    assert region.output == Output()
    assert [n.type for n in nodes(region.tree) if isinstance(n, Round)] == ["fp16"] * 8
    assert {n.type for n in nodes(region.tree) if isinstance(n, Join)} == {"fp32"}
    assert torch_sum(p[:2]) == join([p[0], p[1], zero(p[0])])


def test_a_short_k_leaves_slices_empty() -> None:
    (region,) = awq_gemm(replace(PROBLEM, K=128)).regions
    walks = chains(region.tree)
    assert sorted(k for w in walks for k in w) == list(range(128))
    assert walks.count([]) == 4 + 1


def test_every_k_once_and_ascending() -> None:
    for k in 256, 512, 4096, 11008:
        (region,) = awq_gemm(replace(PROBLEM, K=k)).regions
        walks = chains(region.tree)
        assert sorted(v for w in walks for v in w) == list(range(k))
        assert all(a < b for w in walks for a, b in pairwise(w))


def test_only_the_step_counts() -> None:
    (ampere,) = {awq_gemm(PROBLEM, g).hash for g in ("t4", "a100", "a10", "l40s", "rtx4090")}
    (hopper,) = {awq_gemm(PROBLEM, g).hash for g in ("h100", "h100-pcie", "h200", "b200")}
    assert ampere != hopper
    assert awq_gemm(PROBLEM).hash != recipe("vllm.marlin.awq", PROBLEM, H100).hash


def test_dequantize_leaves_the_sum_to_cublas() -> None:
    r = recipe("vllm.awq_dequantize", replace(PROBLEM, M=256), A100)
    assert "cuBLAS" in r.opaque
    assert r.weights == "rounded"


@pytest.mark.parametrize("k", [128, 256, 4096])
def test_groups_do_not_show(k: int) -> None:
    """The scale is in the weight, so that the recipe is the same for any group."""
    p = replace(PROBLEM, K=k, N=4096)
    assert awq_gemm(p).hash == awq_gemm(replace(p, group_size=32)).hash == awq_gemm(replace(p, group_size=k)).hash
