"""The CUDA engine: on a GPU against the native engine and the tensor core itself; without one, how it is built and refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import AMPERE, HOPPER, detect
from qlab.replay import cuda, native, probe
from qlab.replay.program import Program
from tests.replay.random_programs import Case, random_case

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "native engine is here")
needs_cuda = pytest.mark.skipif(bool(cuda.reason()), reason=cuda.reason() or "CUDA engine is here")


def gpu_operands(case: Case) -> list[Tensor]:
    return [
        torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a).cuda()
        for a in (case.x, case.w, case.scales, case.group, case.bias)
    ]


def run(case: Case, raw: bool = False) -> np.ndarray:
    y = cuda.run(case.program, *gpu_operands(case), dtype=torch.bfloat16 if case.bf16 else torch.float16, raw=raw)
    assert y.dtype == (torch.float32 if raw else torch.int16)
    return y.cpu().numpy().view(np.uint32 if raw else np.uint16)


def native_outputs(case: Case, raw: bool) -> np.ndarray:
    y, p = np.zeros((case.x.shape[0], case.w.shape[1]), np.uint32 if raw else np.uint16), case.program
    native.execute(*case.operands, p.order, p.steps, p.ops, p.regions, case.bf16, y)
    return y


# ---- on a GPU
@pytest.mark.gpu
@needs_cuda
@needs_native
@pytest.mark.parametrize("raw", [False, True], ids=["outputs", "fp32 values"])
def test_random_programs_agree_with_the_native_engine(raw: bool) -> None:
    outputs = 0
    for seed in range(400):
        case = random_case(seed, raw)
        got, want = run(case, raw), native_outputs(case, raw)
        assert np.array_equal(got, want), f"seed {seed}: {int((got != want).sum())} of {want.size} differ"
        outputs += want.size
    assert outputs > 600_000


@pytest.mark.gpu
@needs_cuda
@needs_native
@pytest.mark.parametrize("shape", range(5), ids=["64 rows", "32 rows", "16 rows", "8 rows", "4 rows"])
def test_every_shape_of_tiles(shape: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long chains of one step through each kernel, none of it left to the choice by size."""
    monkeypatch.setattr(cuda, "choose_shape", lambda *_: shape)
    monkeypatch.setattr(cuda, "largest_shape", lambda *_: 0)
    monkeypatch.setattr(cuda, "_plans", type(cuda._plans)())
    rng = np.random.default_rng(shape)
    m, k, n = 150, 1024, 300
    for row in ((0, 24, 8, -132, 0, 8), (0, 25, 16, -133, 0, 16), (0, 25, 16, -21, 1, 16)):
        for dtype in (torch.float16, torch.bfloat16):
            if row[4] and dtype == torch.bfloat16:
                continue
            x, w = (torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in ((m, k), (k, n)))
            x[3, 100], x[70, 1000] = float("inf"), float("nan")
            program = Program(
                rng.permutation(k).astype(np.int32),
                np.array([row], np.int32),
                np.array([(0, 0, 0, 512), (0, 0, 512, 1024), (1, 0, 0, 0)], np.int32),
                np.array([(0, m, 0, n, 0, 3)], np.int32),
            )
            bits = [t.view(torch.int16).numpy().view(np.uint16) for t in (x, w)]
            nothing = np.zeros(0, np.uint16)
            scales, group = np.zeros((0, n), np.uint16), np.zeros(0, np.int32)
            case = Case(program, bits[0], bits[1], scales, group, nothing, dtype == torch.bfloat16)
            assert np.array_equal(run(case, raw=True), native_outputs(case, raw=True))


@pytest.mark.gpu
@needs_cuda
def test_batches_and_streams_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(4)
    want = run(case)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert np.array_equal(run(case), want)
    monkeypatch.setattr(cuda, "RESULTS", 1000)
    other = replace(case, program=replace(case.program, regions=case.program.regions[::-1].copy()))
    assert np.array_equal(run(other), want)


@pytest.mark.gpu
@needs_cuda
def test_operands_in_any_form() -> None:
    case = random_case(0)
    x, w, scales, group, bias = gpu_operands(case)
    dtype = torch.bfloat16 if case.bf16 else torch.float16
    want = cuda.run(case.program, x, w, scales, group, bias, dtype=dtype)
    typed = [t.view(dtype) for t in (x, w, scales, bias)]
    got = cuda.run(case.program, typed[0], typed[1].t().contiguous().t(), typed[2], group.long(), typed[3])
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.int16), want)
    with pytest.raises(QlabError, match="one GPU"):
        cuda.run(case.program, x.cpu(), w, scales, group, bias, dtype=dtype)
    with pytest.raises(QlabError, match="one dtype"):
        cuda.run(case.program, x, typed[1], scales, group, bias, dtype=dtype)
    with pytest.raises(QlabError, match="dtype naming one of them"):
        cuda.run(case.program, x, w, scales, group, bias)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("accumulator", ["fp32", "fp16"])
@pytest.mark.parametrize("shape", ["m16n8k16", "m16n8k8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_tensor_core_computes_the_step(dtype: torch.dtype, shape: probe.Shape, accumulator: probe.Accumulator) -> None:
    """A small part of bench/prove_step.py; both forms of the engine's arithmetic."""
    here = detect()
    if here is None or here.capability < (8, 0):
        pytest.skip("the probe's instructions need compute capability 8.0")
    if accumulator == "fp16" and dtype == torch.bfloat16:
        pytest.skip("there is no such instruction")
    k, generator = probe.DEPTHS[shape], torch.Generator("cuda").manual_seed(1)
    step = replace(here.step, terms=min(here.step.terms, k))
    a = torch.randn((4000, 16, k), device="cuda", generator=generator).to(dtype).view(torch.int16)
    b = torch.randn((4000, k, 8), device="cuda", generator=generator).to(dtype).view(torch.int16)
    c = torch.randn((4000, 16, 8), device="cuda", generator=generator)
    c = c.view(torch.int32) if accumulator == "fp32" else c.half().view(torch.int16)
    want = probe.mma(a, b, c, shape, accumulator, dtype)
    slow, none = probe.replayed(a, b, c, step, shape, accumulator, dtype, fast=False)
    fast, took = probe.replayed(a, b, c, step, shape, accumulator, dtype)
    assert (none, took) == (0, want.numel() * k // step.terms)
    assert torch.equal(slow, want)
    assert torch.equal(fast, want)
    wrong = probe.replayed(a, b, c, replace(step, fraction_bits=step.fraction_bits - 1), shape, accumulator, dtype)[0]
    assert not torch.equal(wrong, want) or accumulator == "fp16"


# ---- without one
def test_missing_module_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.modules['qlab._cuda'] = None\nfrom qlab.replay.cuda import reason; print(reason())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "CUDA module is not there" in ran.stdout
    assert "QLAB_BUILD_CUDA=1 pip install -e ." in ran.stdout

    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_MISSING", "not built")
    case, nothing = random_case(0), torch.empty(0)
    assert cuda.reason() == "not built"
    with pytest.raises(UnsupportedError, match="not built"):
        cuda.run(case.program, nothing, nothing, nothing, nothing, nothing)
    with pytest.raises(UnsupportedError, match="not built"):
        probe.mma(nothing, nothing, nothing)


def test_no_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.reason() == "PyTorch finds no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "needs compute capability 8.0" in cuda.reason()


def test_programs_that_do_not_fit_are_refused() -> None:
    order, steps = np.arange(32, dtype=np.int32), np.array([(0, 25, 16, -133, 0, 16)], np.int32)
    ops, regions = np.array([(0, 0, 0, 32), (2, 1, 0, 0)], np.int32), np.array([(0, 4, 0, 8, 0, 2)], np.int32)
    good = Program(order, steps, ops, regions)
    cuda.check_program(good, 4, 32, 8)
    refused = [
        (replace(good, order=order + 1), "order goes beyond K=32"),
        (replace(good, order=order - 1), "order goes beyond K=32"),
        (replace(good, steps=np.array([(0, 25, 65, -133, 0, 65)], np.int32)), "1 to 64 terms"),
        (replace(good, regions=regions + np.array([0, 1, 0, 0, 0, 0], np.int32)), "regions go beyond the output"),
        (replace(good, regions=regions - np.array([0, 0, 1, 0, 0, 0], np.int32)), "regions go beyond the output"),
        (replace(good, ops=np.array([(0, 1, 0, 32), (2, 1, 0, 0)], np.int32)), "a step or a slice that is not there"),
        (replace(good, ops=np.array([(0, 0, 16, 48), (2, 1, 0, 0)], np.int32)), "a step or a slice that is not there"),
        (replace(good, ops=np.array([(0, 0, 0, 20), (2, 1, 0, 0)], np.int32)), "does not divide into steps of 16"),
        (replace(good, ops=np.array([(0, 0, 0, 32), (1, 0, 0, 0)], np.int32)), "a stack of 0 values"),
        (replace(good, ops=np.array([(0, 0, 0, 32), (0, 0, 0, 32)], np.int32)), "leaves 2 values"),
    ]
    for program, sentence in refused:
        with pytest.raises(QlabError, match=sentence):
            cuda.check_program(program, 4, 32, 8)


def test_small_problems_take_small_tiles() -> None:
    shapes = [(64, 128), (32, 128), (16, 128), (8, 128), (4, 128), (4, 128)]
    assert [cuda.choose_shape(rows, shapes) for rows in (1, 4, 5, 8, 9, 16, 17, 33, 64, 300)] == [4, 4, 3, 3, 2, 2, 1, 0, 0, 0]
    case = random_case(0)
    few = replace(case.program, regions=np.array([(0, 64, 0, 4096, 0, case.program.regions[0, 5])], np.int32))
    assert cuda.largest_shape(few, shapes, 1) == 0
    assert cuda.largest_shape(few, shapes, 10_000) == cuda.WORTH_SPLITTING


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = f"{home}/bin/nvcc" if Path(home, "bin/nvcc").is_file() else shutil.which("nvcc")
    return found or pytest.skip("there is no nvcc to compile with")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What ptxas says of csrc/replay.cu for sm_80 and sm_90, and the PTX."""
    folder = tmp_path_factory.mktemp("compiled")
    flags = ["-O3", "-std=c++17", "--fmad=false", "-Xptxas=-v", "--keep", f"--keep-dir={folder}", "-c"]
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    command = [nvcc(), *flags, *archs, str(ROOT / "csrc/replay.cu"), "-o", str(folder / "replay.o")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr, "".join(p.read_text() for p in folder.glob("*.ptx"))


@pytest.mark.parametrize("arch", [80, 90])
def test_fast_kernels_compile_without_spills(
    compiled: tuple[str, str], arch: int, record_property: Callable[[str, object], None]
) -> None:
    kernels = 0
    for part in compiled[0].split("Compiling entry function")[1:]:
        name, target = part.split("'")[1:4:2]
        spilled, registers = (re.search(p, part) for p in (r"(\d+) bytes spill stores", r"Used (\d+) registers"))
        assert spilled is not None, part
        assert registers is not None, part
        if target == f"sm_{arch}" and "fast_chains" in name:
            kernels += 1
            record_property(name, f"{registers[1]} registers, {spilled[1]} bytes spilled")
            assert int(spilled[1]) == 0, f"{name} spills {spilled[1]} bytes"
    assert kernels == 15


def test_the_engine_uses_no_tensor_core(compiled: tuple[str, str]) -> None:
    assert "fma.rm.f64" in compiled[1]
    assert not re.findall(r"\bw?g?mma\.|wmma\.", compiled[1])


@pytest.mark.parametrize(
    ("wish", "home", "sentence"),
    [
        ("1", "nowhere", "QLAB_BUILD_CUDA is 1, but qlab._cuda cannot be built: there is no bin/nvcc in"),
        ("1", "wrapper", "there is no lib64/libcudart in"),
        ("auto", "nowhere", "qlab._cuda is not built: there is no bin/nvcc in"),
        ("0", "nowhere", "qlab._cuda is not built: QLAB_BUILD_CUDA is 0"),
        ("yes", "nowhere", "QLAB_BUILD_CUDA must be auto, 0 or 1, not 'yes'"),
    ],
)
def test_build_says_why_there_is_no_cuda_module(wish: str, home: str, sentence: str, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper/bin/nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.touch()
    env = {**os.environ, "QLAB_BUILD_CUDA": wish, "CUDA_HOME": str(tmp_path / home)}
    ran = subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert sentence in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    assert (ran.returncode == 0) == (wish in ("auto", "0"))


def test_steps_with_a_fast_form() -> None:
    if cuda._cuda is None:
        pytest.skip(cuda.reason())
    for step, fast in (
        (AMPERE, True),
        (HOPPER, True),
        (replace(HOPPER, fraction_bits=26), False),
        (replace(HOPPER, terms=32), False),
    ):
        row = cuda._cuda.StepRow(0, step.fraction_bits, step.terms, step.zero_exponent, 0)
        assert cuda._cuda.is_fast(row, True) == fast
