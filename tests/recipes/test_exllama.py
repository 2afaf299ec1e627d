"""ExLlama: blocks of 128 rows, fp16 dot products of 8, fp16 atomics; cuBLAS above 50 tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import GPUS, gpu
from qlab.recipe import Chain, HalfDot, Output, Recipe, Round, Unordered, nodes, unfold
from qlab.recipes import DEFAULT, recipe

PROBLEM = Problem(M=3, K=1024, N=256, group_size=128, dtype=torch.float16, symmetric=True, act_order=False)


def exllama(problem: Problem, key: str = "h100") -> Recipe:
    return recipe("vllm.gptq_gemm", problem, gpu(key))


@pytest.mark.parametrize("k", [64, 128, 256, 1024, 1120, 4096])
def test_blocks_of_128_rows(k: int) -> None:
    r = exllama(replace(PROBLEM, K=k))
    (region,) = r.regions
    tree = region.tree
    assert isinstance(tree, Unordered)
    assert (tree.type, tree.scaled, region.output, r.weights) == ("fp16", False, Output(), "integer")
    walks = sorted(unfold(p.node.walk).tolist() for p in tree.parts if isinstance(p, Round) and isinstance(p.node, Chain))
    assert walks == [list(range(start, min(start + 128, k))) for start in range(0, k, 128)]
    assert {n.step for n in nodes(tree) if isinstance(n, Chain)} == {HalfDot(8)}


def test_two_blocks_have_one_order() -> None:
    assert [exllama(replace(PROBLEM, K=k)).ordered for k in (128, 256, 384)] == [True, True, False]


def test_no_gpu_shows() -> None:
    assert len({exllama(PROBLEM, g.key).hash for g in GPUS}) == 1


def test_act_order_sorts_the_rows() -> None:
    plain, sorted_rows = exllama(PROBLEM), exllama(replace(PROBLEM, act_order=True))
    assert (plain.rows, sorted_rows.rows) == ("natural", "sorted")
    assert replace(sorted_rows, rows="natural") == plain


def test_many_tokens_go_to_cublas() -> None:
    assert exllama(replace(PROBLEM, M=50)).opaque == ""
    assert "cublasHgemm" in exllama(replace(PROBLEM, M=51)).opaque


def test_another_vllm_has_no_recipe() -> None:
    """What a kernel computes was read from one version; another may compute something else."""
    with pytest.raises(UnsupportedError, match=r"read from vLLM 0\.20\.2"):
        recipe("vllm.gptq_gemm", PROBLEM, gpu("h100"), replace(DEFAULT, vllm="0.21.0"))
