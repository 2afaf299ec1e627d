"""What our kernels say that they cannot run, and that packing and running agree with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.backends import triton as backend
from qlab.backends.registry import Problem, kernel
from qlab.errors import PackingError, UnsupportedError
from qlab.inputs import random_weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GOOD = Problem(M=4, K=256, N=64, group_size=64, dtype=torch.float16, symmetric=False, act_order=False, zero_min=1, zero_max=15)
NAMES = ["triton.awq_gemm", "triton.awq_gemm.splitk", "triton.awq_dequantize"]
GPTQ = ["triton.gptq_gemm", "triton.gptq_gemm.splitk", "triton.gptq_gemm.v2"]


@pytest.mark.parametrize("name", NAMES + GPTQ)
def test_shapes(name):
    k = kernel(name)
    assert k.supports(GOOD, DEVICE) == (True, "")
    assert k.supports(replace(GOOD, N=60), DEVICE) == (False, "N=60 is not a multiple of 8")
    assert "group size 48" in k.supports(replace(GOOD, K=480, group_size=48), DEVICE).reason
    assert k.supports(replace(GOOD, K=480, group_size=480), DEVICE).ok
    if DEVICE.type == "cpu":
        assert "bfloat16: Triton's interpreter" in k.supports(replace(GOOD, dtype=torch.bfloat16), DEVICE).reason


@pytest.mark.parametrize(
    ("names", "change", "reason"),
    [
        (NAMES, {"act_order": True}, "no group index"),
        (NAMES, {"zero_max": 16}, "cannot hold zero point 16"),
        (GPTQ[:2], {"zero_min": 0}, "v1 layout cannot hold zero point 0"),
        (GPTQ[2:], {"zero_max": 16}, "v2 layout cannot hold zero point 16"),
        (GPTQ, {"K": 36, "group_size": 36}, "K=36 is not a multiple of 8"),
    ],
)
def test_layouts(names, change, reason):
    for name in names:
        answer = kernel(name).supports(replace(GOOD, **change), DEVICE)
        assert not answer.ok
        assert reason in answer.reason


@pytest.mark.parametrize("name", NAMES + GPTQ)
def test_supports_and_pack_agree_on_zero_points(name):
    for zero in range(17):
        weight = random_weight(64, 16, 32)
        weight = replace(weight, zeros=torch.full_like(weight.zeros, zero))
        if kernel(name).supports(Problem.of(weight, 4), DEVICE).ok:
            kernel(name).pack(weight)
        else:
            with pytest.raises(PackingError):
                kernel(name).pack(weight)


def test_without_triton_there_is_a_reason(monkeypatch):
    def none():
        raise UnsupportedError("Triton cannot be imported")

    monkeypatch.setattr(backend, "launchers", none)
    assert kernel("triton.awq_gemm").supports(GOOD, DEVICE) == (False, "Triton cannot be imported")


@pytest.mark.parametrize(
    ("gpu", "before", "after"),
    [(False, None, True), (False, "0", False), (False, "1", True), (True, None, False), (True, "1", True)],
)
def test_the_interpreter_is_chosen_without_a_gpu_unless_set(gpu, before, after, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TRITON_INTERPRET", before or "")
    if before is None:
        monkeypatch.delenv("TRITON_INTERPRET")
    assert backend.choose_interpreter() is after
