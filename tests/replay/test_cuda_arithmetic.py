"""The CUDA engine's device code on the CPU: its arithmetic against the step, its kernels against the native engine."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qlab.hardware import AMPERE, HOPPER, VOLTA, Step
from qlab.replay import cuda, native
from qlab.replay.step import Bits16, fused_dot_add, half_dot_add
from qlab.weights import round_once
from tests.replay import emulated
from tests.replay.random_programs import Case, random_case

F16, BF16 = torch.float16, torch.bfloat16
ROWS = 25_000
STEPS = {"volta": VOLTA, "ampere": AMPERE, "hopper": HOPPER, "hopper as two": replace(HOPPER, terms=8)}
FAMILIES = ("normal", "any bits", "finite", "fast range", "cancelling")
needs_native = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "native engine is here")


@pytest.fixture(scope="module")
def device_code(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated.build(tmp_path_factory.mktemp("emulated"))


def operands(family: str, terms: int, dtype: torch.dtype, rows: int) -> tuple[Bits16, Bits16, NDArray[np.uint32]]:
    """a, b [rows, terms] and fp32 accumulators c [rows], bits."""
    rng = np.random.default_rng(sum(map(ord, family)) + terms)
    shape, bf16 = (rows, terms), dtype == BF16
    field, shift, one = (np.uint16(0x7F80), 7, 127) if bf16 else (np.uint16(0x7C00), 10, 15)
    if family == "normal":
        a, b = (
            torch.from_numpy(rng.standard_normal(shape) * s).to(dtype).view(torch.int16).numpy().view(np.uint16)
            for s in (1, 0.05)
        )
        return a, b, (rng.standard_normal(rows) * 10).astype(np.float32).view(np.uint32)
    a, b = rng.integers(0, 1 << 16, (2, *shape)).astype(np.uint16)
    c = rng.integers(0, 1 << 32, rows).astype(np.uint32)
    if family == "any bits":
        return a, b, c
    for x in (a, b):
        x[(x & field) == field] &= ~np.uint16(0x4000)
        x[rng.random(shape) < 0.1] &= ~field  # subnormals
        x[rng.random(shape) < 0.1] &= 0x8000
    if family == "fast range":  # up to the ends of the exponents that the fast form takes
        if bf16:
            a = (a & 0x807F) | (rng.integers(one - 70, one + 61, shape).astype(np.uint16) << 7)
            b = (b & 0x807F) | (rng.integers(one - 31, one + 41, shape).astype(np.uint16) << 7)
            a[rng.random(shape) < 0.1] &= 0x8000
        c = (c & 0x807FFFFF) | (rng.integers(1, 247, rows).astype(np.uint32) << 23)
    if family == "cancelling":  # every second product takes the one before it away, or all but its last place
        by = rng.integers(-3, 4, shape)
        a = (a & ~field) | ((one + by).astype(np.uint16) << shift)
        b = (b & ~field) | ((one - by[:, ::-1]).astype(np.uint16) << shift)
        a[:, 1::2] = a[:, ::2] ^ 0x8000 ^ rng.integers(0, 2, a[:, ::2].shape).astype(np.uint16)
        b[:, 1::2] = b[:, ::2]
        c = (c & 0x807FFFFF) | (rng.integers(100, 140, rows).astype(np.uint32) << 23)
        c[rng.random(rows) < 0.2] = 0
    return a, b, c


def sums(
    code: ctypes.CDLL, a: Bits16, b: Bits16, c: NDArray[np.float32], step: Step, half: bool, bf16: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Each row's sum in integers, in the fast form, and where that applies."""
    rows = len(c)
    slow, fast, applies = np.zeros(rows, np.float32), np.zeros(rows, np.float32), np.zeros(rows, np.uint8)
    zero = step.zero_exponent_fp16 if half else step.zero_exponent
    rule = emulated.Rule.of((0, step.fraction_bits, step.terms, zero, half))
    arrays = [emulated.pointers(np.ascontiguousarray(v)) for v in (a, b, c)]
    out = [emulated.pointers(v) for v in (slow, fast, applies)]
    code.fused_sums(*arrays, *out, ctypes.c_long(rows), ctypes.byref(rule), int(bf16))
    return slow, fast, applies.astype(bool)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_fused_sums_are_the_steps(device_code: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    step = STEPS[name]
    for family in FAMILIES:
        a, b, c = operands(family, step.terms, dtype, ROWS)
        want = fused_dot_add(a, b, c, step, dtype)
        slow, fast, applies = sums(device_code, a, b, c.view(np.float32), step, False, dtype == BF16)
        assert np.array_equal(slow.view(np.uint32), want), family
        assert np.array_equal(fast.view(np.uint32)[applies], want[applies]), family
        if family in ("normal", "fast range", "cancelling"):
            assert applies.mean() > 0.95


@pytest.mark.parametrize("name", STEPS)
def test_fused_sums_with_fp16_accumulators(device_code: ctypes.CDLL, name: str) -> None:
    step = STEPS[name]
    rng = np.random.default_rng(3)
    for family in ("normal", "any bits", "finite"):
        a, b, _ = operands(family, step.terms, F16, ROWS)
        c = rng.integers(0, 1 << 16, ROWS).astype(np.uint16)
        c[::3] &= 0x83FF  # subnormals and zeros
        if family == "finite":  # small products, so that the result rounds at fp16's smallest places
            a, b = (np.where(rng.random(v.shape) < 0.7, v & 0x8FFF, v) for v in (a, b))
        want = half_dot_add(a, b, c, step).view(np.float16).astype(np.float32)
        slow, fast, applies = sums(device_code, a, b, c.view(np.float16).astype(np.float32), step, True, False)
        for got in (slow, np.where(applies, fast, slow)):
            assert np.array_equal(np.isnan(got), np.isnan(want)), family
            assert np.array_equal(got[~np.isnan(want)], want[~np.isnan(want)]), family
        assert applies.mean() > (0.3 if family == "any bits" else 0.5)


@pytest.mark.parametrize(("type_", "dtype"), [(0, torch.float32), (1, F16), (2, BF16)], ids=str)
def test_roundings(device_code: ctypes.CDLL, type_: int, dtype: torch.dtype) -> None:
    rng, count = np.random.default_rng(type_), 200_000
    ties = torch.from_numpy(rng.integers(0, 1 << 16, count).astype(np.uint16).view(np.int16)).view(BF16 if type_ == 2 else F16)
    near = ties.double().numpy() * (1 + rng.choice([0, 2**-8, 2**-9, 2**-11, -(2**-12)], count))
    for values in (
        rng.integers(0, 1 << 64, count, dtype=np.uint64).view(np.float64),
        np.ldexp(rng.standard_normal(count), rng.integers(-160, 130, count)),
        near * (1 + rng.integers(-1, 2, count) * 2.0**-50),
    ):
        want = round_once(torch.from_numpy(values), dtype).float().numpy()
        same(call(device_code.round_values, [values], type_), want)


@pytest.mark.parametrize(("type_", "dtype"), [(0, torch.float32), (1, F16), (2, BF16)], ids=str)
def test_additions(device_code: ctypes.CDLL, type_: int, dtype: torch.dtype) -> None:
    rng, count = np.random.default_rng(type_), 200_000
    bits = rng.integers(0, 1 << 32, (2, count)).astype(np.uint32)
    if type_:
        bits = np.where((bits & 0x7F800000) == 0x7F800000, bits, bits & 0xFFFF0000)
    pair = [torch.from_numpy(v.view(np.float32)) for v in bits]
    if type_ == 1:
        pair = [torch.from_numpy((v >> 16).astype(np.uint16).view(np.int16)).view(F16).float() for v in bits]
    want = (pair[0] + pair[1]).to(dtype).float().numpy()
    same(call(device_code.add_pairs, [v.contiguous().numpy() for v in pair], type_), want)


def test_halves_there_and_back(device_code: ctypes.CDLL) -> None:
    bits = np.arange(1 << 16).astype(np.uint16)
    values, back = np.zeros(1 << 16, np.float32), np.zeros(1 << 16, np.uint16)
    device_code.half_values(emulated.pointers(values), emulated.pointers(back))
    want = bits.view(np.float16).astype(np.float32)
    same(values, want)
    assert np.array_equal(back, np.where(np.isnan(want), np.uint16(0x7FFF), bits))


def call(function: Any, arrays: list[NDArray[Any]], type_: int) -> NDArray[np.float32]:
    out = np.zeros(len(arrays[0]), np.float32)
    function(*(emulated.pointers(a) for a in arrays), emulated.pointers(out), ctypes.c_long(len(out)), type_)
    return out


def same(got: NDArray[np.float32], want: NDArray[np.float32]) -> None:
    """Bits, where any NaN must be the canonical one."""
    assert np.array_equal(got.view(np.uint32), np.where(np.isnan(want), np.uint32(0x7FFFFFFF), want.view(np.uint32)))


def native_outputs(case: Case, raw: bool) -> NDArray[np.unsignedinteger]:
    if not raw:
        return native.run(case.program, *case.operands, bf16=case.bf16)
    y, p = np.zeros((case.x.shape[0], case.w.shape[1]), np.uint32), case.program
    native.execute(*case.operands, p.order, p.steps, p.ops, p.regions, case.bf16, y)
    return y


@needs_native
@pytest.mark.parametrize("raw", [False, True], ids=["outputs", "fp32 values"])
@pytest.mark.parametrize("sms", [1, 1000], ids=["large tiles", "small tiles"])
def test_emulated_kernels_agree_with_the_native_engine(device_code: ctypes.CDLL, sms: int, raw: bool) -> None:
    outputs = 0
    for seed in range(120):
        case = random_case(seed, raw)
        got, want = emulated.run(device_code, case.program, *case.operands, case.bf16, sms, raw), native_outputs(case, raw)
        assert np.array_equal(got, want), f"seed {seed}: {int((got != want).sum())} of {want.size} differ"
        outputs += want.size
    assert outputs > 200_000


@needs_native
def test_emulated_batches(device_code: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "RESULTS", 700)
    for seed in range(10):
        case = random_case(seed)
        _, batches = cuda.lay_out(case.program, emulated.tiles(device_code), [True] * 3, 1)
        assert len(batches) > 1 or case.x.shape[0] * case.w.shape[1] < 700
        got = emulated.run(device_code, case.program, *case.operands, case.bf16)
        assert np.array_equal(got, native.run(case.program, *case.operands, bf16=case.bf16))


@needs_native
def test_a_planted_fault_shows(device_code: ctypes.CDLL) -> None:
    caught = 0
    for case in (random_case(seed, raw=True) for seed in range(20)):
        steps = case.program.steps.copy()
        steps[steps[:, 0] == 0, 1] -= 1
        got = emulated.run(device_code, replace(case.program, steps=steps), *case.operands, case.bf16, raw=True)
        caught += not np.array_equal(got, native_outputs(case, True))
    assert caught > 12


def test_shapes_of_the_emulation_are_the_engines(device_code: ctypes.CDLL) -> None:
    if cuda._cuda is None:
        pytest.skip(cuda.reason())
    assert emulated.tiles(device_code) == [tuple(t) for t in cuda._cuda.chain_tiles()]


def test_tiles_cover_every_region_once() -> None:
    shapes = [(64, 128), (32, 128), (16, 128), (8, 128), (4, 128), (4, 128)]
    for seed in range(20):
        case = random_case(seed)
        m, n = case.x.shape[0], case.w.shape[1]
        flat, batches = cuda.lay_out(case.program, shapes, [True] * len(case.program.steps), 4)
        behind = case.program.order.size + case.program.ops.size
        joined, computed = np.zeros((m, n), int), 0
        for batch in batches:
            tiles = flat[batch.join.start - behind : batch.join.stop - behind].reshape(batch.join_count, 9)
            for m0, m1, n0, n1 in tiles[:, :4]:
                joined[m0:m1, n0:n1] += 1
            places = np.zeros(batch.results, int)
            for launch in batch.chains:
                tiles = flat[launch.tiles.start - behind : launch.tiles.stop - behind].reshape(launch.count, 8)
                for m0, m1, n0, n1, _, _, first, row_size in tiles:
                    for row in range(m1 - m0):
                        places[first + row * row_size :][: n1 - n0] += 1
                computed += len(tiles)
            assert (places == 1).all()
        assert (joined == 1).all()
        assert computed
