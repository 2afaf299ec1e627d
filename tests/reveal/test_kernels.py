"""Replays of the kernels' recipes, revealed: tree, arithmetic, weights and output rule must be the recipe's."""

from __future__ import annotations

import pytest
import torch

from qlab.recipe import Unordered
from qlab.reveal import Model, difference
from tests.reveal.conftest import region, reveal_model

HALF, BF16 = torch.float16, torch.bfloat16

CASES = [
    pytest.param("vllm.marlin.gptq", 1, 128, 256, 128, "h100", HALF, id="marlin, one block"),
    pytest.param("vllm.marlin.gptq", 1, 512, 256, 128, "h100", HALF, id="marlin, a block for every k tile"),
    pytest.param("vllm.marlin.awq", 1, 1024, 4096, 128, "h100", HALF, id="marlin, stripes across blocks"),
    pytest.param("vllm.marlin.awq", 1, 1024, 4096, 128, "a100", HALF, id="marlin, another step and SM count"),
    pytest.param("vllm.marlin.gptq", 64, 1024, 2048, 64, "a100", HALF, id="marlin, thread_k 64"),
    pytest.param("vllm.marlin.gptq", 1, 512, 4096, 128, "h100", BF16, id="marlin, bf16"),
    pytest.param("vllm.marlin.gptq.fp16", 1, 1024, 4096, 128, "h100", HALF, id="marlin, handed on in fp16"),
    pytest.param("vllm.marlin.gptq.fp16", 1, 1024, 4096, 128, "h100", BF16, id="marlin, handed on in bf16"),
    pytest.param("vllm.marlin.awq", 1, 512, 4096, 512, "h100", HALF, id="marlin, whole column"),
    pytest.param("vllm.marlin.gptq", 1, 512, 256, 128, "t4", HALF, id="marlin, fp16 accumulators"),
    pytest.param("vllm.marlin.gptq.atomic", 1, 1024, 1024, 128, "h100", HALF, id="marlin, atomics"),
    pytest.param("vllm.marlin.gptq.atomic", 1, 1024, 1024, 1024, "h100", HALF, id="marlin, scaled atomics"),
    pytest.param("vllm.awq_gemm", 1, 128, 256, 128, "h100", HALF, id="awq_gemm, four slices"),
    pytest.param("vllm.awq_gemm", 1, 1024, 256, 128, "h100", HALF, id="awq_gemm"),
    pytest.param("vllm.awq_gemm", 1, 512, 256, 128, "a100", HALF, id="awq_gemm, a100"),
    pytest.param("vllm.awq_triton", 1, 512, 256, 128, "h100", HALF, id="awq_triton"),
    pytest.param("vllm.awq_triton", 1, 512, 256, 128, "a100", HALF, id="awq_triton, permuted steps"),
    pytest.param("vllm.gptq_gemm", 1, 128, 256, 128, "h100", HALF, id="exllama, one block"),
    pytest.param("vllm.gptq_gemm", 1, 256, 256, 32, "h100", HALF, id="exllama, two blocks"),
    pytest.param("vllm.gptq_gemm", 1, 512, 256, 64, "h100", HALF, id="exllama, atomics"),
    pytest.param("vllm.machete.awq", 16, 2048, 4096, 128, "h100", HALF, id="machete, awq"),
    pytest.param("vllm.machete.gptq", 16, 2048, 4096, 128, "h100", BF16, id="machete, bf16"),
    pytest.param("triton.awq_gemm", 16, 512, 256, 128, "h100", HALF, id="triton"),
    pytest.param("triton.gptq_gemm.splitk", 16, 1024, 256, 128, "a100", HALF, id="triton, slices"),
    pytest.param("cuda.hardware_invariant", 1, 512, 64, 128, "h100", HALF, id="fused multiply-adds"),
    pytest.param("cuda.hardware_invariant", 1, 416, 64, 32, "a100", BF16, id="fused multiply-adds, bf16"),
]


@pytest.mark.parametrize(("kernel", "m", "k", "n", "group", "gpu", "dtype"), CASES)
def test_reveals_the_recipe(kernel: str, m: int, k: int, n: int, group: int, gpu: str, dtype: torch.dtype) -> None:
    recipe, r = region(kernel, m, k, n, group, gpu, dtype)
    found = reveal_model(Model(r.tree, recipe.weights, r.output), k, group, dtype, zero=3 if "awq" in kernel else 8)
    assert difference(found.node, r.tree, recipe.dtype) is None
    assert (found.weights, found.output) == (recipe.weights, r.output)
    assert found.exact
    assert found.ordered == (not (isinstance(r.tree, Unordered) and len(r.tree.parts) > 2))


@pytest.mark.parametrize("column", [0, 128, 640, 1984])
def test_tiles_with_other_cuts(column: int) -> None:
    """Stripes cut neighbouring tiles at other k."""
    recipe, r = region("vllm.marlin.gptq", 64, 1024, 2048, 128, "a100", column=column)
    found = reveal_model(Model(r.tree), 1024)
    assert difference(found.node, r.tree, recipe.dtype) is None
    assert {found.node == s.tree for s in recipe.regions if s is not r} <= {False}


def test_calls_for_4096_rows() -> None:
    """In the low thousands, whatever the number of pieces."""
    _, r = region("vllm.marlin.gptq", 1, 4096, 256)
    found = reveal_model(Model(r.tree), 4096)
    assert found.node == r.tree
    assert found.exact
    assert sum(e.calls for e in found.evidence) < 3000
