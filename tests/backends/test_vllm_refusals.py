"""What vLLM's kernels refuse, and why: the conditions of each operator, GPU by GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.backends.registry import Problem, kernel, kernels
from qlab.backends.vllm_kernel import VllmKernel
from qlab.errors import PackingError
from qlab.inputs import random_weight

NAMES = [k.name for k in kernels() if isinstance(k, VllmKernel)]
FP16 = Problem(16, 4096, 4096, 128, torch.float16, True, False)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("vllm.awq_gemm", {"dtype": torch.bfloat16}, "fp16 only"),
        ("vllm.awq_gemm", {"N": 4128}, "multiple of 64"),
        ("vllm.awq_gemm", {"N": 4160}, "N=4160"),
        ("vllm.awq_gemm", {"K": 4112, "group_size": 16}, "multiple of 32"),
        ("vllm.awq_gemm", {"act_order": True}, "group index"),
        ("vllm.awq_gemm", {"zero_max": 16}, "not 16"),
        ("vllm.awq_dequantize", {"N": 4128}, "multiple of 64"),
        ("vllm.awq_triton", {"dtype": torch.bfloat16}, "fp16 only"),
        ("vllm.awq_triton", {"group_size": 256}, "256"),
        ("vllm.gptq_gemm", {"dtype": torch.bfloat16}, "fp16 only"),
        ("vllm.gptq_gemm", {"N": 4100}, "multiple of 8"),
        ("vllm.gptq_gemm", {"group_size": 16}, "not 16"),
        ("vllm.gptq_gemm", {"K": 4104, "group_size": 4104}, "multiple of 32"),
        ("vllm.marlin.gptq", {"symmetric": False}, "zero point 8"),
        ("vllm.marlin.gptq", {"N": 4128}, "multiple of 64"),
        ("vllm.marlin.gptq", {"K": 4160, "group_size": 64}, "multiple of 128"),
        ("vllm.marlin.awq", {"group_size": 256}, "256"),
        ("vllm.marlin.awq", {"act_order": True}, "group index"),
        ("vllm.marlin.awq.fp16", {"dtype": torch.float32}, "fp16 and bf16"),
        ("vllm.machete.gptq", {"symmetric": False}, "zero point 8"),
        ("vllm.machete.gptq", {"group_size": 32}, "not 32"),
        ("vllm.machete.awq", {"N": 4160}, "multiple of 128"),
        ("vllm.machete.awq", {"K": 4128, "group_size": 4128}, "multiple of 64"),
    ],
)
def test_a_refusal_names_what_does_not_fit(name: str, change: dict, reason: str) -> None:
    k = kernel(name)
    assert isinstance(k, VllmKernel)
    assert k.refusal(FP16, (9, 0)) == ""
    assert reason in k.refusal(replace(FP16, **change), (9, 0))


def test_refusals_by_gpu() -> None:
    bf16 = replace(FP16, dtype=torch.bfloat16)
    cases: tuple[tuple[str, Problem, tuple[int, int], bool], ...] = (
        ("vllm.machete.awq", FP16, (8, 0), False),
        ("vllm.machete.awq", FP16, (10, 0), False),
        ("vllm.marlin.awq", FP16, (7, 5), True),
        ("vllm.marlin.awq", FP16, (7, 0), False),
        ("vllm.marlin.awq", bf16, (7, 5), False),
        ("vllm.marlin.awq.atomic", bf16, (8, 0), False),
        ("vllm.marlin.awq.atomic", FP16, (8, 0), True),
        ("vllm.marlin.awq.atomic", bf16, (9, 0), True),
        ("vllm.gptq_gemm", FP16, (7, 0), True),
    )
    for name, problem, capability, runs in cases:
        k = kernel(name)
        assert isinstance(k, VllmKernel)
        assert (k.refusal(problem, capability) == "") is runs, (name, capability)


@pytest.mark.parametrize(
    ("change", "what"), [({"M": 2**20}, "M*K = 4294967296"), ({"M": 2**17, "N": 16512, "K": 128}, "M*N = 2164260864")]
)
def test_matrices_beyond_32_bit_addresses(change: dict, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(VllmKernel, "missing", lambda self: "")
    k, device = kernel("vllm.marlin.awq"), torch.device("cuda")
    assert k.supports(replace(FP16, M=2**19), device).ok
    answer = k.supports(replace(FP16, **change), device)
    assert not answer.ok
    assert what in answer.reason


def test_every_kernel_is_registered() -> None:
    marlin = [f"vllm.marlin.{kind}{reduction}" for kind in ("awq", "gptq") for reduction in ("", ".fp16", ".atomic")]
    others = ["awq_gemm", "awq_dequantize", "awq_triton", "gptq_gemm", "machete.awq", "machete.gptq"]
    assert sorted(NAMES) == sorted([*marlin, *(f"vllm.{name}" for name in others)])
    assert {name for name in NAMES if not kernel(name).repeatable} == {
        "vllm.gptq_gemm",
        "vllm.marlin.awq.atomic",
        "vllm.marlin.gptq.atomic",
    }


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_the_reason_is_one_sentence(name: str) -> None:
    k = kernel(name)
    assert k.supports(FP16, torch.device("cpu")) == (False, "needs a CUDA GPU")
    with pytest.raises(PackingError, match="needs a CUDA GPU"):
        k.pack(random_weight(128, 128, symmetric=True))
