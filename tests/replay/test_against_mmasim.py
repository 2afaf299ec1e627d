"""The fused sum against MMA-Sim (arXiv 2511.10909), which was checked on each GPU: random bits, every kind of number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qlab.hardware import GPUS, Gpu
from qlab.replay.step import Engine, fused_dot_add, half_dot_add, native_reason

F16, BF16 = torch.float16, torch.bfloat16
K, ROWS = 32, 1500
ARCHITECTURES = {
    (7, 0): ("Volta", "m8n8k4"),
    (7, 5): ("Turing", "m16n8k8"),
    (8, 0): ("Ampere", "m16n8k16"),
    (8, 6): ("Ampere", "m16n8k16"),
    (8, 9): ("Ada Lovelace", "m16n8k16"),
    (9, 0): ("Hopper", "m16n8k16"),
    (10, 0): ("Blackwell", "m16n8k16"),
}
ONE_OF_EACH = list({ARCHITECTURES[g.capability][0]: g for g in GPUS}.values())
ENGINES: list[Engine] = ["numpy"] if native_reason() else ["numpy", "native"]


@pytest.fixture(scope="module")
def mmasim() -> Any:
    try:  # its import compiles a few lines of C++
        return pytest.importorskip("mmasim.nv_ptx", reason="mmasim is not installed: see qlab[test]", exc_type=ImportError)
    except (OSError, RuntimeError) as e:
        pytest.skip(f"mmasim cannot be imported here: {str(e).splitlines()[0]}")


def test_every_gpu_has_an_architecture() -> None:
    assert {g.capability for g in GPUS} <= set(ARCHITECTURES)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> np.ndarray:
    """Exponents near 1 (``near``; ``ties`` with few significant bits), or any up to a largest of each row's own.

    ``any`` has infinities and NaN, too.
    """
    width, fraction_bits, offset = {F16: (16, 10, 15), BF16: (16, 7, 127), torch.float32: (32, 23, 127)}[dtype]
    fraction, sign = rng.integers(0, 1 << fraction_bits, shape), rng.integers(0, 2, shape) << (width - 1)
    largest = rng.integers(1, 2 * offset + 1, (shape[0], *[1] * (len(shape) - 1)))
    field = rng.integers(offset - 3, offset + 2, shape) if kind in ("near", "ties") else rng.integers(0, largest + 1, shape)
    if kind == "ties":
        fraction &= -1 << (fraction_bits - 2)
    field[rng.random(shape) < 0.05] = 0  # subnormal
    zero = rng.random(shape) < 0.05
    field[zero], fraction[zero] = 0, 0
    if kind == "any":
        infinite = rng.random(shape) < 0.004
        fraction[infinite] = 0
        field[infinite | (rng.random(shape) < 0.004)] = 2 * offset + 1
    return (sign | field << fraction_bits | fraction).astype(np.uint16 if width == 16 else np.uint32)


def rows(dtype: torch.dtype, accumulator: torch.dtype, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([len(kind), dtype == F16, accumulator == F16])
    a, b = (random_bits(rng, (ROWS, K), dtype, kind) for _ in range(2))
    c = random_bits(rng, (ROWS,), accumulator, kind)
    pairs = rng.random(ROWS) < 0.3
    a[pairs, 1], b[pairs, 1] = a[pairs, 0] ^ 0x8000, b[pairs, 0]
    return a, b, c


def tensor(b: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(b.view(np.int16 if b.dtype == np.uint16 else np.int32)).view(dtype)


def expected(
    operation: Any, a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: torch.dtype, accumulator: torch.dtype
) -> np.ndarray:
    d = operation.dpa(tensor(a, dtype), tensor(b, dtype), tensor(c, accumulator))
    assert d.dtype == accumulator
    return d.view(torch.int16).numpy().view(np.uint16) if accumulator == F16 else d.view(torch.int32).numpy().view(np.uint32)


def telling(d: np.ndarray) -> bool:
    """Whether results are of many kinds, and not all special."""
    return len(np.unique(d)) > ROWS // 4


def powers(*exponents: int, dtype: torch.dtype, factors: tuple[int, ...] = ()) -> np.ndarray:
    """uint16 [1, K]: 2^e for each, times its factor, then zeros."""
    values = [f * 2.0**e for e, f in zip(exponents, factors or [1] * len(exponents), strict=True)]
    row = torch.tensor([values + [0.0] * (K - len(values))], dtype=torch.float64)
    return row.to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("kind", ["any", "finite", "near", "ties"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("gpu", ONE_OF_EACH, ids=lambda g: g.key)
def test_fp32_accumulators(mmasim: Any, gpu: Gpu, dtype: torch.dtype, kind: str) -> None:
    if dtype == BF16 and gpu.capability < (8, 0):
        pytest.skip(f"{gpu.name} has no tensor-core instruction for bf16")
    architecture, shape = ARCHITECTURES[gpu.capability]
    name = "f16" if dtype == F16 else "bf16"
    operation = mmasim.MMA(architecture, f"{shape}.f32.{name}.{name}.f32")
    a, b, c = rows(dtype, torch.float32, kind)
    want = expected(operation, a, b, c, dtype, torch.float32)
    assert telling(want) or kind == "ties"
    for engine in ENGINES:
        assert int((fused_dot_add(a, b, c, gpu.step, dtype, engine) != want).sum()) == 0


@pytest.mark.parametrize("kind", ["any", "finite", "near", "ties"])
@pytest.mark.parametrize("gpu", ONE_OF_EACH, ids=lambda g: g.key)
def test_fp16_accumulators(mmasim: Any, gpu: Gpu, kind: str) -> None:
    architecture, shape = ARCHITECTURES[gpu.capability]
    a, b, c = rows(F16, F16, kind)
    want = expected(mmasim.MMA(architecture, f"{shape}.f16.f16.f16.f16"), a, b, c, F16, F16)
    assert telling(want) or kind == "ties"
    assert int((half_dot_add(a, b, c, gpu.step) != want).sum()) == 0


@pytest.mark.parametrize("gpu", ONE_OF_EACH, ids=lambda g: g.key)
def test_a_zero_term_holds_the_unit_up_in_fp16(mmasim: Any, gpu: Gpu) -> None:
    """2^-25 is a tie of fp16. One unit of 2^(e_zero - F) more decides it; half a unit more is cut off."""
    architecture, shape = ARCHITECTURES[gpu.capability]
    operation = mmasim.MMA(architecture, f"{shape}.f16.f16.f16.f16")
    unit, c = gpu.step.zero_exponent_fp16 - gpu.step.fraction_bits, np.zeros(1, np.uint16)
    for tail, want in (unit, 1), (unit - 1, 0):
        a, b = powers(-12, -23, dtype=F16), powers(-13, tail + 23, dtype=F16)
        assert half_dot_add(a, b, c, gpu.step).tolist() == expected(operation, a, b, c, F16, F16).tolist() == [want]


@pytest.mark.parametrize("gpu", [g for g in ONE_OF_EACH if g.capability >= (8, 0)], ids=lambda g: g.key)
def test_a_zero_term_holds_the_unit_up_in_fp32(mmasim: Any, gpu: Gpu) -> None:
    """The smallest fp32 number less one unit, and one unit: with units of half the size both are cut off to less than it."""
    architecture, shape = ARCHITECTURES[gpu.capability]
    operation = mmasim.MMA(architecture, f"{shape}.f32.bf16.bf16.f32")
    unit, c = gpu.step.zero_exponent - gpu.step.fraction_bits, np.zeros(1, np.uint32)
    products = {7: (127, 1), 8: (15, 17), 9: (7, 73), 10: (33, 31)}  # 2^n - 1
    for tail, want in (unit, 1), (unit - 1, 0):
        x, y = products[-149 - tail]
        a, b = powers(-78, -78, dtype=BF16, factors=(x, 1)), powers(tail + 78, tail + 78, dtype=BF16, factors=(y, 1))
        assert expected(operation, a, b, c, BF16, torch.float32).tolist() == [want]
        assert fused_dot_add(a, b, c, gpu.step, BF16).tolist() == [want]


@pytest.mark.parametrize(("key", "kind"), [("h100", "WGMMA"), ("b200", "TCGen05MMA")])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_newer_instructions_compute_the_same(mmasim: Any, key: str, kind: str, dtype: torch.dtype) -> None:
    """wgmma and tcgen05.mma follow mma.sync's rule."""
    gpu = next(g for g in GPUS if g.key == key)
    name = "f16" if dtype == F16 else "bf16"
    shape = "m64n8k16" if kind == "WGMMA" else "m64n8k16.kind::f16"
    operation = getattr(mmasim, kind)(ARCHITECTURES[gpu.capability][0], f"{shape}.f32.{name}.{name}")
    a, b, c = rows(dtype, torch.float32, "any")
    assert np.array_equal(fused_dot_add(a, b, c, gpu.step, dtype), expected(operation, a, b, c, dtype, torch.float32))


def test_a_wrong_step_would_show(mmasim: Any) -> None:
    """Each GPU's rule against every other rule."""
    a, b, c = rows(F16, torch.float32, "near")
    x, y, z = rows(F16, F16, "near")
    steps = {g.step: (g, *ARCHITECTURES[g.capability]) for g in GPUS}
    for step, (_, architecture, shape) in steps.items():
        wide = expected(mmasim.MMA(architecture, f"{shape}.f32.f16.f16.f32"), a, b, c, F16, torch.float32)
        narrow = expected(mmasim.MMA(architecture, f"{shape}.f16.f16.f16.f16"), x, y, z, F16, F16)
        for other in steps:
            assert ((fused_dot_add(a, b, c, other) != wide).mean() > 0.1) == (other != step)
            assert ((half_dot_add(x, y, z, other) != narrow).mean() > 0.001) == (other != step)
