"""The benchmark's gate, its copies and its rounds, each with a planted fault; the timing itself on a GPU."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from bench import gemm, timing
from bench.timing import Replay
from qlab.backends.reference import oracle
from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, kernel
from qlab.environment import Environment
from qlab.errors import PackingError
from qlab.inputs import random_activations, random_weight
from qlab.serial import read_json, write_json

CPU = torch.device("cpu")
FLOAT32 = kernel("reference.float32")
SHAPES = ((1, 64, 32), (3, 64, 32), (2, 128, 16))


class Planted(Kernel):
    """The float32 reference with a fault: ``fault(y, call)`` makes the output of its call number ``call``."""

    layout = "none"

    def __init__(self, fault: Callable[[Tensor, int], Tensor], name: str = "planted") -> None:
        self.fault, self.name, self.count = fault, name, 0
        self.seen: set[int] = set()

    def supports(self, problem: Problem, device: torch.device) -> Support:
        return YES

    def pack(self, weight: object) -> Packed:
        return FLOAT32.pack(weight)  # type: ignore[arg-type]

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        self.count += 1
        self.seen.add(packed.tensors["weight"].data_ptr())
        return self.fault(FLOAT32.run(x, packed), self.count - 1)


def sound(y: Tensor, call: int) -> Tensor:
    return y


def settings(*chosen: Kernel, device: torch.device = CPU, seconds: float = 0.02, group: int = 32) -> gemm.Settings:
    return gemm.Settings(SHAPES, chosen, device, group=group, seconds=seconds, total_bytes=0, min_copies=3)


def last(s: gemm.Settings) -> gemm.Result:
    return list(gemm.run(s))[-1]


def entries(r: gemm.Result, name: str) -> list[gemm.Entry]:
    return [e for e in r.entries if e.kernel == name]


def test_every_shape_has_every_peer_and_the_file_reads_back(tmp_path: Path) -> None:
    results = list(gemm.run(settings(FLOAT32, kernel("vllm.marlin.awq"))))
    r = results[-1]
    assert [x.complete for x in results] == [False, True]
    assert {e.shape for e in results[0].entries} == {s for s in SHAPES if s[1:] == (64, 32)}
    assert {(*e.shape, e.kernel) for e in r.entries} == {
        (*s, name) for s in SHAPES for name in ("matmul", "reference.float32", "vllm.marlin.awq")
    }
    assert all(e.reason == "needs a CUDA GPU" and e.speed is None for e in entries(r, "vllm.marlin.awq"))
    for e in (*entries(r, "matmul"), *entries(r, "reference.float32")):
        s = e.speed
        assert s is not None
        assert not e.reason
        assert 0 < s.p10 <= s.median <= s.p90
        assert s.rounds >= timing.MIN_ROUNDS
        assert s.bytes == 2 * (e.K * e.N + e.M * e.K + e.M * e.N)
        assert s.of_copy == pytest.approx(s.bytes / s.median / r.copy_ceiling)
        assert e.relative_l2 is not None
        assert e.bound is not None
        assert 0 < e.relative_l2 <= e.bound
    fast, dense = (next(e.speed for e in entries(r, name) if e.shape == SHAPES[1]) for name in ("reference.float32", "matmul"))
    assert fast is not None
    assert dense is not None
    assert fast.speedup["matmul"] == pytest.approx(dense.median / fast.median)
    assert dense.speedup == {"matmul": 1.0}
    write_json(tmp_path / "r.json", r)
    assert read_json(gemm.Result, tmp_path / "r.json", gemm.SCHEMA) == r
    assert len(list(gemm.tables(r))) == len(SHAPES) + 1


def wrong_column(y: Tensor, call: int) -> Tensor:
    y[:, 5] = -y[:, 5]
    return y


FAULTS: dict[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "every output 1 % too large": (lambda y, call: y * 1.01, "of a plain call exceeds"),
    "one column negated": (wrong_column, "of a plain call exceeds"),
    "NaN": (lambda y, call: y * float("nan"), "of a plain call exceeds"),
    "wrong on one copy alone": (lambda y, call: y * (1 + (call % 3 == 2)), "of one copy among 3"),
    "right on the first call alone": (lambda y, call: y * (call == 0), "of one copy among 3"),
    "another shape": (lambda y, call: y[:, :-1], "output is torch.float16"),
    "another dtype": (lambda y, call: y.float(), "not torch.float16"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_has_a_reason_and_no_speed(name: str) -> None:
    fault, reason = FAULTS[name]
    r = last(replace(settings(Planted(fault)), shapes=SHAPES[:1]))
    (e,) = entries(r, "planted")
    assert e.speed is None
    assert reason in e.reason
    assert all(e.speed and set(e.speed.speedup) == {"matmul"} for e in entries(r, "matmul"))


def test_outputs_that_a_replay_does_not_write_are_not_taken_for_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that does nothing keeps the right outputs of the pass before it, unless they are blanked."""
    once = Replay.__call__
    monkeypatch.setattr(Replay, "__call__", lambda self: None if self.outputs else once(self))
    assert all("nan from float64 of one copy" in e.reason for e in last(settings(FLOAT32)).entries)


def test_a_kernel_that_raises_costs_the_others_nothing() -> None:
    def refuse(y: Tensor, call: int) -> Tensor:
        raise AssertionError("no such tile\nand more")

    class Unpackable(Planted):
        def pack(self, weight: object) -> Packed:
            raise PackingError("cannot hold it")

    r = last(settings(Planted(refuse), Unpackable(sound, "unpackable"), FLOAT32))
    assert {e.reason for e in entries(r, "planted")} == {"AssertionError: no such tile"}
    assert {e.reason for e in entries(r, "unpackable")} == {"cannot hold it"}
    assert all(e.speed for e in entries(r, "reference.float32"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bound_holds_for_sound_roundings_and_not_for_a_wrong_group(dtype: torch.dtype) -> None:
    w, x = random_weight(4096, 64, 128, dtype=dtype), random_activations(16, 4096, dtype=dtype)
    exact = oracle(x, w)
    w16 = w.dequantize(dtype)
    parts = torch.stack([x[:, i::8] @ w16[i::8] for i in range(8)])  # eight slices, each rounded, as awq_gemm has them
    bound = gemm.error_bound("vllm.awq_gemm", 4096, dtype)
    for y in (x @ w16, parts.float().sum(0).to(dtype), (x.double() @ kernel("vllm.machete.awq").decoded(w).double()).to(dtype)):
        assert gemm._error(y, exact, dtype) <= bound
    if dtype == torch.float16:  # 512 joins in fp16: beyond the bound of fp32 sums, within that of fp16 sums
        y = torch.zeros(16, 64, dtype=dtype)
        for i in range(0, 4096, 8):
            y = y + x[:, i : i + 8] @ w16[i : i + 8]
        assert bound < gemm._error(y, exact, dtype) <= gemm.error_bound("vllm.gptq_gemm", 4096, dtype)
    scales = w.scales.clone()
    scales[7] = w.scales[8]
    y = x @ replace(w, scales=scales).dequantize(dtype)
    assert gemm._error(y, exact, dtype) > gemm.error_bound("vllm.gptq_gemm", 4096, dtype)


def test_copies_share_no_memory_and_every_one_is_called() -> None:
    planted = Planted(sound)
    r = last(replace(settings(planted), shapes=SHAPES[:1]))
    listed = {c.kernel: c for c in r.copies}
    assert len(set(listed["planted"].pointers)) == 3
    assert listed["planted"].bytes_each == 2 * 64 * 32
    assert planted.seen == set(listed["planted"].pointers)

    packed = FLOAT32.pack(random_weight(64, 32, 32))
    turned = Packed({"weight": packed.tensors["weight"].t(), "none": torch.empty(0)}, packed.problem)
    copies = timing.clone(turned, 4)
    assert len({timing.pointer(c) for c in (turned, *copies)}) == 5
    assert all(c.tensors["weight"].stride() == turned.tensors["weight"].stride() for c in copies)
    copies[0].tensors["weight"].zero_()
    assert all(torch.equal(c.tensors["weight"], turned.tensors["weight"]) for c in copies[1:])


@pytest.mark.parametrize("size", [600_001, 8_716_288, 30_000_000, 240_000_000, 10**9])
def test_the_copies_exceed_any_l2(size: int) -> None:
    count = timing.copy_count(size, timing.L2_PROOF)
    assert timing.MIN_COPIES <= count <= timing.MAX_COPIES
    assert count * size > 240_000_000
    assert count == timing.MIN_COPIES or (count - 1) * size <= 240_000_000


def test_a_tiny_weight_has_no_more_than_the_most_copies() -> None:
    assert timing.copy_count(1000, timing.L2_PROOF) == timing.MAX_COPIES


def test_rounds_take_every_run_in_rotated_order() -> None:
    assert list(timing.schedule([3, 3, 3])) == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    rounds = list(timing.schedule([100, 5, 37]))
    assert [sum(i in r for r in rounds) for i in range(3)] == [100, 5, 37]
    assert [r for r, order in enumerate(rounds) if 1 in order] == [19, 39, 59, 79, 99]  # spread over the whole time
    assert all(len(set(order)) == len(order) for order in rounds)
    assert list(timing.schedule([])) == []


def test_each_run_has_its_own_samples_and_an_equal_share() -> None:
    cost = [0.001, 0.004, 1.0]
    calls: list[int] = []
    runs: list[Callable[[], None]] = [lambda i=i: calls.append(i) for i in range(3)]  # type: ignore[misc]

    def watch(order: Sequence[Callable[[], None]]) -> list[float]:
        taken = []
        for run in order:
            run()
            taken.append(cost[calls[-1]])
        return taken

    samples = timing.interleaved(runs, 0.1501, watch)
    assert [set(s) for s in samples] == [{c} for c in cost]
    assert [len(s) for s in samples] == [50, 12, timing.MIN_ROUNDS]
    assert calls[9:].index(2) < len(calls) - 20  # the slow one is not left to the end


def test_medians_and_spread_are_per_call() -> None:
    def replay(count: int) -> Replay:
        return Replay([lambda: torch.zeros(1)] * count)

    replays = {"cublas": replay(4), "vllm.marlin.awq": replay(10), "other": replay(2)}
    taken = [np.arange(1, 12) * 4.0, np.full(5, 30.0), np.full(5, 1.0)]
    speeds = timing.summarise(replays, [list(t) for t in taken], dict.fromkeys(replays, 12), 8.0, "cublas")
    c, o = speeds["cublas"], speeds["other"]
    assert (c.median, c.p10, c.p90, c.rounds, c.of_copy) == (6.0, 2.0, 10.0, 11, 12 / 6 / 8)
    assert o.speedup == {"cublas": 12.0, "vllm.marlin.awq": 6.0}


class Graph:
    """Stands in for CUDAGraph: notes what happens, and a call that waits for the GPU breaks the capture as CUDA says."""

    log: tuple[str, ...] = ()
    broken = False

    def capture_begin(self) -> None:
        Graph.log, Graph.broken = (*Graph.log, "begin"), False

    def capture_end(self) -> None:
        Graph.log = (*Graph.log, "end")
        if Graph.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self) -> None:
        Graph.log = (*Graph.log, "replay")


def test_calls_are_captured_once_or_timed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Graph, "log", ())
    count: list[int] = []

    def call() -> Tensor:
        count.append(1)
        return torch.zeros(1)

    replay = timing.prepare([call, call], torch.device("cuda"))
    replay()
    assert (Graph.log, len(count), replay.launched) == (("begin", "end", "replay", "replay"), 2, "CUDA graph")

    def waits() -> Tensor:
        if Graph.log[-1] == "begin":
            Graph.broken = True
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return call()

    replay = timing.prepare([waits, waits], torch.device("cuda"))
    assert len(count) == 4
    assert replay.launched.endswith("captured in a CUDA graph: operation not permitted when stream is capturing")


runner = CliRunner()


@pytest.fixture(scope="module")
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(importlib.import_module("bench.gemm").main)
    return app


def test_the_command_on_a_cpu(command: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    options = ["--device", "cpu", "--shapes", "2,64,32", "--group", "32", "--asymmetric", "--seconds-per-shape", "0"]
    done = runner.invoke(command, [*options, "--kernels", "reference.*,triton.awq_gemm", "--json", str(file)])
    assert done.exit_code == 0, done.output
    r = read_json(gemm.Result, file, gemm.SCHEMA)
    assert r.complete
    assert not r.symmetric
    assert isinstance(r.environment, Environment)
    assert {e.kernel for e in r.entries if e.speed} == {"matmul", "reference.float32", "reference.float64", "triton.awq_gemm"}
    assert all(e.kernel in done.stdout for e in r.entries)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shapes", "1,2"], "--shapes '1,2' is not M,K,N"),
        (["--shapes", "0,64,64"], "--shapes 0,64,64: M, K and N must be positive"),
        (["--shapes", "1,100,64"], "K=100 must be a multiple of the group size 128"),
        (["--kernels", "nothing*"], "--kernels 'nothing*' matches nothing; known: "),
        (["--dtype", "int8"], "--dtype 'int8' is not one of"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: the folder /nowhere does not exist"),
        (["--device", "tpu"], "--device 'tpu' is neither cuda nor cpu"),
    ],
)
def test_bad_options_get_one_sentence(command: typer.Typer, options: list[str], sentence: str) -> None:
    done = runner.invoke(command, ["--device", "cpu", *options])
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(command: typer.Typer) -> None:
    done = runner.invoke(command, [])
    assert done.exit_code == 2
    assert re.fullmatch(r"bench\.gemm: PyTorch finds no CUDA GPU here; --device cpu .*\n", done.stderr)


@pytest.mark.gpu
def test_a_graph_writes_every_output_anew() -> None:
    device = torch.device("cuda")
    planted = Planted(lambda y, call: y * (1 + (call == 2)))
    r = last(replace(settings(FLOAT32, planted, device=device), shapes=SHAPES[:1]))
    assert {e.speed.launched for e in r.entries if e.speed} == {"CUDA graph"}
    assert all(e.speed for name in ("cublas", "reference.float32") for e in entries(r, name))
    assert all("(CUDA graph)" in e.reason for e in entries(r, "planted"))


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_is_timed_plainly_and_says_so() -> None:
    waits = Planted(lambda y, call: y + 0 * float(y.sum()))
    r = last(settings(waits, FLOAT32, device=torch.device("cuda")))
    for e in entries(r, "planted"):
        assert e.speed is not None
        assert e.speed.launched.startswith("plain calls, for they cannot be captured in a CUDA graph: ")
    assert {e.speed.launched for e in entries(r, "reference.float32") if e.speed} == {"CUDA graph"}


@pytest.mark.gpu
@pytest.mark.vllm
def test_marlin_makes_no_workspace_inside_its_graph() -> None:
    """One made there would be zeroed before every call, and that be timed."""
    device, made = torch.device("cuda"), []
    zeros = torch.zeros

    def counted(*args: object, **options: object) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            made.append(args)
        return zeros(*args, **options)  # type: ignore[call-overload]

    s = gemm.Settings(((1, 256, 256),), (kernel("vllm.marlin.gptq"),), device, seconds=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", counted)
        r = last(s)
    assert all(e.speed and e.speed.launched == "CUDA graph" for e in r.entries), [e.reason for e in r.entries]
    assert not made
