"""The tensor-core engine: on a GPU against the emulation; without one, its kernels on the CPU, its tiles and refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.hardware import Gpu, detect, gpu
from qlab.inputs import random_weight
from qlab.recipes import recipe
from qlab.replay import cuda, missing, native, native_steps, prepare, tensor_cores
from qlab.replay.program import Op, Program
from tests.replay import emulated_planned
from tests.replay.random_programs import STEPS, Case, random_bits, random_case

H100, A100 = gpu("h100"), gpu("a100")
OWN: dict[str, tuple[Gpu, tuple[str, ...]]] = {
    "h100": (H100, ("hopper", "hopper as two", "hopper, fp16 accumulator")),
    "a100": (A100, ("ampere", "ampere, fp16 accumulator")),
}
"""Steps of random_programs that each GPU's tensor cores compute."""
SHAPES = ["128 x 256", "128 x 128", "64 x 128", "32 x 128", "16 x 128"]
needs_native = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "native engine is here")
needs_cuda = pytest.mark.skipif(bool(tensor_cores.reason()), reason=tensor_cores.reason() or "the engine is here")


def plain_case(
    seed: int,
    steps: list[str],
    *,
    m: int,
    n: int,
    lengths: list[int],
    bf16: bool = False,
    kind: str = "normal",
    aligned: bool = True,
    rounded: bool = False,
    nested: bool = False,
    outputs: bool = True,
) -> Case:
    """One region whose chains, of the steps in turn, are joined in turn, or ``nested`` from the last one on.

    ``aligned`` walks take eighths of k in any order, others any k.
    """
    rng = np.random.default_rng(seed)
    own, k = 2 if bf16 else 1, 160
    ops: list[tuple[int, int, int, int]] = []
    start = 0
    for i, length in enumerate(lengths):
        ops.append((int(Op.CHAIN), i % len(steps), start, start + length))
        ops += [(int(Op.ROUND), own, 0, 0)] if rounded else []
        if i and not nested:
            ops.append((int(Op.ADD), own if rounded and i % 2 else 0, 0, 0))
            ops += [(int(Op.ROUND), own, 0, 0)] if rounded else []
        start += length
    ops += [(int(Op.ADD), 0, 0, 0)] * (len(lengths) - 1) if nested else []
    if outputs:
        ops += [(int(op), own, 0, 0) for op in (Op.ROUND, Op.SCALE, Op.BIAS)]
    eighths = rng.integers(0, k // 8, start // 8)
    order = (eighths[:, None] * 8 + np.arange(8)).ravel() if aligned else rng.integers(0, k, start)
    program = Program(
        order.astype(np.int32),
        np.array([STEPS[s] for s in steps], np.int32),
        np.array(ops, np.int32),
        np.array([(0, m, 0, n, 0, len(ops))], np.int32),
    )
    x, w = random_bits((m, k), bf16, kind, rng), random_bits((k, n), bf16, "normal" if "rare" in kind else kind, rng)
    scales, bias = random_bits((4, n), bf16, "normal", rng), random_bits((n,), bf16, "normal", rng)
    return Case(program, x, w, scales, rng.integers(0, 4, k).astype(np.int32), bias, bf16)


def native_outputs(case: Case, raw: bool) -> np.ndarray:
    y, p = np.zeros((case.x.shape[0], case.w.shape[1]), np.uint32 if raw else np.uint16), case.program
    native.execute(*case.operands, p.order, p.steps, p.ops, p.regions, case.bf16, y)
    return y


# ---- on a GPU
def outputs(module: ModuleType, case: Case, raw: bool) -> np.ndarray:
    """Bits that an engine gives on the GPU."""
    arrays = (case.x, case.w, case.scales, case.group, case.bias)
    operands = [torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a).cuda() for a in arrays]
    y = module.run(case.program, *operands, dtype=torch.bfloat16 if case.bf16 else torch.float16, raw=raw)
    return y.cpu().numpy().view(np.uint32 if raw else np.uint16)


@pytest.mark.gpu
@needs_cuda
def test_random_programs_agree_with_the_emulation() -> None:
    here = detect()
    assert here is not None
    ran = refused = 0
    for seed in range(600):
        case = random_case(seed, raw=seed % 2 == 1)
        if why := native_steps.refusal(case.program, case.bf16, here):
            with pytest.raises(UnsupportedError, match=re.escape(why)):
                outputs(tensor_cores, case, seed % 2 == 1)
            refused += 1
            continue
        got, want = (outputs(engine, case, seed % 2 == 1) for engine in (tensor_cores, cuda))
        assert np.array_equal(got, want), f"seed {seed}: {int((got != want).sum())} of {want.size} differ"
        ran += 1
    assert ran > 20
    assert refused > 20


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
def test_whole_programs_and_chains_side_by_side_agree_with_the_emulation(bf16: bool) -> None:
    here = detect()
    assert here is not None
    rows = {name: row for name, row in STEPS.items() if row[0] == 0 and native_steps.instruction(row, bf16, here)[0]}
    for kind in ("normal", "wide", "any bits", "rare specials"):
        for seed, (m, n) in enumerate([(1, 64), (9, 130), (33, 1000), (70, 4096), (700, 4096), (130, 20_000)]):
            for step in rows:
                case = plain_case(seed, [step], m=m, n=n, lengths=[96, 48, 0, 160], bf16=bf16, kind=kind, aligned=seed % 3 != 1)
                got, want = (outputs(engine, case, False) for engine in (tensor_cores, cuda))
                assert np.array_equal(got, want), f"{step}, {m} x {n}: {int((got != want).sum())} of {want.size} differ"


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("shape", range(5), ids=SHAPES)
def test_every_shape_of_tiles_on_the_gpu(shape: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long chains, so that the stages are used over and over."""
    monkeypatch.setattr(tensor_cores, "COST", tuple(float(i != shape) * 1e6 for i in range(5)))
    monkeypatch.setattr(tensor_cores, "OCCUPIED", 0.0)
    monkeypatch.setattr(tensor_cores, "_plans", type(tensor_cores._plans)())
    here = detect()
    assert here is not None
    for step, row in STEPS.items():
        if row[0] == 0 and native_steps.instruction(row, False, here)[0]:
            case = plain_case(shape, [step], m=500, n=3000, lengths=[2048, 1040, 4096])
            got, want = (outputs(engine, case, False) for engine in (tensor_cores, cuda))
            assert np.array_equal(got, want), f"{step}: {int((got != want).sum())} of {want.size} differ"


@pytest.mark.gpu
@needs_cuda
def test_a_planted_difference_shows() -> None:
    """Another order of the same k gives other bits, or the comparisons above would say nothing."""
    here = detect()
    assert here is not None
    step = next(n for n, r in STEPS.items() if r[0] == 0 and r[4] == 0 and native_steps.instruction(r, False, here)[0])
    case = plain_case(0, [step], m=64, n=512, lengths=[2048], outputs=False)
    turned = replace(case.program, order=np.ascontiguousarray(case.program.order[::-1]))
    assert not np.array_equal(outputs(tensor_cores, case, True), outputs(cuda, replace(case, program=turned), True))


# ---- on the CPU
@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> emulated_planned.Libraries:
    return emulated_planned.Libraries(tmp_path_factory.mktemp("planned"))


@needs_native
@pytest.mark.parametrize("kind", ["normal", "any bits", "rare specials"])
@pytest.mark.parametrize(
    ("here", "step", "bf16"),
    [(h, s, b) for h, (_, steps) in OWN.items() for s in steps for b in (False, True) if not (b and "fp16" in s)],
)
def test_device_code_agrees_with_the_native_engine(
    libraries: emulated_planned.Libraries, here: str, step: str, bf16: bool, kind: str
) -> None:
    """Every kind of instruction, in chains side by side and in whole programs, with stages that a chain leaves part of."""
    for seed, (m, n, aligned) in enumerate([(17, 136, True), (5, 72, False), (40, 30, True), (3, 64, True)]):
        shape = {"m": m, "n": n, "lengths": [96, 48, 0, 32], "bf16": bf16, "kind": kind, "aligned": aligned}
        case = plain_case(seed, [step], **shape, rounded=seed == 3, nested=seed == 2)
        for sms, whole in ((1, True), (1000, False)):
            got, was = emulated_planned.run(libraries, case.program, *case.operands, bf16, OWN[here][0], sms)
            want = native_outputs(case, False)
            assert was == whole
            assert np.array_equal(got, want), f"{seed}, {sms}: {int((got != want).sum())} of {want.size} differ"
        raw = plain_case(seed, [step], **shape, outputs=False)
        got, _ = emulated_planned.run(libraries, raw.program, *raw.operands, bf16, OWN[here][0], raw=True)
        assert np.array_equal(got, native_outputs(raw, True))


@needs_native
@pytest.mark.parametrize("shape", range(5), ids=SHAPES)
def test_every_shape_of_tiles(libraries: emulated_planned.Libraries, shape: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows and columns than one tile, more tiles than blocks."""
    rows, columns = libraries.sizes()[shape]
    monkeypatch.setattr(tensor_cores, "COST", tuple(float(i != shape) * 1e6 for i in range(5)))
    case = plain_case(shape, ["hopper"], m=rows + 3, n=columns + 24, lengths=[64, 48])
    got, whole = emulated_planned.run(libraries, case.program, *case.operands, False, H100)
    assert whole
    assert np.array_equal(got, native_outputs(case, False))


@needs_native
@pytest.mark.parametrize(
    "steps", [["fma"], ["half dot"], ["fma", "hopper", "half dot"], ["fma, fp16", "half dot", "hopper as two"]]
)
def test_steps_of_cuda_cores(libraries: emulated_planned.Libraries, steps: list[str]) -> None:
    for seed, (m, n) in enumerate([(1, 130), (20, 50), (70, 8)]):
        for bf16 in (False, True):
            if bf16 and set(steps) & {"half dot", "fma, fp16"}:
                continue
            for raw in (False, True):
                case = plain_case(seed, steps, m=m, n=n, lengths=[48, 32, 80], bf16=bf16, aligned=seed != 1, outputs=not raw)
                got, whole = emulated_planned.run(libraries, case.program, *case.operands, bf16, H100, raw=raw)
                assert not whole
                assert np.array_equal(got, native_outputs(case, raw))


@needs_native
def test_random_programs_on_the_cpu(libraries: emulated_planned.Libraries) -> None:
    ran = 0
    for seed in range(120):
        case = random_case(seed, raw=seed % 2 == 1)
        if native_steps.refusal(case.program, case.bf16, H100) or case.x.size * case.w.size > 3e7:
            continue
        got, _ = emulated_planned.run(libraries, case.program, *case.operands, case.bf16, H100, raw=seed % 2 == 1)
        assert np.array_equal(got, native_outputs(case, seed % 2 == 1)), f"seed {seed}"
        ran += 1
    assert ran > 3


# ---- without kernels
@pytest.mark.parametrize("here", list(OWN))
def test_steps_that_a_gpu_computes(here: str) -> None:
    device, own = OWN[here]
    for name, row in STEPS.items():
        found, why = native_steps.instruction(row, False, device)
        assert (found is not None) == (name in own or row[0] != 0), name
        assert bool(why) == (found is None)
    assert native_steps.instruction(STEPS["hopper"], False, H100)[0] == "k16"
    assert native_steps.instruction(STEPS["hopper as two"], True, H100)[0] == "k8"
    assert native_steps.instruction(STEPS["ampere"], False, A100)[0] == "k16"


@pytest.mark.parametrize(
    ("row", "bf16", "here", "sentence"),
    [
        (STEPS["ampere"], False, H100, "keep F = 25 bits, and the step keeps 24"),
        (STEPS["hopper"], False, A100, "keep F = 24 bits, and the step keeps 25"),
        ((0, 25, 4, -133, 0, 4), False, H100, "add 16 products at once .* the step adds 4"),
        ((0, 25, 16, -132, 0, 16), False, H100, "exponent -133 on .* and -132 in the step"),
        (STEPS["hopper, fp16 accumulator"], True, H100, "bf16 operands and fp16 accumulators"),
        (STEPS["volta"], False, gpu("v100"), "need compute capability 8.0"),
    ],
)
def test_other_steps_are_refused_with_a_reason(row: tuple[int, ...], bf16: bool, here: Gpu, sentence: str) -> None:
    found, why = native_steps.instruction(row, bf16, here)
    assert found is None
    assert re.search(sentence, why)


def test_a_program_is_refused_for_the_steps_of_its_chains() -> None:
    case = plain_case(0, ["hopper", "ampere"], m=4, n=8, lengths=[32])
    assert native_steps.refusal(case.program, False, H100) == ""
    both = plain_case(0, ["hopper", "ampere"], m=4, n=8, lengths=[32, 32])
    assert "keep F = 25 bits" in native_steps.refusal(both.program, False, H100)


def test_programs_that_one_block_computes() -> None:
    case = plain_case(0, ["hopper"], m=4, n=8, lengths=[32, 32, 32])
    last = len(case.program.ops)
    assert native_steps.whole(case.program, 0, last, False) == (0, 2)
    assert native_steps.whole(case.program, 0, last, True) is None, "the last value is not of the output's type"
    assert native_steps.whole(case.program, 0, 5, False) is None, "fp32 is left"
    fused = case.program.ops.copy()
    fused[-1, 0] = Op.SCALE_BIAS
    assert native_steps.whole(replace(case.program, ops=fused), 0, last, False) is None
    early = case.program.ops.copy()
    early[2, 1] = 1  # a sum in fp16 of values that are not
    assert native_steps.whole(replace(case.program, ops=early), 0, last, False) is None
    two = plain_case(0, ["hopper", "hopper as two"], m=4, n=8, lengths=[32, 32])
    assert native_steps.whole(two.program, 0, len(two.program.ops), False) is None


def test_tiles_cover_their_regions_once() -> None:
    sizes = [(128, 256), (128, 128), (64, 128), (32, 128), (16, 128)]
    case = plain_case(0, ["hopper"], m=300, n=1000, lengths=[32, 32])
    regions = np.array([(0, 150, 0, 1000, 0, 6), (150, 300, 0, 600, 0, 6), (150, 160, 600, 1000, 0, 6)], np.int32)
    program = replace(case.program, regions=regions)
    assert tensor_cores.whole_tiles(program, sizes, False, 10_000) is None, "too few tiles"
    found = tensor_cores.whole_tiles(program, sizes, False, 2)
    assert found is not None
    flat, launches = found
    seen = np.zeros((300, 1000), int)
    behind = program.order.size + program.ops.size
    for one in launches:
        tiles = flat[one.launch.tiles.start - behind : one.launch.tiles.stop - behind].reshape(-1, 8)
        assert len(tiles) == one.launch.count
        assert one.levels == 2
        rows, columns = sizes[one.launch.shape]
        for m0, m1, n0, n1, first, last, *_ in tiles:
            assert 0 < m1 - m0 <= rows
            assert 0 < n1 - n0 <= columns
            assert (first, last) == (0, 6)
            seen[m0:m1, n0:n1] += 1
    want = np.zeros_like(seen)
    for m0, m1, n0, n1, *_ in regions:
        want[m0:m1, n0:n1] = 1
    assert np.array_equal(seen, want)


def test_how_operands_are_read() -> None:
    case = plain_case(0, ["hopper"], m=4, n=64, lengths=[96, 32])
    assert tensor_cores.access(case.program, 4, 160, 64) == tensor_cores.Access(True, False)
    assert tensor_cores.access(case.program, 4, 161, 64).gathered, "rows of 161 values are not aligned"
    assert tensor_cores.access(case.program, 4, 160, 60) == tensor_cores.Access(False, False)
    any_order = plain_case(0, ["hopper"], m=4, n=64, lengths=[96, 32], aligned=False)
    assert tensor_cores.access(any_order.program, 4, 160, 64) == tensor_cores.Access(True, True)
    assert not tensor_cores.access(any_order.program, 1 << 28, 160, 64).gathered, "too large a copy"


def test_the_engine_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_MISSING", "not built")
    assert missing("tensor-cores") == "not built"
    case, nothing = random_case(0), torch.empty(0)
    with pytest.raises(UnsupportedError, match="not built"):
        tensor_cores.run(case.program, nothing, nothing, nothing, nothing, nothing)
    weight = random_weight(128, 64, 64)
    made = recipe("triton.gptq_gemm", Problem.of(weight, 2), H100)
    monkeypatch.setattr(tensor_cores, "reason", str)
    with pytest.raises(UnsupportedError, match="the tensor-cores engine needs x on a GPU"):
        prepare(made, weight, engine="tensor-cores")
