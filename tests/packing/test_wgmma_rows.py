"""The layout of the Triton GEMM: exact inverse, the formula nibble by nibble, padding, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qlab.errors import PackingError
from qlab.packing import wgmma_rows
from qlab.weights import Int4Weight

Make = Callable[..., Int4Weight]
SHAPES = [
    (256, 128, 32),
    (384, 72, 64),
    (320, 40, 64),
    (384, 264, 128),
    (200, 24, 200),
    (36, 8, 36),
    (192, 40, 96),
    (512, 64, 256),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0, 16), (8, 8)])
@pytest.mark.parametrize(("k", "n", "group"), SHAPES)
def test_unpack_inverts_pack(make: Make, k: int, n: int, group: int, low: int, high: int, act_order: bool, dtype) -> None:
    weight = make(k, n, group, low=low, high=high, act_order=act_order and group < k, dtype=dtype)
    weight = replace(weight, scales=torch.where(torch.arange(n) % 3 == 0, -weight.scales, weight.scales))
    packed = wgmma_rows.pack(weight)
    assert packed.symmetric == (low == 8)
    assert wgmma_rows.unpack(packed).equals(weight)


def test_codes(make: Make) -> None:
    weight = make(act_order=True)
    index, codes = weight.group_index.tolist(), weight.codes.tolist()
    order = sorted(range(weight.K), key=lambda k: index[k])  # Python's sort is stable
    packed = wgmma_rows.pack(weight)
    assert packed.perm.tolist() == order
    words = packed.codes.tolist()
    for k, row in enumerate(order):
        i0, c, c_bit, b, a, i1 = k & 1, k >> 1 & 3, k >> 3 & 1, k >> 4 & 1, k >> 5 & 1, k >> 6 & 1
        for n in range(weight.N):
            word = words[n // 64][k // 128][n % 64][4 * c + 2 * i1 + a]
            assert word >> 4 * (4 * i0 + 2 * b + c_bit) & 15 == codes[row][n], (k, n)


@pytest.mark.parametrize(("group", "per_block"), [(32, 4), (64, 2), (128, 1), (256, 1)])
def test_scales_and_zero_points(make: Make, group: int, per_block: int) -> None:
    weight = make(group_size=group, low=0, high=16)
    bits, zeros = (weight.scales.view(torch.int16).int() & 0xFFFF).tolist(), weight.zeros.tolist()
    words = wgmma_rows.pack(weight).scales
    eights = wgmma_rows.pack(replace(weight, zeros=torch.full_like(weight.zeros, 8))).scales
    assert (words.shape[3], eights.shape[2:]) == (per_block, (32, per_block))
    rows = weight.groups if per_block == 1 else weight.K // 128
    for row in range(rows):
        for r in range(per_block):
            g = row * per_block + r
            for n in range(weight.N):
                word = int(words[n // 64, row, n % 64, r]) & 0xFFFFFFFF
                assert word == bits[g][n] | (0xE400 | zeros[g][n]) << 16
                pair = int(eights[n // 64, row, n % 64 // 16 * 8 + n % 8, r])
                assert pair >> 16 * (n // 8 % 2) & 0xFFFF == bits[g][n]


@pytest.mark.parametrize(("k", "n", "group", "low"), [(200, 24, 200, 0), (96, 72, 32, 0), (96, 72, 32, 8), (192, 8, 96, 8)])
def test_padding_decodes_to_finite_numbers(make: Make, k: int, n: int, group: int, low: int) -> None:
    """Rows beyond K meet zeros in x, which silence zeros and finite weights, not infinite ones."""
    weight = make(k, n, group, low=low, high=16 if low == 0 else 8)
    weight = replace(weight, scales=torch.full_like(weight.scales, 65504.0))
    packed = wgmma_rows.pack(weight)
    codes = wgmma_rows.unpack_codes(packed.codes)
    scales, zeros = wgmma_rows.unpack_scales(packed.scales, packed.dtype, symmetric=packed.symmetric)
    rows = codes.shape[0] // scales.shape[0] if scales.shape[0] > 1 else codes.shape[0]
    decoded = (codes.half() - zeros.half().repeat_interleave(rows, 0)) * scales.repeat_interleave(rows, 0)
    assert bool(decoded[k:].isfinite().all())
    assert bool((decoded[:, n:] == 0).all())


def test_data_reach_every_nibble(make: Make) -> None:
    words = wgmma_rows.pack(make(group_size=32)).codes.flatten().tolist()
    assert len({(i, word >> 4 * i & 15) for word in words for i in range(8)}) == 128
    assert min(words) < 0


def test_refusals(make: Make) -> None:
    with pytest.raises(PackingError, match="groups of 16 rows are neither a multiple of 32 nor the whole column"):
        wgmma_rows.pack(make(group_size=16))
    packed = wgmma_rows.pack(make(group_size=64))
    for change, text in (
        ({"codes": packed.codes[:1]}, r"codes must be int32 \[2, 2, 64, 16\]"),
        ({"codes": packed.codes.long()}, "not int64"),
        ({"scales": packed.scales[:, :1]}, r"scales must be int32 \[2, 2, 64, 2\] or \[2, 2, 32, 2\]"),
        ({"group_size": 48}, "no weight has K=256, N=128 and groups of 48 rows"),
        ({"perm": torch.zeros(256, dtype=torch.int32)}, "perm must hold every row"),
        ({"dtype": torch.float32}, "dtype must be fp16 or bf16"),
    ):
        with pytest.raises(PackingError, match=text):
            wgmma_rows.unpack(replace(packed, **change))


def test_any_order_within_a_group_comes_back(make: Make) -> None:
    weight = make(act_order=True)
    last_first = torch.argsort(weight.group_index * weight.K + torch.arange(weight.K - 1, -1, -1)).int()
    packed = wgmma_rows.pack(weight, perm=last_first)
    assert not torch.equal(packed.codes, wgmma_rows.pack(weight).codes)
    assert wgmma_rows.unpack(packed).equals(weight)


def test_nothing_is_shared_in_memory(make: Make) -> None:
    weight = make()
    before, packed = weight.digest(), wgmma_rows.pack(weight)
    back = wgmma_rows.unpack(packed)
    for t in (packed.codes, packed.scales, packed.perm):
        assert t.is_contiguous()
        t.zero_()
    assert weight.digest() == before
    assert back.digest() == before
