"""Whole programs on the compiled CPU engine: outputs, regions, threads, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import AMPERE, HOPPER
from qlab.replay import native
from qlab.replay import step as replay_step
from qlab.replay.program import Kind, Op, Program
from tests.replay.native_operands import (
    BF16,
    DTYPES,
    F16,
    NO_BITS,
    NO_GROUPS,
    K,
    as_bits,
    as_floats,
    program,
    random_operands,
    step_row,
)

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "native engine is here")


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_bits_of_the_dtype(dtype: str) -> None:
    """Every number of the dtype, through a chain of one product by 1 and a rounding."""
    t, one = DTYPES[dtype], as_bits([[1.0]], DTYPES[dtype])
    w = np.arange(1 << 16, dtype=np.uint16)[None]
    step = (Kind.TENSOR_CORE, 24, 1, -132, 0, 1)
    p = program([(Op.CHAIN, 0, 0, 1), (Op.ROUND, 1 if t == F16 else 2)], [step], np.zeros(1), 1, 1 << 16)
    y = native.run(p, one, w, np.zeros((0, 1 << 16), np.uint16), NO_GROUPS, NO_BITS, bf16=t == BF16)[0]
    field, fraction = (0x7C00, 0x3FF) if t == F16 else (0x7F80, 0x7F)
    want = np.where(((w[0] & field) == field) & ((w[0] & fraction) != 0), 0x7FFF, w[0])
    want[want == 0x8000] = 0  # a tensor core's zero is +0
    assert np.array_equal(y, want)


def many_regions() -> tuple[Program, dict[str, np.ndarray]]:
    """Regions of all sizes, with holes, and two programs; operands by their names."""
    x = np.concatenate([random_operands("ordinary", F16, s)[0] for s in range(24)])  # [72, K]
    w = np.concatenate([random_operands("ordinary", F16, s)[1] for s in range(4)], axis=1)  # [K, 280]
    scales = as_bits(np.random.default_rng(8).standard_normal((3, 280)), F16)
    ops = [
        *[(Op.CHAIN, 0, 0, 48), (Op.CHAIN, 0, 48, 96), (Op.ADD, 0), (Op.ROUND, 1), (Op.SCALE, 1), (Op.BIAS, 1)],
        *[(Op.CHAIN, 1, 0, 96), (Op.CHAIN, 2, 48, 96), (Op.ADD, 1)],
    ]
    steps = [step_row(HOPPER), step_row(AMPERE), (Kind.HALF_DOT, 0, 8, 0, 0, 8)]
    p = program(ops, steps, np.random.default_rng(9).permutation(K), 72, 280)
    first, second = (0, 6), (6, 9)
    regions = [(0, 50, 0, 130, *first), (50, 70, 0, 64, *second), (0, 1, 130, 280, *second)]
    regions += [(1, 70, 131, 133, *first), (70, 70, 0, 280, *first)]
    group = (np.arange(K) // 32).astype(np.int32)
    arrays = {"x": x, "w": w, "scales": scales, "group": group, "bias": scales[1].copy()}
    return replace(p, regions=np.array(regions, np.int32)), arrays


def test_neither_threads_nor_tiles_change_a_bit() -> None:
    p, arrays = many_regions()
    first = native.run(p, **arrays, threads=1)
    for threads in (0, 2, 7):
        assert np.array_equal(native.run(p, **arrays, threads=threads), first)
    covered = np.zeros(first.shape, bool)
    for m0, m1, n0, n1, start, stop in p.regions.tolist():
        covered[m0:m1, n0:n1] = True
        alone = replace(p, regions=np.array([[0, m1 - m0, 0, n1 - n0, start, stop]], np.int32))
        part = {name: a[..., n0:n1] if name in ("w", "scales", "bias") else a for name, a in arrays.items()}
        assert np.array_equal(native.run(alone, **part | {"x": arrays["x"][m0:m1]}), first[m0:m1, n0:n1])
    y = np.full(first.shape, 0x1234, np.uint16)
    native.execute(**arrays, order=p.order, steps=p.steps, ops=p.ops, regions=p.regions, bf16=False, y=y)
    assert np.array_equal(y[covered], first[covered])
    assert (y[~covered] == 0x1234).all()


def test_a_caller_that_flushes_subnormals_changes_no_bit() -> None:
    x, w = random_operands("ordinary", BF16, 1)
    x, w = as_bits(as_floats(x, BF16) * 2.0**-70, BF16), as_bits(as_floats(w, BF16) * 2.0**-60, BF16)
    p = program(
        [(Op.CHAIN, 0, 0, 96), (Op.CHAIN, 1, 0, 96), (Op.ADD, 2)], [step_row(HOPPER), (Kind.FMA, 0, 1, 0, 0, 1)], np.arange(K)
    )
    arrays = (x, w, np.zeros((0, w.shape[1]), np.uint16), NO_GROUPS, NO_BITS)
    want = [native.run(p, *arrays, bf16=True, isa=isa) for isa in native.isas()]
    assert ((want[0] & 0x7F80 == 0) & (want[0] & 0x7F != 0)).any()  # subnormals
    if not torch.set_flush_denormal(True):
        pytest.skip("PyTorch cannot flush subnormals on this processor")
    try:
        got = [native.run(p, *arrays, bf16=True, isa=isa, threads=2) for isa in native.isas()]
        assert torch.tensor([1e-39]).mul(1.0).item() == 0  # and it still does
    finally:
        torch.set_flush_denormal(False)
    assert all(np.array_equal(y, want[0]) for y in (*want, *got))


def test_a_chain_over_nothing_is_zero_and_an_output_may_be_empty() -> None:
    p = program([(Op.CHAIN, 0, 0, 0)], [step_row(HOPPER)], np.zeros(0, np.int32), 2, 3)
    arguments = (np.zeros((0, 3), np.uint16), NO_GROUPS, NO_BITS)
    assert not native.run(p, np.ones((2, 4), np.uint16), np.ones((4, 3), np.uint16), *arguments).any()
    nothing = replace(p, regions=np.zeros((0, 6), np.int32))
    assert native.run(nothing, np.ones((0, 4), np.uint16), np.ones((4, 3), np.uint16), *arguments).shape == (0, 3)


def test_malformed_programs_are_refused_in_a_sentence() -> None:
    chain, tensor_core = (Op.CHAIN, 0, 0, 16), step_row(HOPPER)
    good = program([chain], [tensor_core], np.arange(16), 2, 3)
    bits = {"x": np.zeros((2, 16), np.uint16), "w": np.zeros((16, 3), np.uint16), "scales": np.zeros((0, 3), np.uint16)}
    arguments = {**bits, "group": NO_GROUPS, "bias": NO_BITS}

    def ops(*rows: tuple[int, ...]) -> Program:
        return program(list(rows), [tensor_core], np.arange(16), 2, 3)

    def steps(*row: int) -> Program:
        return program([chain], [row], np.arange(16), 2, 3)

    def region(*row: int) -> Program:
        return replace(good, regions=np.array([row], np.int32))

    refused: list[tuple[Program, dict[str, np.ndarray], str]] = [
        (ops((6,)), {}, r"ops\[0\] has opcode 6; 0 to 5 are known"),
        (ops((-1,)), {}, r"ops\[0\] has opcode -1"),
        (ops(chain, (Op.ROUND, 3)), {}, r"ops\[1\] has type 3"),
        (ops((Op.CHAIN, 1, 0, 16)), {}, r"ops\[0\] names step 1 of 1"),
        (ops((Op.CHAIN, 0, 0, 17)), {}, r"ops\[0\] takes order\[0:17\] of 16"),
        (ops((Op.CHAIN, 0, -16, 0)), {}, r"takes order\[-16:0\]"),
        (ops((Op.CHAIN, 0, 16, 0)), {}, r"takes order\[16:0\]"),
        (ops((Op.CHAIN, 0, 0, 8)), {}, r"takes order\[0:8\], not a multiple of its step's 16 terms"),
        (ops(), {}, r"regions\[0\] leaves 0 values on the stack"),
        (ops(chain, chain), {}, r"regions\[0\] leaves 2 values"),
        (ops(chain, (Op.ADD, 0)), {}, r"ops\[1\] finds too few values"),
        (ops((Op.ROUND, 0)), {}, r"ops\[0\] finds too few values"),
        (ops(*[chain] * 9, *[(Op.ADD, 0)] * 8), {}, r"ops\[8\] needs more than 8 values"),
        (ops(chain, (Op.SCALE, 1)), {}, r"ops\[1\] scales, and there are no scales"),
        (ops(chain, (Op.BIAS, 1)), {}, r"ops\[1\] adds a bias, and there is none"),
        (ops(chain, (Op.SCALE_BIAS, 1)), {"scales": np.zeros((1, 3), np.uint16)}, "adds a bias"),
        (steps(3, 25, 16, -133, 0, 16), {}, r"steps\[0\] has kind 3"),
        (steps(0, 49, 16, -133, 0, 16), {}, "F = 49"),
        (steps(0, 25, 0, -133, 0, 0), {}, "0 terms"),
        (steps(0, 25, 65, -133, 0, 65), {}, "65 terms"),
        (steps(0, 25, 16, 5000, 0, 16), {}, "e_zero = 5000"),
        (steps(0, 25, 16, -133, 2, 16), {}, "accumulator 2"),
        (steps(2, 0, 8, 0, 0, 7), {}, "odd number"),
        (steps(2, 0, 8, 0, 0, 8), {}, "no scales or no groups"),
        (steps(2, 0, 8, 0, 0, 8), {"scales": np.zeros((1, 3), np.uint16)}, "no scales or no groups"),
        (good, {"scales": np.zeros((1, 3), np.uint16), "group": np.full(16, 1, np.int32)}, r"group\[0\] is 1"),
        (replace(good, order=np.full(16, 16, np.int32)), {}, r"order\[0\] is k = 16, outside 0 to K = 16"),
        (replace(good, order=np.full(16, -1, np.int32)), {}, r"order\[0\] is k = -1"),
        (region(0, 3, 0, 3, 0, 1), {}, r"regions\[0\] is outside of the output \[2, 3\]"),
        (region(0, 2, 0, 4, 0, 1), {}, "outside of the output"),
        (region(-1, 2, 0, 3, 0, 1), {}, "outside of the output"),
        (region(2, 1, 0, 3, 0, 1), {}, "outside of the output"),
        (region(0, 2, 0, 3, 0, 2), {}, r"regions\[0\] takes ops outside of 0 to 1"),
        (replace(good, steps=np.zeros((1, 5), np.int32)), {}, "must be"),
        (replace(good, order=np.zeros((1, 16), np.int32)), {}, "must be"),
        (good, {"w": np.zeros((15, 3), np.uint16)}, r"x must be \[M, K\]"),
        (good, {"scales": np.zeros((1, 4), np.uint16)}, "scales must be"),
        (good, {"group": np.zeros(15, np.int32)}, "group must be"),
        (good, {"bias": np.zeros(2, np.uint16)}, "bias must be"),
        (good, {"x": np.zeros((2, 16), np.float16)}, "x must be uint16, not float16"),
        (good, {"group": np.zeros(16, np.int64)}, "group must be int32, not int64"),
    ]
    assert native.run(good, **arguments).shape == (2, 3)
    for bad, changed, sentence in refused:
        with pytest.raises(QlabError, match=sentence):
            native.run(bad, **(arguments | changed))
    with pytest.raises(QlabError, match="isa 'mmx' is not among those of this processor: auto, "):
        native.run(good, **arguments, isa="mmx")  # type: ignore[arg-type]
    arrays = {"order": good.order, "steps": good.steps, "ops": good.ops, "regions": good.regions}
    apart = np.zeros((2, 6), np.uint16)[:, ::2]
    with pytest.raises(QlabError, match="y must be contiguous and writeable"):
        native.execute(**arguments, **arrays, bf16=False, y=apart)


def test_isas_end_with_the_portable_one() -> None:
    assert native.isas()[-1] == "portable"
    assert set(native.isas()) <= {"avx512", "avx2", "portable"}


def test_a_missing_or_old_module_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    p, arrays = many_regions()
    monkeypatch.setattr(replay_step, "_native", object())
    assert "builds it again" in native.reason()
    assert native.isas() == ()
    with pytest.raises(UnsupportedError, match="older than its sources"):
        native.run(p, **arrays)
    monkeypatch.setattr(replay_step, "_MISSING", "not built")
    assert native.reason() == "not built"
