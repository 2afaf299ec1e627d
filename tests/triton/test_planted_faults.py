"""Each rung fails on the fault it is there for: a ladder that nothing falls off proves nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.backends.registry import kernel
from tests import ladder
from tests.ladder import Case, Wrapped, climb

CASE = Case(16, 128, 72, 32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def status(spoilt, rung):
    (result,) = climb(spoilt, CASE, torch.float16, DEVICE, [rung])
    return result


def spoil(inner="triton.awq_gemm", weight=lambda w: w, x=lambda x: x, y=lambda y: y):
    """A kernel with its weight before packing, its input or its output changed."""

    class Spoilt(Wrapped):
        def pack(self, w):
            return super().pack(weight(w))

        def run(self, rows, packed):
            return y(super().run(x(rows), packed))

    return Spoilt(kernel(inner))


def wrong_nibble_order(w):
    """Natural order where the layout has [0, 4, 1, 5, 2, 6, 3, 7]."""
    columns = torch.arange(w.N).reshape(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)
    return replace(w, codes=w.codes[:, columns].contiguous())


def wrong_row_nibbles(w):
    rows = torch.arange(w.K).reshape(-1, 8).flip(1).reshape(-1)
    return replace(w, codes=w.codes[rows].contiguous())


def zero_off_by_one(w):
    return replace(w, zeros=torch.where(w.zeros > 1, w.zeros - 1, w.zeros + 1))


def neighbour_scale(w):
    return replace(w, scales=w.scales.roll(1, 0))


def neighbour_column_scale(w):
    return replace(w, scales=w.scales.roll(1, 1))


STORAGE = [wrong_nibble_order, wrong_row_nibbles, zero_off_by_one, neighbour_scale, neighbour_column_scale]


@pytest.mark.parametrize("inner", ["triton.awq_gemm", "triton.awq_dequantize", "triton.gptq_gemm", "reference.float32"])
@pytest.mark.parametrize("fault", STORAGE)
def test_storage_faults_fail_one_hot(inner, fault):
    result = status(spoil(inner, weight=fault), ladder.one_hot)
    assert result.status == "failed"
    assert "first (k, n)" in result.detail
    assert status(spoil(inner), ladder.one_hot).status == "passed"


def test_one_hot_names_the_place():
    def flip(w):
        codes = w.codes.clone()
        codes[37, 41] ^= 8
        return replace(w, codes=codes)

    result = status(spoil(weight=flip), ladder.one_hot)
    assert result.detail.startswith("1 of 9216 elements, first (k, n) = (37, 41)")


@pytest.mark.parametrize("fault", STORAGE)
def test_storage_faults_fail_exact_inputs(fault):
    assert status(spoil(weight=fault), ladder.exact).status == "failed"


def test_a_skipped_step_of_k_fails_exact_inputs():
    def without_last(x):
        x = x.clone()
        x[:, -32:] = 0
        return x

    assert status(spoil(x=without_last), ladder.exact).status == "failed"


def test_fp16_between_steps_fails_exact_inputs():
    class HalfSteps(Wrapped):
        def run(self, x, packed):
            w = packed.tensors["weight"]
            total = torch.zeros(x.shape[0], w.shape[1], dtype=x.dtype, device=x.device)
            for k in range(0, x.shape[1], 32):
                total = (total.float() + x[:, k : k + 32].float() @ w[k : k + 32].float()).to(x.dtype)
            return total

    assert status(HalfSteps(kernel("reference.float32")), ladder.exact).status == "failed"


def test_fp16_sums_fail_random_inputs():
    class HalfSums(Wrapped):
        def run(self, x, packed):
            w = packed.tensors["weight"]
            total = torch.zeros(x.shape[0], w.shape[1], dtype=x.dtype, device=x.device)
            for k in range(x.shape[1]):
                total += x[:, k, None] * w[k]
            return total

    result = status(HalfSums(kernel("reference.float32")), ladder.random_inputs)
    assert result.status == "failed"
    assert "torch.matmul" in result.detail


def test_an_unwritten_element_fails_poisoned():
    class Unwritten(Wrapped):
        def run(self, x, packed):
            y = super().run(x, packed)
            out = torch.empty_like(y)
            out[:-1] = y[:-1]
            out[-1, :-1] = y[-1, :-1]
            return out

    result = status(Unwritten(kernel("triton.awq_gemm")), ladder.poisoned)
    assert result.status == "failed"
    assert result.detail.startswith("1 of 1152 elements, first (m, n) = (15, 71): nan")


def test_a_drifting_output_fails_repeats():
    calls = iter(range(100))

    def drift(y):
        y.view(torch.int16)[0, 0] += next(calls) // 9
        return y

    assert status(spoil(y=drift), ladder.repeats).detail == "2 different outputs in 10 runs"


def test_dropped_rows_fail_ragged_rows():
    def whole_tiles_only(y):
        y[y.shape[0] // 16 * 16 :] = 0
        return y

    assert status(spoil(y=whole_tiles_only), ladder.ragged_rows).detail.startswith("M=1: ")


def test_an_ignored_stride_fails_strided_rows():
    def packed_rows(x):
        return x.as_strided(x.shape, (x.shape[1], 1))

    assert status(spoil(x=packed_rows), ladder.strided_rows).status == "failed"
    assert status(spoil(x=packed_rows), ladder.exact).status == "passed"


@pytest.mark.parametrize(
    ("mend", "what"),
    [
        (lambda x: x.contiguous(), "column-major"),
        (lambda x: x.half(), "float32"),
        (lambda x: x.reshape(-1, x.shape[-1]), "three dimensions"),
        (lambda x: torch.nn.functional.pad(x, (0, 128 - x.shape[-1])), "too few columns"),
    ],
)
def test_a_kernel_that_mends_its_input_fails_refuses(mend, what):
    assert status(spoil(x=mend), ladder.refuses).detail == f"x with {what} was computed"


def test_a_kernel_that_crashes_is_recorded():
    def crash(x):
        raise RuntimeError("misaligned address")

    result = status(spoil(x=crash), ladder.exact)
    assert (result.status, result.detail) == ("failed", "RuntimeError: misaligned address")
