"""The layout of qlab's CUDA kernels: an independent formula for every word, exact inverse, refusals, planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qlab.errors import PackingError
from qlab.packing import fragments
from qlab.weights import Int4Weight

SHAPES = [
    (256, 128, 32, 0, 16, False),
    (256, 72, 64, 1, 15, True),
    (160, 40, 32, 0, 15, False),
    (96, 8, 96, 0, 16, False),
    (512, 64, 256, 1, 16, True),
    (384, 200, 128, 8, 8, False),
    (64, 136, 64, 0, 16, False),
    (416, 24, 32, 8, 8, True),
]
"""K, N, group, lowest and highest zero point, act-order."""


@pytest.fixture(params=SHAPES, ids=str)
def ragged(request: pytest.FixtureRequest, make: Callable[..., Int4Weight]) -> Int4Weight:
    k, n, group, low, high, act_order = request.param
    return make(k, n, group, low=low, high=high, act_order=act_order, dtype=torch.bfloat16 if n == 40 else torch.float16)


def words_of_codes(w: Int4Weight, order: list[int], i: int, j: int) -> list[int]:
    """The 1,024 words of block (i, j) in unsigned integers, walking over codes instead of words."""
    words = [0] * 1024
    codes = w.codes.tolist()
    for k in range(128 * j, min(128 * (j + 1), w.K)):
        chunk, in_chunk = divmod(k % 128, 32)
        half, in_half = divmod(in_chunk, 16)
        eight, in_eight = divmod(in_half, 8)
        quad, odd = divmod(in_eight, 2)
        for n in range(64 * i, min(64 * (i + 1), w.N)):
            tile, in_tile = divmod(n % 64, 16)
            upper, row = divmod(in_tile, 8)
            value = (0, 1, 8, 9).index(8 * eight + odd) + 4 * upper
            nibble = (0, 2, 4, 6, 1, 3, 5, 7).index(value)
            word = ((chunk * 4 + tile) * 32 + 4 * row + quad) * 2 + half
            assert words[word] >> 4 * nibble & 15 == 0
            words[word] |= codes[order[k]][n] << 4 * nibble
    return words


def place(n: int) -> int:
    """Where a block keeps the scale of its column n: pairs (r, r + 8) of each 16."""
    tile, within = n // 16, n % 16
    return 16 * tile + [r + 8 * u for r in range(8) for u in range(2)].index(within)


def test_every_word_is_the_formulas(ragged: Int4Weight) -> None:
    w = ragged
    t = fragments.pack(w)
    rows = {32: 4, 64: 2}.get(w.group_size, 1) if w.groups > 1 else 1
    order = sorted(range(w.K), key=lambda k: int(w.group_index[k]))
    zero_words = 0 if w.symmetric else 16 * rows
    assert tuple(t.blocks.shape) == (-(-w.N // 64), -(-w.K // 128), 1024 + 32 * rows + zero_words)
    assert t.blocks.dtype == torch.int32
    assert t.blocks.is_contiguous()
    for i in range(t.blocks.shape[0]):
        for j in range(t.blocks.shape[1]):
            block = [v % 2**32 for v in t.blocks[i, j].tolist()]
            assert block[:1024] == words_of_codes(w, order, i, j)
            halves = t.blocks[i, j, 1024 : 1024 + 32 * rows].view(torch.int16).tolist()
            bytes_ = t.blocks[i, j, 1024 + 32 * rows :].contiguous().view(torch.uint8).tolist()
            for r in range(rows):
                k = 128 * j + r * 128 // rows
                for n in range(64):
                    column, inside = 64 * i + n, k < w.K and 64 * i + n < w.N
                    group = k // w.group_size
                    one = torch.ones((), dtype=w.dtype)
                    scale = w.scales[group, column] if inside else one
                    assert halves[64 * r + place(n)] == int(scale.view(torch.int16)), (i, j, r, n)
                    if zero_words:
                        assert bytes_[64 * r + place(n)] == (int(w.zeros[group, column]) if inside else 0)
    assert t.perm.tolist() == (order if w.act_order else [])
    assert torch.equal(t.column_scales, w.scales[0] if w.groups == 1 else w.scales[:0].flatten())


def test_unpack_inverts_pack(ragged: Int4Weight) -> None:
    assert fragments.unpack(fragments.pack(ragged)).equals(ragged)


def test_stretches_are_one_pass(make: Callable[..., Int4Weight], monkeypatch: pytest.MonkeyPatch) -> None:
    w = make(384, 456, 64, act_order=True)
    whole = fragments.pack(w)
    monkeypatch.setattr(fragments, "STRETCH", 2 * 384 * 64)
    assert torch.equal(fragments.pack(w).blocks, whole.blocks)
    assert fragments.unpack(whole).equals(w)


def test_every_code_in_every_nibble_and_bit_31(make: Callable[..., Int4Weight]) -> None:
    w = make(512, 128, 128)
    words = fragments.pack(w).blocks[..., :1024]
    for nibble in range(8):
        assert (words >> 4 * nibble & 15).unique().numel() == 16
    assert bool((words < 0).any())
    for code in range(16):
        same = replace(w, codes=torch.full_like(w.codes, code))
        assert fragments.pack(same).blocks[..., :1024].unique().tolist() == [(code * 0x11111111 + 2**31) % 2**32 - 2**31]


def test_every_zero_point_is_stored_as_it_is(make: Callable[..., Int4Weight]) -> None:
    zeros = (torch.arange(4 * 128).reshape(4, 128) % 17).to(torch.uint8)
    w = replace(make(), zeros=zeros)
    t = fragments.pack(w)
    stored = t.blocks[..., 1024 + 64 :].contiguous().view(torch.uint8)
    assert stored.unique().tolist() == list(range(17))
    assert fragments.unpack(t).equals(w)


def test_a_weight_that_is_symmetric_has_no_zero_points(make: Callable[..., Int4Weight]) -> None:
    w = make(low=8, high=8)
    one_off = replace(w, zeros=w.zeros.clone())
    one_off.zeros[3, 77] = 9
    assert fragments.pack(w).blocks.shape[2] == 1024 + 64
    assert fragments.pack(one_off).blocks.shape[2] == 1024 + 64 + 32
    assert fragments.unpack(fragments.pack(one_off)).equals(one_off)


def test_any_order_within_a_group_comes_back(make: Callable[..., Int4Weight]) -> None:
    w = make(low=1, act_order=True)
    last_first = torch.argsort(w.group_index * w.K + torch.arange(w.K - 1, -1, -1)).int()
    packed = fragments.pack(w, perm=last_first)
    assert not torch.equal(packed.blocks, fragments.pack(w).blocks)
    assert fragments.unpack(packed).equals(w)


def test_name_and_input_scale_are_carried(make: Callable[..., Int4Weight]) -> None:
    scale = torch.arange(1, 257, dtype=torch.float32)
    w = replace(make(), input_scale=scale)
    back = fragments.unpack(fragments.pack(w), name="model.o", input_scale=scale)
    assert back.name == "model.o"
    assert back.equals(w)


def test_nothing_is_shared_in_memory(make: Callable[..., Int4Weight]) -> None:
    for group in (64, 256):
        w = make(group_size=group)
        before = w.digest()
        packed = fragments.pack(w)
        back = fragments.unpack(packed)
        for t in (packed.blocks, packed.column_scales, packed.perm):
            t.zero_()
        assert (w.digest(), back.digest()) == (before, before)


@pytest.mark.parametrize(
    ("k", "n", "group", "said"),
    [
        (48, 8, 48, "K=48 is not a multiple of 32"),
        (64, 12, 32, "N=12 is not a multiple of 8"),
        (192, 8, 96, "groups of 96 rows are neither 32, 64, a multiple of 128 nor the whole column"),
        (64, 8, 16, "groups of 16 rows are neither"),
    ],
)
def test_what_it_cannot_hold_is_one_sentence(make: Callable[..., Int4Weight], k: int, n: int, group: int, said: str) -> None:
    with pytest.raises(PackingError) as raised:
        fragments.pack(make(k, n, group))
    assert str(raised.value).startswith(f"cannot pack weight 'layer' as fragments: {said}")
    assert "\n" not in str(raised.value)


def test_a_perm_that_does_not_sort_is_refused(make: Callable[..., Int4Weight]) -> None:
    w = make(act_order=True)
    with pytest.raises(PackingError, match="perm does not sort the group index"):
        fragments.pack(w, perm=torch.arange(w.K, dtype=torch.int32))


def test_tensors_that_do_not_go_together_are_refused(make: Callable[..., Int4Weight]) -> None:
    t = fragments.pack(make(group_size=256))
    wrong = {
        r"blocks must be int32 \[2, 2, 1072\], not torch.int64": replace(t, blocks=t.blocks.long()),
        r"blocks must be int32 \[2, 2, 1072\], not .* \[2, 2, 1056\]": replace(t, blocks=t.blocks[..., :1056]),
        r"blocks must be int32 \[2, 3, 1072\]": replace(t, k=384, group_size=384),
        "k=256 must be a positive multiple of group_size=100": replace(t, group_size=100),
        "K=250 is not a multiple of 32": replace(t, k=250, group_size=250),
        r"column_scales must be torch.float16 \[128\], not torch.float16 \[64\]": replace(
            t, column_scales=t.column_scales[:64]
        ),
        "column_scales differ from the scales in the blocks": replace(t, column_scales=t.column_scales.flip(0)),
        "dtype must be fp16 or bf16": replace(t, dtype=torch.float32),
        "perm must hold every row 0 to 255 once": replace(t, perm=torch.zeros(256, dtype=torch.int32)),
    }
    for said, tensors in wrong.items():
        with pytest.raises(PackingError, match=said) as raised:
            fragments.unpack(tensors, name="layer")
        assert str(raised.value).startswith("fragments tensors of 'layer': ")


@pytest.mark.parametrize("fault", ["nibble", "half", "scale", "zero", "perm"])
def test_a_planted_fault_comes_back_as_another_weight(make: Callable[..., Int4Weight], fault: str) -> None:
    w = make(act_order=True)
    t = fragments.pack(w)
    if fault == "nibble":
        t.blocks[0, 0, 17] ^= 1 << 28
    elif fault == "half":
        t.blocks[0, 0, :1024] = t.blocks[0, 0, :1024].reshape(-1, 2).flip(1).flatten()
    elif fault == "scale":
        t.blocks[1, 1, 1024:1056] = t.blocks[1, 1, 1056:1088].clone()
    elif fault == "zero":
        t.blocks[1, 0, 1088] += 1
    else:
        t.perm[:2] = t.perm[:2].flip(0)
    assert not fragments.unpack(t).equals(w)


@pytest.mark.gpu
def test_same_bits_on_the_gpu(ragged: Int4Weight) -> None:
    here, there = fragments.pack(ragged), fragments.pack(ragged.to("cuda"))
    for part in ("blocks", "column_scales", "perm"):
        assert vars(there)[part].is_cuda
        assert torch.equal(vars(here)[part], vars(there)[part].cpu()), part
    assert fragments.unpack(there).to("cpu").equals(ragged)


@pytest.mark.gpu
def test_memory_on_the_gpu_stays_near_the_weights_own() -> None:
    k, n = 8192, 16384
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, device="cuda")
    scales = torch.full((k // 128, n), 0.5, dtype=torch.float16, device="cuda")
    index = torch.arange(k, dtype=torch.int32, device="cuda") // 128
    w = Int4Weight(codes, (codes[: k // 128] % 16).clone(), scales, index)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    t = fragments.pack(w)
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before - t.blocks.numel() * 4
    assert beyond < 8 * fragments.STRETCH, f"{beyond} bytes beside weight and blocks"
    assert torch.equal(fragments.unpack(t).codes, codes)
