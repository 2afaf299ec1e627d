"""Inputs are the same on every machine: their digests are pinned here, and any other digest is another experiment."""

from __future__ import annotations

import hashlib

import pytest
import torch

from qlab.errors import WeightError
from qlab.inputs import exact_activations, exact_weight, one_hot_rows, random_activations, random_weight
from qlab.weights import Int4Weight, tensor_bytes

F16, BF16 = torch.float16, torch.bfloat16

WEIGHTS = {
    "fp16": (random_weight(256, 64), "1baf62af0d69b249"),
    "bf16": (random_weight(256, 64, 32, dtype=BF16, seed=1), "c2d8174efa25d7af"),
    "symmetric": (random_weight(256, 64, 64, symmetric=True, seed=2), "51ed6c644aa2025c"),
    "act-order": (random_weight(256, 64, 64, act_order=True, seed=3), "e0d554253a951842"),
    "whole column": (random_weight(256, 64, -1, seed=4), "e92f1ebc4896b1ab"),
    "large": (random_weight(1024, 512, seed=5), "222badeef20c30f4"),
    "exact fp16": (exact_weight(256, 64, seed=6), "f17bc85f2c7db6db"),
    "exact bf16": (exact_weight(256, 64, dtype=BF16, seed=7), "652393940009ca2f"),
}
ACTIVATIONS = {
    "fp16": (random_activations(16, 256), "d1a8545b5302b21c"),
    "bf16": (random_activations(16, 256, dtype=BF16, seed=1), "4a43b991a34cb3a0"),
    "exact": (exact_activations(16, 256, seed=2), "1002d50f9cab5ce9"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weight_digest(case: str) -> None:
    weight, digest = WEIGHTS[case]
    assert weight.digest()[:16] == digest


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activation_digest(case: str) -> None:
    x, digest = ACTIVATIONS[case]
    assert hashlib.sha256(tensor_bytes(x)).hexdigest()[:16] == digest


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_random_weight_uses_every_code_and_zero_point(dtype: torch.dtype) -> None:
    w = random_weight(512, 128, 64, dtype=dtype, seed=8)
    assert set(w.codes.unique().tolist()) == set(range(16))
    assert set(w.zeros.unique().tolist()) == set(range(1, 16))
    assert w.dtype == dtype
    assert not w.symmetric


def test_scales_are_distinct_while_fp16_has_values() -> None:
    w = random_weight(1024, 256, 128, seed=9)
    assert w.scales.unique().numel() == w.scales.numel() == 2048
    assert float(w.scales.min()) >= 2.0**-8
    assert float(w.scales.max()) < 2.0**-6


def test_act_order_moves_rows_between_groups() -> None:
    w = random_weight(256, 8, 64, act_order=True, seed=3)
    assert w.act_order
    assert torch.bincount(w.group_index.long()).tolist() == [64] * 4


def test_group_size_must_divide_k() -> None:
    with pytest.raises(WeightError, match="K=100 must be a multiple of the group size 64"):
        random_weight(100, 8, 64)
    with pytest.raises(WeightError, match="group size 0"):
        random_weight(128, 8, 0)


def test_random_activations_look_like_standard_normal() -> None:
    x = random_activations(64, 1024, dtype=F16, seed=10).double()
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert float(x.abs().max()) < 6


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_exact_inputs_have_one_result_in_any_order(dtype: torch.dtype) -> None:
    x, w = exact_activations(8, 4096, dtype=dtype, seed=11), exact_weight(4096, 16, dtype=dtype, seed=12)
    dense = w.dequantize(dtype)
    assert torch.equal(dense.double(), w.dequantize(torch.float64))
    exact = x.double() @ dense.double()
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(0))
    for rows in (torch.arange(4096), order):
        total = torch.zeros(8, 16)
        for k in rows.tolist():
            total += x[:, k, None].float() * dense[k].float()
        assert torch.equal(total.double(), exact)


def test_one_hot_rows_read_the_weight() -> None:
    w: Int4Weight = random_weight(64, 8, 32)
    x = one_hot_rows(10, 14, 64)
    assert x.shape == (4, 64)
    assert torch.equal((x.double() @ w.dequantize(torch.float64)), w.dequantize(torch.float64)[10:14])
