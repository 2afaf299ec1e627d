"""Our own kernels on every rung of the ladder: fp16 in Triton's interpreter, fp16 and bf16 on a GPU."""

from __future__ import annotations

import pytest
import torch

from qlab.backends.registry import kernel, kernels
from qlab.inputs import random_activations, random_weight
from qlab.weights import Int4Weight, sequential_groups
from tests.ladder import (
    RUNGS,
    Case,
    Wrapped,
    climb,
    exact,
    fingerprints,
    fingerprints_elsewhere,
    poisoned,
    ragged_rows,
    strided_rows,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLACES = [
    pytest.param(CPU, torch.float16, id="cpu-fp16"),
    pytest.param(CUDA, torch.float16, id="cuda-fp16", marks=pytest.mark.gpu),
    pytest.param(CUDA, torch.bfloat16, id="cuda-bf16", marks=pytest.mark.gpu),
]
CASES = [
    Case(64, 128, 72, 32),
    Case(64, 320, 40, 64),
    Case(128, 384, 264, 128),
    Case(64, 200, 24, 200),
    Case(16, 256, 136, 64, act_order=True),
]
OURS = [k.name for k in kernels() if k.name.startswith(("triton.", "reference."))]
SMALL = Case(16, 128, 72, 32)


def skip_where_compiled_kernels_meet_the_cpu(name: str, device: torch.device) -> None:
    if device == CPU and name.startswith("triton.") and torch.cuda.is_available():
        pytest.skip("with a GPU the Triton kernels are compiled, and do not run on the CPU")


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_every_rung(name, case, device, dtype):
    skip_where_compiled_kernels_meet_the_cpu(name, device)
    results = list(climb(kernel(name), case, dtype, device))
    assert len(results) == len(RUNGS)
    if case.act_order and "awq" in name:
        assert all(r.status == "refused" and "group index" in r.detail for r in results), results
    else:
        assert [r for r in results if r.status != "passed"] == []


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("name", [n for n in OURS if n.startswith("triton.")])
def test_gpu_tiles_in_the_interpreter(name, rows, monkeypatch):
    """The tiles that a GPU takes, many programs a launch: masks and offsets, which the interpreter's large tiles hide."""
    from qlab.triton_kernels import launch

    skip_where_compiled_kernels_meet_the_cpu(name, CPU)
    monkeypatch.setattr(launch, "tile", lambda m, n, kernel: (16 if m <= 16 else 64, 64))
    case = Case(rows, 200, 136, 200)
    rungs = (exact, poisoned, ragged_rows, strided_rows)
    assert [r for r in climb(kernel(name), case, torch.float16, CPU, rungs) if r.status != "passed"] == []


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_two_processes_agree(device, dtype):
    names = [n for n in OURS if n.startswith("reference.") or device == CUDA or not torch.cuda.is_available()]
    here = {n: fingerprints(kernel(n), SMALL, dtype, device) for n in names}
    assert fingerprints_elsewhere(names, SMALL, dtype, device) == here
    assert all(len(set(hashes)) == 1 for hashes in here.values())


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_both_layouts_give_the_same_bits(device, dtype):
    """AWQ and GPTQ storage of one weight, one order of summation: one result; so are versions 1 and 2."""
    if device == CPU and torch.cuda.is_available():
        pytest.skip("with a GPU the Triton kernels are compiled, and do not run on the CPU")
    weight = random_weight(512, 264, 128, dtype=dtype, seed=8).to(device)
    x = random_activations(17, 512, dtype=dtype).to(device)
    y = {n: kernel(n).run(x, kernel(n).pack(weight)) for n in OURS if n.startswith("triton.")}
    assert torch.equal(y["triton.awq_gemm"], y["triton.gptq_gemm"])
    assert torch.equal(y["triton.gptq_gemm"], y["triton.gptq_gemm.v2"])
    assert torch.equal(y["triton.awq_gemm.splitk"], y["triton.gptq_gemm.splitk"])


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("name", [n for n in OURS if "_gemm" in n])
def test_order_of_summation(name, device, dtype):
    """Weights of 1 and four terms of x show the order: beside 12288, two terms of 0.41 fp32 ULP each vanish one by one.

    With K = 512 split-K has four slices of 128 rows, and both orders take 64 rows a step.
    """
    skip_where_compiled_kernels_meet_the_cpu(name, device)
    ones = torch.ones(512, 8)
    weight = Int4Weight((9 * ones).byte(), (8 * ones[:4]).byte(), ones[:4].to(dtype), sequential_groups(512, 128))
    small, ulp = 13 * 2.0**-15, 2.0**-10
    x = torch.zeros(2, 512, dtype=dtype)
    x[0, [0, 128, 192, 256]] = torch.tensor([12288, small, small, -12288], dtype=dtype)
    x[1, [0, 128, 256, 384]] = torch.tensor([small, small, 12288, -12288], dtype=dtype)
    k = kernel(name)
    y = k.run(x.to(device), k.pack(weight.to(device))).cpu().float()
    if name.endswith("splitk"):
        assert y[0].unique().tolist() == [ulp], "slice 1 adds its two terms before it is joined"
        assert y[1].unique().tolist() == [ulp], "joined from slice 0 up: from slice 3 down it would be 0.81 ULP"
    else:
        assert y[0].unique().tolist() == [0.0], "one chain loses each term as it comes"


@pytest.mark.parametrize("victim", OURS)
def test_one_ulp_in_one_kernel_changes_no_other(victim):
    class OneUlp(Wrapped):
        def run(self, x, packed):
            y = super().run(x, packed)
            y.view(torch.int16)[0, 0] += 1
            return y

    device = CUDA if torch.cuda.is_available() else CPU

    def hashes(replaced=None):
        chosen = [replaced if replaced and n == victim else kernel(n) for n in OURS]
        return {n: fingerprints(k, SMALL, torch.float16, device, runs=1) for n, k in zip(OURS, chosen, strict=True)}

    before, spoilt, after = hashes(), hashes(OneUlp(kernel(victim))), hashes()
    assert [n for n in OURS if before[n] != spoilt[n]] == [victim]
    assert before == after
