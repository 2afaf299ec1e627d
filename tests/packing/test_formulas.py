"""Every layout against slow loops written from its index formula, one nibble at a time, in Python integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qlab.packing import awq, compressed_tensors, exllama, gptq, marlin
from qlab.weights import Int4Weight

MIX = (0, 2, 4, 6, 1, 3, 5, 7)


def int32(nibbles: list[int]) -> int:
    """Eight values as a signed 32-bit integer, the first in the lowest four bits."""
    unsigned = sum(v * 16**i for i, v in enumerate(nibbles))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned


def columns(values: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> list[list[int]]:
    """[R, 8c] to [R, c]; nibble i holds column order[i] of its eight."""
    return [[int32([row[j + o] for o in order]) for j in range(0, len(row), 8)] for row in values]


def rows(values: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> list[list[int]]:
    """[8r, N] to [r, N]; nibble i holds row order[i] of its eight."""
    return [[int32([values[j + o][n] for o in order]) for n in range(len(values[0]))] for j in range(0, len(values), 8)]


def less(values: list[list[int]], one: int) -> list[list[int]]:
    return [[v - one for v in row] for row in values]


def test_awq(make: Callable[..., Int4Weight]) -> None:
    w = make(group_size=32)
    packed = awq.pack(w)
    place = (0, 4, 1, 5, 2, 6, 3, 7)  # of column n % 8
    expected = []
    for row in w.codes.tolist():
        ints = [[0] * 8 for _ in range(w.N // 8)]
        for n, q in enumerate(row):
            ints[n // 8][place[n % 8]] = q
        expected.append([int32(i) for i in ints])
    assert packed.qweight.tolist() == expected
    assert packed.qzeros.tolist() == columns(w.zeros.tolist(), MIX)
    assert torch.equal(packed.scales, w.scales)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq(make: Callable[..., Int4Weight], version: gptq.Version) -> None:
    w = make(low=2 - version, high=17 - version, act_order=True)
    packed = gptq.pack(w, version)
    assert packed.qweight.tolist() == rows(w.codes.tolist())
    assert packed.qzeros.tolist() == columns(less(w.zeros.tolist(), 2 - version))
    assert packed.g_idx.tolist() == w.group_index.tolist()


def test_symmetric_gptq_stores_sevens(make: Callable[..., Int4Weight]) -> None:
    assert gptq.pack(make(low=8, high=8)).qzeros.unique().tolist() == [0x77777777]


@pytest.mark.parametrize("act_order", [False, True])
def test_exllama(make: Callable[..., Int4Weight], act_order: bool) -> None:
    w = make(low=1, act_order=act_order)
    codes, index = w.codes.tolist(), w.group_index.tolist()
    order = sorted(range(w.K), key=lambda k: index[k])  # Python's sort is stable
    packed = exllama.pack(w)
    assert packed.q_perm.tolist() == (order if act_order else [])
    plain = rows([codes[k] for k in order])
    for j, row in enumerate(packed.qweight.tolist()):
        for n, shuffled in enumerate(row):
            old = [plain[j][n] >> 4 * i & 15 for i in range(8)]
            new = [0] * 8
            for i in range(4):
                new[i], new[4 + i] = old[2 * i], old[2 * i + 1]
            assert shuffled == int32(new), (j, n)
    assert packed.qzeros.tolist() == columns(less(w.zeros.tolist(), 1))


@pytest.mark.parametrize("act_order", [False, True])
def test_marlin_codes(make: Callable[..., Int4Weight], act_order: bool) -> None:
    w = make(act_order=act_order)
    codes, index = w.codes.tolist(), w.group_index.tolist()
    order = sorted(range(w.K), key=lambda k: index[k])
    q = [codes[k] for k in order]
    packed = marlin.pack(w)
    assert packed.qweight.shape == (w.K // 16, 2 * w.N)
    for kt, row in enumerate(packed.qweight.tolist()):
        for place, value in enumerate(row):
            tile, (thread, warp) = place // 128, divmod(place % 128, 4)
            values = []
            for v in range(8):
                k = 16 * kt + 2 * (thread % 4) + (0, 1, 8, 9)[v % 4]
                n = 64 * tile + 16 * warp + thread // 4 + 8 * (v // 4)
                values.append(q[k][n])
            assert value == int32([values[m] for m in MIX]), (kt, place)
    assert packed.perm.tolist() == (order if act_order else [])
    assert packed.g_idx.tolist() == ([index[k] for k in order] if act_order else [])


def test_marlin_grouped_scales_and_zero_points(weight: Int4Weight) -> None:
    packed = marlin.pack(weight)
    s, z = weight.scales, weight.zeros.tolist()
    assert packed.zeros is not None
    for g in range(weight.groups):
        for place, value in enumerate(packed.zeros[g].tolist()):
            block, i = divmod(place, 8)
            assert value == int32([z[g][64 * block + i + 8 * m] for m in MIX]), (g, place)
        for place in range(weight.N if weight.groups > 1 else 0):
            block, (i, j) = place // 64, divmod(place % 64, 8)
            assert packed.scales[g, place] == s[g, 64 * block + i + 8 * j], (g, place)


def test_marlin_whole_column_scales_and_bias(make: Callable[..., Int4Weight]) -> None:
    w = make(group_size=256)
    source = [32 * b + 2 * i + j for b in range(w.N // 32) for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    assert torch.equal(marlin.pack(w).scales, w.scales[:, source])
    assert torch.equal(marlin.permute_bias(w.scales[0]), w.scales[0, source])


def test_compressed_tensors(make: Callable[..., Int4Weight]) -> None:
    w = make(k=64, n=128, group_size=32, act_order=True)
    packed = compressed_tensors.pack(w)
    assert packed.weight_packed.tolist() == columns(w.codes.t().tolist())
    assert packed.weight_zero_point is not None
    assert packed.weight_zero_point.tolist() == rows(w.zeros.t().tolist())
    assert torch.equal(packed.weight_scale, w.scales.t())
    assert packed.weight_shape.tolist() == [w.N, w.K]
    assert packed.weight_g_idx is not None
    assert packed.weight_g_idx.tolist() == w.group_index.tolist()


PACKED: dict[str, Callable[[Int4Weight], tuple[Tensor, Tensor | None]]] = {
    "awq": lambda w: ((t := awq.pack(w)).qweight, t.qzeros),
    "gptq": lambda w: ((t := gptq.pack(w, 2)).qweight, t.qzeros),
    "exllama": lambda w: ((t := exllama.pack(w, 2)).qweight, t.qzeros),
    "marlin": lambda w: ((t := marlin.pack(w)).qweight, t.zeros),
    "compressed_tensors": lambda w: ((t := compressed_tensors.pack(w)).weight_packed, t.weight_zero_point),
}


@pytest.mark.parametrize("layout", PACKED)
def test_data_reach_every_nibble(make: Callable[..., Int4Weight], layout: str) -> None:
    """All 16 codes and zero points in all eight nibbles, the sign bit among them: else the tests above prove less."""
    for packed in PACKED[layout](make(group_size=32)):
        assert packed is not None
        assert bool((packed < 0).any())
        seen = {(i, value >> 4 * i & 15) for value in packed.flatten().tolist() for i in range(8)}
        assert len(seen) == 128
