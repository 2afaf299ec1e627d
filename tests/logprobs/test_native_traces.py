"""Traces of whole models that ran on an H100 by native kernels, run again here by replay: not one bit may differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlab.data import model_directory
from qlab.engine.builtin import Builtin
from qlab.logprobs import trace as traces
from qlab.logprobs.comparing import compare_traces
from qlab.logprobs.record import re_execute

NATIVE = Path(__file__).parents[2] / "results" / "h100" / "native"
ORDERED = ("awq-h100", "awq_marlin-h100", "gptq_marlin-h100", "awq_marlin-h100-vllm", "gptq_marlin-h100-vllm")


def replayed(name: str, method: str = ""):
    from qlab.engine.path import Path as EnginePath

    native = traces.read(NATIVE / name)
    assert {c.origin for c in native.run.calls} == {"native"}
    assert native.manifest.environment.gpu == "NVIDIA H100 80GB HBM3"
    p = native.manifest.path
    path = EnginePath(method or p.method, p.gpu, p.dispatch)
    engine = Builtin(model_directory(p.source), path, torch.device("cpu"), native=False)
    return native, re_execute(native, engine)


@pytest.mark.parametrize("name", ORDERED)
def test_a_replayed_model_has_the_bits_of_the_gpu(name: str) -> None:
    native, again = replayed(name)
    total = compare_traces(native, again).total
    assert (total.distance, total.identical, total.digests) == (0.0, 1.0, 0.0)
    assert total.rows == 460
    for mine, other in zip(native.run.rows, again.run.rows, strict=True):
        assert torch.equal(mine.x.view(torch.int16), other.x.view(torch.int16))
        assert torch.equal(mine.y.view(torch.int16), other.y.view(torch.int16))


def test_another_kernel_has_other_bits() -> None:
    total = compare_traces(*replayed("awq_marlin-h100", "awq")).total
    assert total.distance > 0
    assert total.digests > 0.9
