"""The proof of the step without a GPU: its inputs, and what it says when hardware and replay agree or differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import prove_step
from bench.prove_step import FAMILIES, Proof, Row, Shape, prove
from qlab.environment import collect
from qlab.hardware import AMPERE, HOPPER, Step
from qlab.replay import cuda, probe
from qlab.replay.step import fused_dot_add, half_dot_add
from qlab.serial import read_json, write_json

F16, BF16 = torch.float16, torch.bfloat16
CASES = [(F16, False), (BF16, False), (F16, True)]


def on_cpu(a: Tensor, b: Tensor, c: Tensor, step: Step, dtype: torch.dtype, half: bool) -> Tensor:
    count, _, k = a.shape
    rows_a = a[:, :, None, :].expand(count, 16, 8, k).reshape(-1, k).numpy().view(np.uint16)
    rows_b = b.transpose(1, 2)[:, None].expand(count, 16, 8, k).reshape(-1, k).numpy().view(np.uint16)
    start = c.reshape(-1).numpy().view(np.uint16 if half else np.uint32)
    got = half_dot_add(rows_a, rows_b, start, step) if half else fused_dot_add(rows_a, rows_b, start, step, dtype)
    return torch.from_numpy(got.view(np.int16 if half else np.int32)).reshape(c.shape)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor core that computes Hopper's step, and a CUDA engine, both by the CPU."""

    def mma(a: Tensor, b: Tensor, c: Tensor, shape: probe.Shape, accumulator: str, dtype: torch.dtype) -> Tensor:
        return on_cpu(a, b, c, replace(HOPPER, terms=probe.DEPTHS[shape]), dtype, accumulator == "fp16")

    def replayed(
        a: Tensor, b: Tensor, c: Tensor, step: Step, shape: str, accumulator: str, dtype: torch.dtype, fast: bool = True
    ) -> tuple[Tensor, int]:
        return on_cpu(a, b, c, step, dtype, accumulator == "fp16"), c.numel() if fast else 0

    monkeypatch.setattr(probe, "mma", mma)
    monkeypatch.setattr(probe, "replayed", replayed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "half"), CASES, ids=["fp16", "bf16", "fp16 accumulator"])
def test_families_reach_what_they_are_for(family: str, dtype: torch.dtype, half: bool) -> None:
    a, b, c = FAMILIES[family](Shape(200, 16, dtype, half, torch.Generator().manual_seed(1)))
    assert (a.shape, b.shape, c.shape) == ((200, 16, 16), (200, 16, 8), (200, 16, 8))
    assert (a.dtype, b.dtype, c.dtype) == (torch.int16, torch.int16, torch.int16 if half else torch.int32)
    d = on_cpu(a, b, c, HOPPER, dtype, half)
    values = d.view(F16 if half else torch.float32).float()
    if family == "ties":  # they are there for the exponent of a zero term
        other = on_cpu(a, b, c, replace(HOPPER, zero_exponent=-129, zero_exponent_fp16=-17), dtype, half)
        assert (other != d).float().mean() > 0.01 or (dtype == F16 and not half)
    else:
        assert d.unique().numel() > (1000 if half else 5000 if family in ("any_bits", "tiny") else 15_000)
    nan, infinite = float(values.isnan().float().mean()), float(values.isinf().float().mean())
    if family in ("any_bits", "accumulators"):
        assert 0.001 < nan < 0.9
    else:
        assert nan == 0
    assert infinite < 0.6
    if family == "cancelling":  # truncation must decide: other numbers of bits give other results
        for fraction_bits in (23, 24, 26):
            other = on_cpu(a, b, c, replace(HOPPER, fraction_bits=fraction_bits), dtype, half)
            assert (other != d).float().mean() > (0.002 if half else 0.1)


def row(family: str, step: Step, half: bool = False) -> Row:
    return prove("m16n8k16", "fp16", half, family, step, tiles=40, seed=2, device="cpu")


def test_the_timed_programs_fit_their_operands() -> None:
    for m, k, n, chains in prove_step.SPEEDS:
        for step in (AMPERE, HOPPER):
            program = prove_step.gemm(step, "fp16", m, k, n, chains)
            cuda.check_program(program, m, k, n)
            assert sum(int(stop - start) for code, _, start, stop in program.ops.tolist() if code == 0) == k


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("half", [False, True])
def test_the_right_step_has_no_mismatch(half: bool) -> None:
    for family in FAMILIES:
        r = row(family, HOPPER, half)
        assert (r.outputs, r.mismatches, r.fast_mismatches, r.cpu_mismatches) == (40 * 128, 0, 0, 0)
        assert r.checked_on_cpu == 40 * 128
        assert r.examples == ()


@pytest.mark.usefixtures("hopper")
def test_a_wrong_step_is_shown_with_examples(tmp_path: Path) -> None:
    r = row("normal", AMPERE)
    assert r.mismatches > 1000
    assert len(r.examples) == 3
    first = r.examples[0]
    assert len(first.a) == len(first.b) == 16
    assert first.tensor_core != first.replay
    assert len(first.c) == len(first.replay) == 8
    assert "mismatches" in prove_step.show(r)

    proof = Proof(prove_step.SCHEMA, collect(details=False), "h100", 25, 16, (r,), ())
    write_json(tmp_path / "step.json", proof)
    assert read_json(Proof, tmp_path / "step.json", prove_step.SCHEMA) == proof
