"""The layers' benchmark: gate, copies, resuming and left-outs with stand-ins; what it reads has tests of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from bench import layer_gate, layer_measure, layers, timing, warm
from bench.gemm import Dense
from bench.layer_kernels import beyond, choose, dtype_of, matches, recipe_of
from bench.layer_measure import Held, Settings
from bench.layer_results import SCHEMA, Ceilings, Result
from bench.model_layers import BLOCK, MODELS, Layer, random_layer, random_rows
from bench.model_layers import choose as choose_layers
from bench.peers import Peer, Swept, peers
from bench.warm import NOTHING, Ready
from qlab.backends.reference import oracle
from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, kernel
from qlab.errors import QlabError
from qlab.hardware import gpu
from qlab.inputs import random_weight
from qlab.weights import Int4Weight

CPU = torch.device("cpu")
FLOAT32 = kernel("reference.float32")
SMALL = (
    Layer("tiny", "qkv", 64, 96),
    Layer("tiny", "o", 64, 64),
    Layer("tiny", "gate_up", 64, 256),
    Layer("tiny", "down", 128, 64),
)


class Planted(Kernel):
    """The float32 reference; ``fault`` makes its output from the right one and the number of the call."""

    layout = "none"

    def __init__(self, name: str, fault: Callable[[Tensor, int], Tensor] = lambda y, call: y) -> None:
        self.name, self.fault, self.calls = name, fault, 0
        self.seen: list[int] = []

    def supports(self, problem: Problem, device: torch.device) -> Support:
        return YES

    def pack(self, weight: Int4Weight) -> Packed:
        return FLOAT32.pack(weight)

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        self.calls += 1
        self.seen.append(packed.tensors["weight"].data_ptr())
        return self.fault(FLOAT32.run(x, packed), self.calls - 1)

    def version(self) -> str:
        return "1"


class Choice(Swept):
    """Three variants of the reference: one wrong, one slow, one right and quick."""

    name = "choice"

    def supports(self, problem: Problem, device: torch.device) -> Support:
        return YES

    def pack(self, weight: Int4Weight) -> Packed:
        return FLOAT32.pack(weight)

    def variants(self, packed: Packed) -> tuple[str, ...]:
        return "wrong", "slow", "quick"

    def run_variant(self, x: Tensor, packed: Packed, variant: str) -> Tensor:
        y = FLOAT32.run(x, packed)
        if variant == "wrong":
            return -y
        if variant == "slow":
            for _ in range(300):
                y = FLOAT32.run(x, packed)
        return y


def settings(*kernels: Kernel, **changed: object) -> Settings:
    s = Settings((Dense(CPU), *kernels), CPU, Ceilings(1e10, 1e10, 1e11), group=32, seconds=0.01, total_bytes=0)
    return replace(s, **changed)  # type: ignore[arg-type]


def test_layers_are_those_of_the_models() -> None:
    assert {k: [(x.K, x.N) for x in v] for k, v in MODELS.items()} == {
        "llama-3-8b": [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)],
        "qwen2.5-7b": [(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)],
        "llama-70b": [(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)],
    }
    assert [x.key for x in choose_layers("llama-70b.down, 64x32")] == ["llama-70b.down", "shape.64x32"]
    assert len(choose_layers("qwen2.5-7b,qwen2.5-7b.o")) == 4
    with pytest.raises(QlabError, match=r"--layers 'llama' is neither K x N"):
        choose_layers("llama")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_random_layer_has_every_code_and_many_scales(dtype: torch.dtype, symmetric: bool) -> None:
    w = random_layer(Layer("a", "b", 256, 128), 64, dtype, symmetric, CPU, 3)
    assert w.symmetric == symmetric
    assert sorted(w.codes.unique().tolist()) == list(range(16))
    assert symmetric or (int(w.zeros.min()), int(w.zeros.max())) == (1, 15)
    assert w.scales.unique().numel() > 100
    assert 2.0**-8 <= float(w.scales.min()) <= float(w.scales.max()) < 2.0**-6
    assert w.equals(random_layer(Layer("a", "b", 256, 128), 64, dtype, symmetric, CPU, 3))


def test_every_kernel_has_an_entry_and_the_cell_its_ratios() -> None:
    s = settings(Planted("vllm.marlin.gptq"), Planted("vllm.machete.gptq"), Planted("cuda.split"), kernel("vllm.awq_gemm"))
    held = Held(SMALL[0], s)
    c = layer_measure.cell(held, 3)
    assert [e.kernel for e in c.entries] == ["matmul", "vllm.marlin.gptq", "vllm.machete.gptq", "cuda.split", "vllm.awq_gemm"]
    assert (c.model, c.layer, c.M, c.K, c.N) == ("tiny", "qkv", 3, 64, 96)
    last = c.entries[-1]
    assert (last.reason, last.median, last.relative_error) == ("needs a CUDA GPU", 0.0, None)
    best = min(c.median("vllm.marlin.gptq") or 1, c.median("vllm.machete.gptq") or 1)
    for e in c.entries[:-1]:
        assert not e.reason
        assert 0 < e.p10 <= e.median <= e.p90
        assert e.relative_error is not None
        assert e.bound is not None
        assert 0 < e.relative_error <= e.bound
        assert e.rounds >= layer_measure.LEAST_ROUNDS
        assert e.to_best == pytest.approx(best / e.median)
        assert e.to_cublas == pytest.approx((c.median("matmul") or 0) / e.median)
        weight = 2 * 64 * 96 if e.kernel == "matmul" else 64 * 96 // 2 + 2 * 96 * 2
        assert e.bytes == weight + 2 * 3 * (64 + 96)
        assert e.of_memory == pytest.approx(e.bytes / e.median / 1e10)
        assert e.of_compute == pytest.approx(2 * 3 * 64 * 96 / e.median / 1e11)
    listed = {x.kernel: x for x in held.listed()}
    assert set(listed) == {"matmul", "vllm.marlin.gptq", "vllm.machete.gptq", "cuda.split"}
    assert all(len(set(x.pointers)) == len(x.pointers) == 2 for x in listed.values())


def test_a_pass_calls_every_copy() -> None:
    planted = Planted("cuda.split")
    held = Held(SMALL[0], settings(planted, total_bytes=5 * 2 * 64 * 96))
    layer_measure.cell(held, 1)
    (copies,) = (x for x in held.listed() if x.kernel == "cuda.split")
    assert len(copies.pointers) == 6
    assert set(planted.seen) == set(copies.pointers)
    assert timing.copy_count(940_000_000, timing.L2_PROOF, 2) == 2


def one_output(y: Tensor, call: int) -> Tensor:
    y = y.clone()
    y[-1, 5] = -y[-1, 5] + 1
    return y


def not_written(y: Tensor, call: int) -> Tensor:
    y = y.clone()
    y[0, 0] = float("nan")
    return y


FAULTS: dict[str, tuple[Callable[[Tensor, int], Tensor], str]] = {
    "all outputs 1 % too large": (lambda y, call: y * 1.01, "relative L2"),
    "one output": (one_output, "wrong"),
    "an output not written": (not_written, "relative L2 nan"),
    "one copy": (lambda y, call: y * (1 + (call % 2 == 1)), "(call "),
    "the first call alone right": (lambda y, call: y * (call == 0), "(call "),
    "another shape": (lambda y, call: y[:, :-1], "output is torch.float16"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_has_a_reason_and_no_speed(name: str) -> None:
    fault, reason = FAULTS[name]
    c = layer_measure.cell(Held(SMALL[2], settings(Planted("planted", fault), Planted("sound"))), 4)
    e = c.entry("planted")
    assert e is not None
    assert reason in e.reason
    assert e.median == 0.0
    assert c.median("sound")


@pytest.mark.parametrize("m", [1, 300, 700])
def test_the_gate_sees_one_wrong_row_column_or_tile_of_a_large_output(m: int) -> None:
    """Above layer_gate.ROWS rows only some of them are summed over all columns, and some columns over all rows."""
    w = random_weight(64, 2048, 32)
    x = random_rows(m, 64, torch.float16, CPU, 1)
    dense = w.dequantize(torch.float16)
    exact, y = layer_gate.Exact(x, dense), FLOAT32.run(x, FLOAT32.pack(w))
    assert torch.allclose(exact.by_rows, oracle(x, w)[exact.rows])

    def wrong(y: Tensor) -> str:
        return layer_gate.verdict([exact], [y], lambda i: layer_gate.bound("k", 64, torch.float16))[2]

    assert not wrong(y)
    column, row, tile, lost = y.clone(), y.clone(), y.clone(), y.clone()
    column[:, 1777] *= -1
    row[m - 1] *= -1
    tile[-8:, 512:640] *= -1
    lost[-1, -1] = float("inf")
    for bad in (column, row, tile, lost):
        assert wrong(bad)


def test_swept_kernels_count_by_their_fastest_right_variant() -> None:
    held = Held(SMALL[2], settings(Choice()))
    e = layer_measure.cell(held, 2).entry("choice")
    assert e is not None
    assert (e.variant, e.reason) == ("quick", "")
    assert held.chosen == {("choice", 2): "quick"}


def test_a_block_runs_its_layers_in_turn() -> None:
    planted, wrong = Planted("cuda.split"), Planted("wrong", lambda y, call: y * (1 - (call % 4 == 3)))
    s = settings(planted, wrong, Choice())
    c = layer_measure.block([Held(x, s) for x in SMALL], 2)
    assert (c.layer, c.K, c.N) == (BLOCK, 0, 0)
    e, bad, swept = c.entry("cuda.split"), c.entry("wrong"), c.entry("choice")
    assert e is not None
    assert bad is not None
    assert swept is not None
    assert (e.copies, e.calls) == (2, 8)
    assert e.bytes == sum(x.K * x.N // 2 + x.K // 32 * x.N * 2 + 2 * 2 * (x.K + x.N) for x in SMALL)
    assert "wrong" in bad.reason
    assert swept.variant == "quick, quick, quick, quick"


def test_a_peer_of_another_dtype_is_checked_in_its_own() -> None:
    class Bf16(Peer):
        name = "bf16"
        dtype = torch.bfloat16

        def supports(self, problem: Problem, device: torch.device) -> Support:
            return Support(problem.dtype == torch.bfloat16, "" if problem.dtype == torch.bfloat16 else "bf16 only")

        def pack(self, weight: Int4Weight) -> Packed:
            return FLOAT32.pack(weight)

        def run(self, x: Tensor, packed: Packed) -> Tensor:
            return FLOAT32.run(x, packed)

    e = layer_measure.cell(Held(SMALL[0], settings(Bf16())), 2).entry("bf16")
    assert e is not None
    assert (e.reason, e.dtype) == ("", "bfloat16")
    assert e.bound == pytest.approx(4 * 2.0**-8)
    assert dtype_of(Bf16(), torch.float16) == torch.bfloat16


def test_peers_say_why_they_do_not_run_here() -> None:
    found = {p.name: p for p in peers()}
    assert set(found) == {
        *("conch", "fbgemm", "gemlite", "humming", "tinygemm", "vllm.machete.awq.best", "vllm.machete.gptq.best"),
    }
    problem = Problem(1, 256, 256, 128, torch.float16, True, False)
    assert {p.supports(problem, CPU).reason for p in found.values()} == {"needs a CUDA GPU"}
    assert "bf16 only" in found["tinygemm"].refusal(problem, (9, 0))
    assert not found["tinygemm"].refusal(replace(problem, dtype=torch.bfloat16), (9, 0))

    absent = type(found["conch"])()
    absent.package, absent.module = "nowhere-kernels", "nowhere.to.be.found"  # type: ignore[misc]
    assert absent.missing() == "nowhere-kernels is not installed"


def test_kernels_are_chosen_by_globs_the_library_first() -> None:
    names = [k.name for k in choose(None, CPU)]
    assert names[0] == "matmul"
    assert {"vllm.marlin.gptq", "vllm.machete.awq", "vllm.machete.gptq.best", "vllm.awq_triton", "humming"} <= set(names)
    assert not any(n.endswith((".fp16", ".atomic")) for n in names)
    assert [k.name for k in choose("vllm.marlin.*", CPU, without="*.atomic,*.fp16")] == [
        "matmul",
        "vllm.marlin.awq",
        "vllm.marlin.gptq",
    ]
    with pytest.raises(QlabError, match="--kernels 'x\\*' matches nothing"):
        choose("x*", CPU)
    assert matches("vllm.machete.awq.best", ("vllm.machete.*",))


def test_a_recipe_is_a_hash_or_says_that_it_is_opaque() -> None:
    problem = Problem(16, 4096, 4096, 128, torch.float16, True, False)
    assert len(recipe_of(kernel("vllm.marlin.gptq"), problem, gpu("h200"))) == 64
    assert recipe_of(Dense(torch.device("cuda")), problem, gpu("h200")).startswith("opaque: cuBLAS of torch")
    assert recipe_of(kernel("vllm.marlin.gptq"), replace(problem, N=4090), gpu("h200")).startswith("opaque: ")


def start(**changed: object) -> Result:
    return replace(Result(SCHEMA, "float16", 32, True, (), ()), **changed)  # type: ignore[arg-type]


def test_a_run_goes_on_where_the_file_ends(tmp_path: Path) -> None:
    a, b = Planted("a"), Planted("b")
    plan = layers.Plan(SMALL[:2], (1, 2), blocks=False)
    first = list(layers.run(settings(a), plan, start(), {}))
    assert [len(r.cells) for r in first] == [2, 4]
    assert first[-1].runs[0].versions == {"matmul": f"torch {torch.__version__}", "a": "1"}
    assert {(c.kernel, c.layer) for c in first[-1].runs[0].copies} == {(k, x.key) for k in ("matmul", "a") for x in SMALL[:2]}
    first[-1].write(tmp_path / "r.json")
    read = Result.read(tmp_path / "r.json")
    assert read == first[-1]

    again = list(layers.run(settings(a), plan, read, {}))[-1]
    assert again.cells == read.cells
    more = list(layers.run(settings(a, b), replace(plan, rows=(2, 3)), read, {}))[-1]
    assert {(c.layer, c.M): c.run for c in more.cells} == {
        ("qkv", 1): 0,
        ("qkv", 2): 1,
        ("qkv", 3): 1,
        ("o", 1): 0,
        ("o", 2): 1,
        ("o", 3): 1,
    }
    assert all(c.entry("b") is None for c in more.cells if c.run == 0)


def test_what_the_time_does_not_reach_is_listed() -> None:
    r = list(layers.run(settings(Planted("a")), layers.Plan(SMALL[:1], (1, 2), seconds=-1.0), start(), {}))[-1]
    assert r.cells == ()
    assert r.runs[-1].left_out == ("tiny.qkv M=1: no time left", "tiny.qkv M=2: no time left")


def test_only_what_was_ready_in_time_is_timed(tmp_path: Path) -> None:
    """A stand-in for ``python -m bench.warm``: ready for one row at once, then it sleeps; another kernel gives a reason."""

    class Slow(Peer):
        slow_start = True

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def pack(self, weight: Int4Weight) -> Packed:
            return FLOAT32.pack(weight)

        def run(self, x: Tensor, packed: Packed) -> Tensor:
            return FLOAT32.run(x, packed)

        def supports(self, problem: Problem, device: torch.device) -> Support:
            return YES

    script = tmp_path / "warm.sh"
    script.write_text('if [ "$1" = slow ]; then echo ready 1; sleep 60; else echo noise; echo reason no compiler; fi\n')
    slow, broken = Slow("slow"), Slow("broken")
    todo = warm.tasks((Dense(CPU), slow, broken), SMALL[:2])
    assert [(t.kernel.name, t.layer.name) for t in todo] == [("slow", "qkv"), ("broken", "qkv"), ("slow", "o"), ("broken", "o")]
    ready = warm.warm(todo, (1, 2), torch.float16, 32, True, 1.0, 4, command=("sh", str(script)))
    s = settings(slow, broken, ready=ready)
    held = Held(SMALL[0], s)
    c, later = layer_measure.cell(held, 1), layer_measure.cell(held, 2)
    assert c.median("slow")
    assert [x.entry("broken").reason for x in (c, later)] == ["no compiler"] * 2  # type: ignore[union-attr]
    assert later.entry("slow").reason == "not compiled or tuned within 1 s"  # type: ignore[union-attr]
    assert NOTHING.refusal(FLOAT32, SMALL[0], 1) == ""
    assert Ready(5.0, {}, {}).refusal(slow, SMALL[0], 1) == "not compiled or tuned within 5 s"


def test_a_step_that_hangs_ends_the_process() -> None:
    code = "import time; from bench.layers import Watchdog; w = Watchdog(0.5); w('kernel x'); time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "kernel x has not ended" in done.stderr


runner = CliRunner()


@pytest.fixture(scope="module")
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(layers.main)
    return app


def test_the_command_on_a_cpu(command: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    options = ["--device", "cpu", "--layers", "128x64,64x32", "--group", "32", "--rows", "1,3", "--seconds-per-cell", "0"]
    options += ["--kernels", "reference.*,peers", "--json", str(file)]
    done = runner.invoke(command, options)
    assert done.exit_code == 0, done.output
    r = Result.read(file)
    assert [(c.layer, c.M) for c in r.cells] == [("128x64", 1), ("128x64", 3), ("64x32", 1), ("64x32", 3)]
    assert r.kernels() == ("matmul", "reference.float32", "reference.float64")
    assert "reference.float32" in done.stdout
    again = runner.invoke(command, [*options, "--resume"])
    assert again.exit_code == 0, again.output
    assert Result.read(file).cells == r.cells


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rows", "1,x"], "--rows '1,x' are no positive numbers"),
        (["--layers", "100x64"], "--group 128 does not divide K=100 of shape.100x64"),
        (["--resume"], "--resume needs --json"),
        (["--dtype", "int8"], "--dtype 'int8' is not one of"),
        (["--json", "/nowhere/out.json"], "the folder /nowhere does not exist"),
    ],
)
def test_bad_options_get_one_sentence(command: typer.Typer, options: list[str], sentence: str) -> None:
    done = runner.invoke(command, ["--device", "cpu", *options])
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_kernel_for_few_rows_is_not_timed_at_many() -> None:
    for name, said in (("cuda.hardware_invariant", "not timed beyond 128 rows"), ("cuda.split", "")):
        assert beyond(kernel(name), 128) == ""
        assert beyond(kernel(name), 256) == said
