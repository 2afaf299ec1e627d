"""vLLM's Triton file is loaded by its path, with a stand-in for the one module it imports of vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qlab.backends import vllm_awq_triton as awq_triton
from qlab.backends.registry import kernel
from qlab.backends.vllm_extension import SOURCE_VARIABLE, Missing, source

SMALL = """
from vllm.triton_utils import tl, triton

@triton.jit
def kernel(p, n: tl.constexpr):
    tl.store(p, n)

def awq_gemm_triton(input, qweight, scales, qzeros, split_k_iters):
    return triton, tl, split_k_iters
"""


def test_the_stand_in_is_there_only_while_the_file_loads(tmp_path: Path) -> None:
    import triton

    file = tmp_path / "awq_triton.py"
    file.write_text(SMALL)
    before = set(sys.modules)
    loaded = awq_triton.load(file)
    assert loaded.awq_gemm_triton(None, None, None, None, 8) == (triton, triton.language, 8)
    assert {m for m in set(sys.modules) - before if m.startswith("vllm")} == set()


def test_a_real_vllm_in_the_process_is_left_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleType("vllm.triton_utils")
    real.tl, real.triton = "its tl", "its triton"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.triton_utils", real)
    file = tmp_path / "awq_triton.py"
    file.write_text("from vllm.triton_utils import tl, triton\n")
    assert awq_triton.load(file).triton == "its triton"
    assert sys.modules["vllm.triton_utils"] is real


def test_a_file_that_does_not_load_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "awq_triton.py"
    file.write_text("from vllm.triton_utils import triton\nfrom vllm.platforms import current_platform\n")
    monkeypatch.setenv(SOURCE_VARIABLE, str(file))
    awq_triton.module.cache_clear()
    try:
        found = awq_triton.module()
        assert isinstance(found, Missing)
        assert str(file) in found.reason
        assert "vllm" in found.reason
        assert kernel("vllm.awq_triton").version() == ""
    finally:
        awq_triton.module.cache_clear()
    assert "vllm.triton_utils" not in sys.modules


def test_vllms_kernel_decodes_and_multiplies_in_the_interpreter() -> None:
    """The real file, where there is one: its one-hot probe on a CPU, through this adapter."""
    if isinstance(found := source(awq_triton.FILE), Missing):
        pytest.skip(found.reason)
    code = """
import torch
from qlab.backends.registry import Problem, Support, kernel
from qlab.backends.vllm_awq_triton import AwqTriton
from qlab.inputs import random_activations, random_weight
from qlab.lab.probe import probe

AwqTriton.supports = lambda self, problem, device: Support(not self.refusal(problem, (9, 0)), "")
k = kernel("vllm.awq_triton")
weight = random_weight(64, 32, 32, seed=3)
found = probe(k, weight)
assert (found.reason, found.mismatches) == ("", 0), found
x = random_activations(3, 64, seed=1)
want = x.double() @ weight.dequantize(torch.float64)
torch.testing.assert_close(k.run(x, k.pack(weight)).double(), want, rtol=2e-2, atol=2e-2)
print("decoded")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "decoded", done.stderr[-2000:]
