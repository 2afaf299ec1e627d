"""Each part of bench.prove_kernels counts nothing where kernels do as their recipes say, and finds each planted fault."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import prove_kernels
from bench.kernel_proof import batch, hardware, marlin, saved, split, stripes
from bench.kernel_proof.inputs import Trial, activations, fingerprint, shuffled, weight
from bench.kernel_proof.place import Place, poisoned, poisons
from bench.kernel_proof.tally import DETAILS, Failure, Result, Tally, apart, show
from qlab.backends.registry import Problem
from qlab.environment import collect
from qlab.errors import QlabError
from qlab.hardware import gpu
from qlab.recipes import assemble
from qlab.replay import missing, replay
from qlab.serial import write_json
from tests.bench.stand_ins import StandIn

H100, CPU = gpu("h100"), torch.device("cpu")
pytestmark = pytest.mark.skipif(bool(missing("native")), reason=f"the native engine cannot run: {missing('native')}")
SMALL = (
    Trial(3, 256, 64, 64, "fp16", "awq", "cancel", 1),
    Trial(20, 256, 64, 64, "fp16", "awq", "cancel", 1),
    Trial(2, 128, 128, -1, "bf16", "gptq", "wide", 2),
    Trial(5, 256, 64, 32, "bf16", "act_order", "plain", 3),
)


def place(*broken: str, error: str = "", on=H100, **more) -> Place:
    """A place without a GPU whose kernels do as their recipes say, but for those that are ``broken``."""

    def find(name: str) -> StandIn:
        bad = name in broken
        return StandIn(name, on if bad else H100, flip=bad and not error and on is H100, error=error if bad else "")

    return Place(CPU, H100, 600.0, 4, find, "native", **more)


def second(where: Place):
    """The second process, in this one."""

    def check(path: Path, part: Path, arguments: list[str], seconds: float) -> str:
        told = dict(zip(arguments[::2], arguments[1::2], strict=True))
        tally = Tally("second process", part)
        prove_kernels.check(path, where, tally, told["--kernel"], told["--claim"], int(told.get("--runs", 1)))
        return ""

    return check


def claim(tally: Tally, begins: str):
    return next(c for name, c in tally.claims.items() if name.startswith(begins))


def total(tally: Tally) -> tuple[int, int]:
    return sum(c.differing_outputs for c in tally.claims.values()), tally.failures


@pytest.fixture
def small(monkeypatch) -> None:
    for module in (marlin, split, hardware):
        monkeypatch.setattr(module, "trials", lambda count, seed=0: iter(SMALL[:count]))


@pytest.mark.parametrize("trial", SMALL, ids=str)
def test_inputs_are_made_again_bit_for_bit(trial: Trial) -> None:
    w, x = weight(trial, CPU), activations(trial, CPU)
    assert fingerprint(x, w) == fingerprint(activations(trial, CPU), weight(trial.rows(7), CPU))
    assert torch.equal(activations(trial.rows(2), CPU), x[:2])
    assert set(w.codes.flatten().tolist()) == set(range(16))
    assert (w.symmetric, w.act_order) == (trial.form != "awq", trial.form == "act_order")
    assert w.scales.unique().numel() > 30
    assert bool(x.isfinite().all())
    x[0, 3] += 1
    assert fingerprint(x, w) != fingerprint(activations(trial, CPU), w)
    assert sorted(shuffled(100, 3, CPU).tolist()) == list(range(100))


def test_known_inputs() -> None:
    """Files of saved outputs rest on these never changing."""
    found = [fingerprint(activations(t, CPU), weight(t, CPU)) for t in SMALL]
    assert found == KNOWN


KNOWN = ["00006b853edd0696", "000074072c771e16", "000065fa442c90bf", "000072e51dd16e18"]


def test_marlins_plan_spans_what_is_claimed() -> None:
    planned = list(marlin.trials(600))
    assert len({str(t) for t in planned}) == len(planned) == 600
    assert set(marlin.EDGES) <= {t.M for t in planned}
    assert set(marlin.LAYERS) <= {(t.K, t.N) for t in planned}
    kinds = {(t.form, t.dtype, t.group_size) for t in planned}
    assert {(f, d, g) for f in ("awq", "gptq") for d in marlin.DTYPES for g in marlin.GROUPS} <= kinds
    assert {("act_order", d, g) for d in marlin.DTYPES for g in (128, 64, 32)} <= kinds
    assert any(t.K == 128 for t in planned)
    assert any(t.N == 64 for t in planned)
    assert any(t.N == 8192 for t in planned)


@pytest.mark.usefixtures("small")
def test_marlin(tmp_path) -> None:
    tally, where = Tally("marlin"), place()
    marlin.prove(where, tally, tmp_path / "m.json", second(where))
    first, again = claim(tally, "vLLM's"), claim(tally, "saved")
    assert (first.problems, first.outputs) == (again.problems, again.outputs) == (4, 3 * 64 + 20 * 64 + 2 * 128 + 5 * 64)
    assert total(tally) == (0, 0)
    assert tally.complete
    assert tally.part().good
    assert tally.facts["of these, outputs that the order of cuda.split changes"] > 100
    held = saved.load(tmp_path / "m-small.json")
    assert len(held.records) == 4
    assert all(r.bits for r in held.records)
    r = held.records[0]
    x, w = activations(r.trial, CPU), weight(r.trial, CPU)
    y = place().kernel("vllm.marlin.awq" if r.trial.form == "awq" else "vllm.marlin.gptq")
    assert torch.equal(y.run(x, y.pack(w)), saved.decoded(r.bits, r.trial))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-small.json", "m.json"]


@pytest.mark.usefixtures("small")
def test_a_flipped_bit_in_the_first_process(tmp_path) -> None:
    tally = Tally("marlin")
    marlin.prove(place("cuda.marlin"), tally, tmp_path / "m.json", second(place()))
    assert total(tally) == (4, 4)
    assert claim(tally, "vLLM's").differing_bits == 4
    assert "first (0, 0)" in tally.details[0].what
    assert "seed=1" in tally.details[0].problem
    assert not tally.part().good


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bits", [0, 16])
def test_a_flipped_bit_in_the_second_process(tmp_path, monkeypatch, bits) -> None:
    monkeypatch.setattr(marlin, "WITH_BITS", bits)
    tally = Tally("marlin")
    marlin.prove(place(), tally, tmp_path / "m.json", second(place("cuda.marlin")))
    assert claim(tally, "vLLM's").differing_problems == 0
    assert claim(tally, "saved").differing_problems == tally.failures == 4


@pytest.mark.usefixtures("small")
def test_other_inputs_and_a_loaded_vllm_are_told(tmp_path, monkeypatch) -> None:
    tally, where = Tally("marlin"), place()
    marlin.prove(where, tally, tmp_path / "m.json", second(where))
    held = saved.load(tmp_path / "m.json")
    other = replace(held, records=tuple(replace(r, inputs="0") for r in held.records))
    write_json(tmp_path / "other.json", other)
    tally = Tally("second process")
    prove_kernels.check(tmp_path / "other.json", where, tally, "cuda.marlin", "c", 1)
    assert tally.failures == 4
    assert "made again" in tally.details[0].what
    monkeypatch.setattr(saved, "vllm_loaded", lambda: "vllm was imported")
    tally = Tally("second process")
    prove_kernels.check(tmp_path / "m.json", where, tally, "cuda.marlin", "c", 1)
    assert tally.failures == 2
    assert "before" in tally.details[0].what


@pytest.mark.usefixtures("small")
def test_a_second_process_that_dies_fails_the_part(tmp_path) -> None:
    tally = Tally("marlin")
    marlin.prove(place(), tally, tmp_path / "m.json", lambda *_: "ended with status 7")
    assert "status 7" in tally.part().error
    assert not tally.part().good


LAYERS = (Trial(24, 256, 64, 64, "fp16", "awq", "cancel", 5), Trial(24, 256, 72, 32, "bf16", "act_order", "cancel", 6))


class Leaky(StandIn):
    """What stands in the first row of a batch reaches the last one."""

    def run(self, x, packed):
        y = super().run(x, packed)
        if len(x) > 3 and bool(x[0].isnan().any()):
            y[-1, 0] = y[0, 0]
        return y


def test_batch() -> None:
    tally = Tally("batch")
    batch.prove(place(), tally, LAYERS)
    assert total(tally) == (0, 0)
    assert tally.complete
    assert claim(tally, "a row alone").problems == 2
    assert claim(tally, "a row in a batch").problems == 24 + len([m for m in batch.batches(1) if m <= 24])
    assert tally.facts["rows that were NaN or huge beside them"] > 100


def test_batches_that_leak_and_rows_that_are_wrong_are_found() -> None:
    tally = Tally("batch")
    batch.prove(replace(place(), kernel=lambda name: Leaky(name)), tally, LAYERS)
    assert claim(tally, "a row in a batch").differing_problems > 0
    assert claim(tally, "a row alone").differing_problems == 0
    tally = Tally("batch")
    batch.prove(place("cuda.batch_invariant"), tally, LAYERS)
    assert claim(tally, "a row alone").differing_problems == 2
    assert len(batch.batches(0)) == 1024


@pytest.mark.usefixtures("small")
def test_hardware(monkeypatch) -> None:
    tally = Tally("hardware")
    hardware.prove(place(), tally)
    assert total(tally) == (0, 0)
    assert tally.complete
    assert claim(tally, "one recipe").problems == claim(tally, "the C++").problems == 4
    assert claim(tally, "the numpy").problems == 3
    tally = Tally("hardware")
    hardware.prove(place("cuda.hardware_invariant"), tally)
    assert claim(tally, "the C++").differing_bits == 4
    assert claim(tally, "the numpy").differing_bits == 3


def emulated(x, packed, planner: stripes.Elsewhere, flip: bool = False):
    problem = replace(packed.problem, M=len(x))
    y = replay(assemble(stripes.striped(problem, gpu(planner.key), H100), problem), x, packed.tensors["weight"])
    if flip:
        y.view(torch.int16)[0, 0] ^= 1
    return y


@pytest.mark.usefixtures("small")
def test_stripes() -> None:
    tally = Tally("stripes")
    stripes.prove(place(), tally, emulated, "native")
    assert total(tally) == (0, 0)
    assert tally.complete
    assert claim(tally, "other SM counts' stripes, INT4").problems == 4
    assert sum(c.problems for n, c in tally.claims.items() if n.endswith("planned GEMM")) >= 6
    tally = Tally("stripes")
    stripes.prove(place(), tally, lambda *a: emulated(*a, flip=True), "native")
    assert claim(tally, "other SM counts' stripes, INT4").differing_bits == 4
    assert tally.failures == 4


@pytest.mark.usefixtures("small")
def test_split(tmp_path) -> None:
    tally, where = Tally("split"), place()
    split.prove(where, tally, tmp_path, check=second(where))
    assert total(tally) == (0, 0)
    assert tally.complete
    assert tally.part().good
    for name in split.NAMES:
        assert claim(tally, f"{name}, its replay").problems == 4
        again = claim(tally, f"{name}, ten runs")
        assert (again.problems, again.outputs) == (4, 2 * 10 * claim(tally, f"{name}, its replay").outputs)


@pytest.mark.usefixtures("small")
def test_split_finds_what_is_planted(tmp_path) -> None:
    tally = Tally("split")
    split.prove(place("triton.w4a16"), tally, tmp_path, check=second(place("cuda.split")))
    assert claim(tally, "triton.w4a16, its replay").differing_bits == 4
    assert claim(tally, "cuda.split, its replay").differing_bits == 0
    assert claim(tally, "cuda.split, ten runs").differing_problems == 4
    tally = Tally("split")
    split.prove(place("triton.w4a16", error="out of luck"), tally, tmp_path, check=second(place()))
    assert claim(tally, "triton.w4a16").failed == 4
    assert "out of luck" in tally.details[0].what
    assert claim(tally, "cuda.split, its replay").problems == 4


def test_memory_that_nobody_wrote_is_nan() -> None:
    assert poisons(CPU)
    with poisoned():
        assert bool(torch.empty(9, dtype=torch.bfloat16).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_time_that_is_up_is_told(tmp_path) -> None:
    where = replace(place(), seconds=0.0)
    tally = Tally("hardware")
    hardware.prove(where, tally)
    assert tally.left_out == {"no time left": 4}
    assert not tally.part().good
    assert not tally.complete


def test_counting() -> None:
    a = torch.tensor([[1.0, -0.0], [2.0, 3.0]], dtype=torch.float16)
    b = torch.tensor([[1.0, 0.0], [2.0, 3.0]], dtype=torch.float16)
    assert apart(a, a)[:2] == (0, 0)
    assert apart(a, b)[:2] == (1, 1)
    assert apart(a, a.bfloat16())[:2] == (4, 64)
    tally = Tally("t")
    for i in range(30):
        tally.fail(Failure("c", str(i), "w"))
    assert tally.part().failures == 30
    assert len(tally.part().details) == DETAILS


def test_parts_run_apart_and_one_that_dies_costs_only_itself(tmp_path, monkeypatch, capsys) -> None:
    """Stand-ins for the processes: one leaves a good part, one nothing, one a fault."""
    tally = Tally("batch")
    tally.compare("c", "p", torch.ones(2, 2).half(), torch.ones(2, 2).half())
    tally.complete, good = True, tally.part()

    class Process:
        def __init__(self, command, **_) -> None:
            name, self.returncode = command[command.index("--worker") + 1], 0
            if name == "batch":
                write_json(Path(command[command.index("--file") + 1]), replace(good, complete=True))
            else:
                self.returncode = -11

        def wait(self, timeout=None) -> int:
            return self.returncode

    monkeypatch.setattr(prove_kernels.subprocess, "Popen", Process)
    found = prove_kernels.gather(["batch", "split"], tmp_path / "r.json", [], 1.0)
    assert [p.good for p in found] == [True, False]
    assert "status -11" in found[1].error
    result = Result("s", "h100", collect(details=False), "none", 1.0, found)
    assert not result.good
    write_json(tmp_path / "r.json", result)
    assert json.loads((tmp_path / "r.json").read_text())["parts"][0]["claims"][0]["outputs"] == 4
    show(result)
    assert "split: ended with status -11" in capsys.readouterr().out


def test_a_worker_that_raises_keeps_what_it_had(tmp_path, monkeypatch) -> None:
    def prove(where, tally) -> None:
        tally.claim("c", problems=3)
        raise QlabError("the GPU is gone")

    monkeypatch.setattr(hardware, "prove", prove)
    prove_kernels.work("hardware", place(), Tally("hardware", tmp_path / "h.json"), tmp_path / "out.json")
    part = saved.part_of(tmp_path / "h.json")
    assert part.error == "QlabError: the GPU is gone"
    assert part.claims[0].problems == 3
    prove_kernels.work("marlin", place(), Tally("marlin", tmp_path / "m.json"), tmp_path / "out.json")
    assert "vLLM's kernels" in saved.part_of(tmp_path / "m.json").error


def test_the_problem_of_a_trial_is_what_kernels_take() -> None:
    for trial in split.trials(20):
        if trial.K * trial.N < 1 << 20:
            problem = Problem.of(weight(trial, CPU), trial.M)
            assert not StandIn("cuda.split").refusal(problem, (9, 0))
