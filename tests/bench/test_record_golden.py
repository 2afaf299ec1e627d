"""The golden recorder on kernels that answer with their replay; the plan holds every part of every recipe."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from bench import record_golden
from bench.features import ACROSS, ACT_ORDER, BIAS, EXPONENTS, LAUNCHES, SPLIT, UNORDERED, WHOLE, features
from bench.golden_plan import MARLIN, Planned, plan
from bench.problems import Trial, inputs, not_modelled, wild
from bench.record_golden import Recorder, load, save
from qlab.backends.registry import kernel
from qlab.errors import QlabError
from qlab.hardware import gpu
from qlab.recipes import builders, recipe
from tests.bench.stand_ins import H100, StandIn, call

TILES = {"tile k128 n128", "tile k128 n64", "tile k64 n256", "tile k64 n128"}
ROWS = {f"rows {n}" for n in (8, 16, 32, 48, 64)}
GROUPS = {f"group {g}" for g in (128, 64, 32, -1)}
VALUES = {"plain", "wide", "wild", "special", "cancel"}
PIECES = {"2 pieces", "3 pieces", "4 pieces or more"}
MARLIN_PARTS = TILES | ROWS | GROUPS | VALUES | PIECES | {ACROSS, WHOLE, LAUNCHES, EXPONENTS, BIAS, "fp16", "bf16"}
WANTED = {
    "vllm.marlin.awq": MARLIN_PARTS,
    "vllm.marlin.gptq": MARLIN_PARTS | {ACT_ORDER},
    "vllm.marlin.awq.fp16": MARLIN_PARTS,
    "vllm.marlin.gptq.fp16": MARLIN_PARTS | {ACT_ORDER},
    "vllm.machete.awq": VALUES | {SPLIT, "fp16", "bf16", "group 64", "group 128", "group -1"},
    "vllm.machete.gptq": {SPLIT, ACT_ORDER, EXPONENTS, "fp16", "bf16"},
    "vllm.awq_gemm": VALUES | GROUPS,
    "vllm.gptq_gemm": GROUPS | {UNORDERED, ACT_ORDER, "wild", "cancel"},
    "vllm.awq_triton": VALUES | GROUPS,
    "triton.awq_gemm.splitk": VALUES | GROUPS | {"bf16"},
    "triton.gptq_gemm.v2": VALUES | GROUPS | {"bf16", ACT_ORDER},
}


@pytest.fixture(scope="module")
def exercised() -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for planned in plan():
        problem = planned.trial.outline()
        for name in builders():
            if not name.startswith(planned.kernels) or kernel(name).refusal(problem, H100.capability):
                continue
            if planned.trial.bias and name.endswith(".atomic"):
                continue
            said = recipe(name, problem, H100)
            if not not_modelled(name, planned.trial, said):
                found[name].update(features(name, planned.trial, said, H100))
    return found


@pytest.mark.parametrize("name", sorted(WANTED))
def test_the_plan_exercises_every_part(exercised: dict[str, Counter[str]], name: str) -> None:
    assert WANTED[name] - exercised[name].keys() == set()


def test_the_plan_is_small_and_its_weights_can_be_made() -> None:
    trials = [p.trial for p in plan()]
    assert len({str(t) for t in trials}) == len(trials)
    assert 150 <= len(trials) <= 300
    for p in plan():
        t = p.trial
        assert t.K % (t.group_size if t.group_size > 0 else t.K) == 0, str(t)
        assert p.stride % 2 == 1
        assert t.M * len(range(0, t.N, p.stride)) <= 20_000


def test_a_recipe_needs_no_weight() -> None:
    for planned in plan()[::17]:
        made = inputs(planned.trial)
        real, outline = planned.trial.problem(made.weight), planned.trial.outline()
        for name in ("vllm.marlin.awq", "vllm.marlin.gptq", "triton.gptq_gemm"):
            if kernel(name).refusal(real, H100.capability):
                continue
            assert recipe(name, real, H100).hash == recipe(name, outline, H100).hash


@pytest.mark.parametrize(
    ("dtype", "subnormal", "largest"), [(torch.float16, 2.0**-14, 2.0**9), (torch.bfloat16, 2.0**-126, 2.0**128)]
)
def test_wild_numbers_span_the_dtype(dtype: torch.dtype, subnormal: float, largest: float) -> None:
    x = wild(64, 256, dtype, 7, highest=8 if dtype == torch.float16 else 127)
    magnitude = x.double().abs()
    assert bool(torch.isfinite(x).all())
    assert bool((magnitude < largest).all())
    assert int((magnitude >= largest / 4).sum()) > 10
    assert int(((magnitude > 0) & (magnitude < subnormal)).sum()) > 10
    assert {bool(torch.signbit(z)) for z in x[x == 0]} == {False, True}


def test_cancelling_terms_leave_a_small_sum_of_large_ones() -> None:
    made = inputs(Trial(8, 1024, 64, 128, "fp16", "awq", "cancel", 3))
    w = made.weight.dequantize(torch.float64)
    exact, size = made.x.double() @ w, made.x.double().abs() @ w.abs()
    assert float((exact.abs() / size).max()) < 1e-2
    assert bool((w[:32] == w[32:64]).all())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(record_golden, "call", call)
    names = ("vllm.marlin.gptq", "vllm.marlin.gptq.fp16", "vllm.machete.gptq", "vllm.gptq_gemm")
    return Recorder(gpu("h200"), torch.device("cpu"), [StandIn(n, gpu("h200")) for n in names])


def test_what_is_recorded_is_read_back(recorder: Recorder, tmp_path: Path) -> None:
    for trial in (Trial(2, 128, 256, 64, "fp16", "gptq", "plain", 1), Trial(1, 512, 64, 128, "fp16", "gptq", "wide", 2)):
        recorder.run(Planned(trial, ("vllm.",), "a test"))
    recorder.run(Planned(Trial(2, 128, 128, -1, "bf16", "gptq", "plain", 3, bias=True), MARLIN, "a bias"))
    golden, stored = load(tmp_path) if save(tmp_path, *recorder.result()) else (None, None)
    assert golden is not None
    assert golden.gpu == "h200"
    assert [[r.kernel for r in p.records] for p in golden.problems] == [
        ["vllm.marlin.gptq", "vllm.marlin.gptq.fp16", "vllm.machete.gptq", "vllm.gptq_gemm"],
        ["vllm.marlin.gptq", "vllm.marlin.gptq.fp16", "vllm.gptq_gemm"],
        ["vllm.marlin.gptq", "vllm.marlin.gptq.fp16"],
    ]
    first = golden.problems[0].records
    assert first[0].offset == first[1].offset  # one piece, so the reduction makes no difference and the bits are shared
    assert first[0].offset != first[3].offset
    assert golden.problems[2].bias_digest
    assert len(stored) == recorder.length


def test_a_kernel_that_raises_is_named(recorder: Recorder) -> None:
    recorder.kernels = [StandIn("vllm.marlin.gptq", error="no luck"), StandIn("vllm.marlin.gptq.fp16")]
    recorder.run(Planned(Trial(1, 128, 64, 64, "fp16", "gptq", "plain", 1), MARLIN, "a test"))
    assert len(recorder.failed) == 1
    assert "vllm.marlin.gptq on M=1 K=128 N=64" in recorder.failed[0]
    assert "no luck" in recorder.failed[0]
    assert [r.kernel for r in recorder.problems[0].records] == ["vllm.marlin.gptq.fp16"]


def test_files_of_two_recordings_do_not_go_together(recorder: Recorder, tmp_path: Path) -> None:
    recorder.run(Planned(Trial(1, 128, 64, 64, "fp16", "gptq", "plain", 1), MARLIN, "a test"))
    golden, stored = recorder.result()
    save(tmp_path, golden, stored)
    other = tmp_path / "other"
    other.mkdir()
    save(other, golden, stored ^ 1)
    (tmp_path / "golden.npz").write_bytes((other / "golden.npz").read_bytes())
    with pytest.raises(QlabError, match="sha256"):
        load(tmp_path)
