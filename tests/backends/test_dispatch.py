"""Every row of vLLM's dispatch: label, GPU, shape, dtype, tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.backends.dispatch import LABELS, Dispatch, dispatch
from qlab.backends.registry import Problem, kernels
from qlab.errors import QlabError
from qlab.hardware import GPUS, gpu

AWQ = Problem(16, 4096, 4096, 128, torch.float16, False, False, 1, 15)
GPTQ = Problem(16, 4096, 4096, 128, torch.float16, True, False)
REFUSED = ""


def chosen(label: str, key: str, problem: Problem, **options: bool) -> str:
    return dispatch(label, gpu(key), problem, **options).kernel


@pytest.mark.parametrize(
    ("label", "key", "change", "kernel"),
    [
        ("awq", "h100", {}, "vllm.awq_gemm"),
        ("awq", "a100", {"M": 255}, "vllm.awq_gemm"),
        ("awq", "a100", {"M": 256}, "vllm.awq_dequantize"),
        ("awq", "t4", {}, "vllm.awq_gemm"),
        ("awq", "a100", {"N": 4160}, REFUSED),  # awq_gemm wants whole groups in N, too
        ("awq", "a100", {"N": 4160, "M": 256}, "vllm.awq_dequantize"),
        ("awq", "v100", {}, REFUSED),
        ("awq", "h100", {"dtype": torch.bfloat16}, REFUSED),
        ("awq", "h100", {"act_order": True}, REFUSED),
        ("awq_marlin", "h100", {}, "vllm.machete.awq"),
        ("awq_marlin", "h200", {"M": 1000}, "vllm.machete.awq"),
        ("awq_marlin", "h100", {"dtype": torch.bfloat16}, "vllm.machete.awq"),
        ("awq_marlin", "h100", {"group_size": 64}, "vllm.machete.awq"),
        ("awq_marlin", "h100", {"group_size": 4096}, "vllm.machete.awq"),
        ("awq_marlin", "h100", {"group_size": 32}, "vllm.marlin.awq"),
        ("awq_marlin", "h100", {"N": 4160}, "vllm.marlin.awq"),
        ("awq_marlin", "a100", {}, "vllm.marlin.awq"),
        ("awq_marlin", "b200", {}, "vllm.marlin.awq"),
        ("awq_marlin", "l40s", {"dtype": torch.bfloat16}, "vllm.marlin.awq"),
        ("awq_marlin", "t4", {}, "vllm.marlin.awq"),
        ("awq_marlin", "t4", {"dtype": torch.bfloat16}, REFUSED),
        ("awq_marlin", "v100", {}, REFUSED),
        ("awq_marlin", "h100", {"K": 4160, "group_size": 64}, "vllm.awq_gemm"),  # Marlin is asked before Machete: K % 128
        ("awq_marlin", "a100", {"N": 4128, "group_size": 32}, REFUSED),
        ("awq_marlin", "a100", {"K": 4160, "N": 4160, "group_size": 64, "M": 256}, "vllm.awq_dequantize"),
        ("awq_marlin", "a100", {"group_size": 256}, "vllm.awq_gemm"),
        ("awq_marlin", "a100", {"group_size": 256, "dtype": torch.bfloat16}, REFUSED),
    ],
)
def test_awq_labels(label: str, key: str, change: dict, kernel: str) -> None:
    assert chosen(label, key, replace(AWQ, **change)) == kernel


@pytest.mark.parametrize(
    ("label", "key", "change", "kernel"),
    [
        ("gptq", "h100", {}, "vllm.gptq_gemm"),
        ("gptq", "v100", {}, "vllm.gptq_gemm"),
        ("gptq", "h100", {"act_order": True}, "vllm.gptq_gemm"),
        ("gptq", "h100", {"dtype": torch.bfloat16}, REFUSED),
        ("gptq_marlin", "h100", {}, "vllm.machete.gptq"),
        ("gptq_marlin", "h100-pcie", {"act_order": True}, "vllm.machete.gptq"),
        ("gptq_marlin", "h100", {"dtype": torch.bfloat16}, "vllm.machete.gptq"),
        ("gptq_marlin", "h100", {"group_size": 32}, "vllm.marlin.gptq"),
        ("gptq_marlin", "h100", {"N": 4160}, "vllm.marlin.gptq"),
        ("gptq_marlin", "h100", {"K": 4160, "group_size": 64}, "vllm.machete.gptq"),  # no layer check before: K % 64 is enough
        ("gptq_marlin", "a100", {"K": 4160, "group_size": 64}, "vllm.gptq_gemm"),  # ExLlama ends vLLM's list
        ("gptq_marlin", "a100", {"K": 4160, "group_size": 64, "dtype": torch.bfloat16}, REFUSED),
        ("gptq_marlin", "a100", {"K": 4160, "group_size": 4160}, REFUSED),
        ("gptq_marlin", "a100", {}, "vllm.marlin.gptq"),
        ("gptq_marlin", "a100", {"act_order": True}, "vllm.marlin.gptq"),
        ("gptq_marlin", "rtx4090", {"group_size": 4096}, "vllm.marlin.gptq"),
        ("gptq_marlin", "t4", {}, "vllm.marlin.gptq"),
        ("gptq_marlin", "v100", {}, "vllm.gptq_gemm"),
        ("gptq_marlin", "h100", {"symmetric": False}, "vllm.gptq_gemm"),
        ("gptq_marlin", "h100", {"symmetric": False, "dtype": torch.bfloat16}, REFUSED),
        ("gptq_marlin", "h100", {"group_size": 256}, "vllm.gptq_gemm"),
    ],
)
def test_gptq_labels(label: str, key: str, change: dict, kernel: str) -> None:
    assert chosen(label, key, replace(GPTQ, **change)) == kernel


@pytest.mark.parametrize(("source", "problem"), [("awq", AWQ), ("gptq", GPTQ)])
def test_pin_keeps_hopper_on_marlin(source: str, problem: Problem) -> None:
    assert chosen(f"{source}_marlin", "h200", problem, pin_marlin=True) == f"vllm.marlin.{source}"
    assert chosen(source, "h200", problem, pin_marlin=True) == chosen(source, "h200", problem)


@pytest.mark.parametrize(("label", "problem", "tokens"), [("awq", AWQ, 256), ("gptq", GPTQ, 51)], ids=["awq", "gptq"])
def test_cublas_from_a_number_of_tokens_on(label: str, problem: Problem, tokens: int) -> None:
    few, many = (dispatch(label, gpu("h100"), replace(problem, M=m)) for m in (tokens - 1, tokens))
    assert (few.opaque, many.opaque) == (False, True)
    assert str(tokens) in many.reason
    assert "ublas" in many.reason.lower()


def test_turing_marlin_says_that_it_accumulates_in_fp16() -> None:
    assert "accumulates in fp16" in dispatch("gptq_marlin", gpu("t4"), GPTQ).reason
    assert "accumulates in fp16" not in dispatch("gptq_marlin", gpu("a100"), GPTQ).reason


def test_every_answer_has_a_reason_and_a_registered_kernel() -> None:
    known = {k.name for k in kernels()}
    for label in LABELS:
        for g in GPUS:
            for problem in (AWQ, GPTQ, replace(GPTQ, dtype=torch.bfloat16, M=300), replace(AWQ, N=4104)):
                found = dispatch(label, g, problem)
                assert found.reason
                assert found.kernel in known or not found.kernel


def test_a_kernel_that_fails_on_the_shape_is_a_refusal_that_says_why() -> None:
    found = dispatch("awq", gpu("h100"), replace(AWQ, N=4160))
    assert not found.kernel
    assert "awq_gemm" in found.reason
    assert "N=4160" in found.reason


def test_unknown_label_is_refused_by_name() -> None:
    with pytest.raises(QlabError, match=r"awq-marlin.*awq_marlin"):
        dispatch("awq-marlin", gpu("h100"), AWQ)


def test_the_answer_is_plain_frozen_data() -> None:
    found = dispatch("awq", gpu("h100"), AWQ)
    assert found == Dispatch("awq", "vllm.awq_gemm", found.reason)
    with pytest.raises(AttributeError):
        found.kernel = "other"  # type: ignore[misc]


def test_awq_marlin_by_name_is_refused_for_groups_that_marlin_lacks():
    problem = Problem(16, 512, 512, 256, torch.float16, False, False, 1, 15)
    found = dispatch("awq_marlin", gpu("h100"), problem)
    assert found.kernel == "vllm.awq_gemm"
    assert "refuses the label by name" in found.reason
    assert "not 256" in found.reason
