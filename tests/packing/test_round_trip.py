"""Unpacking returns every bit that was packed, for any weight of a layout's declared domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.packing import awq, compressed_tensors, exllama, gptq, marlin, nibbles
from qlab.weights import Int4Weight, sequential_groups


class Layout(NamedTuple):
    """A layout's domain: K and N are multiples, zero points from low to high."""

    pack: Callable[[Int4Weight], Any]
    unpack: Callable[..., Int4Weight]
    k: int
    n: int
    low: int
    high: int
    act_order: bool


LAYOUTS = {
    "awq": Layout(awq.pack, awq.unpack, 1, 8, 0, 15, False),
    "gptq 1": Layout(gptq.pack, gptq.unpack, 8, 8, 1, 16, True),
    "gptq 2": Layout(lambda w: gptq.pack(w, 2), gptq.unpack, 8, 8, 0, 15, True),
    "exllama 1": Layout(exllama.pack, exllama.unpack, 8, 8, 1, 16, True),
    "exllama 2": Layout(lambda w: exllama.pack(w, 2), exllama.unpack, 8, 8, 0, 15, True),
    "marlin uint4": Layout(lambda w: marlin.pack(w, "uint4"), marlin.unpack, 16, 64, 0, 15, True),
    "marlin uint4b8": Layout(lambda w: marlin.pack(w, "uint4b8"), marlin.unpack, 16, 64, 8, 8, True),
    "compressed-tensors": Layout(compressed_tensors.pack, compressed_tensors.unpack, 1, 1, 0, 15, True),
}


@st.composite
def weights(draw: st.DrawFn, layout: Layout) -> Int4Weight:
    k = layout.k * draw(st.integers(1, 48 // layout.k))
    n = layout.n * draw(st.integers(1, 3 if layout.n > 1 else 21))
    groups = draw(st.sampled_from([g for g in range(1, k + 1) if k % g == 0]))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 16, (k, n), generator=g, dtype=torch.uint8)
    codes[draw(st.integers(0, k - 1)), draw(st.integers(0, n - 1))] = draw(st.sampled_from([0, 8, 15]))
    low, high = draw(st.sampled_from([(layout.low, layout.high), (8, 8)]))
    zeros = torch.randint(low, high + 1, (groups, n), generator=g, dtype=torch.uint8)
    scales = torch.randint(1, 0x7000, (groups, n), generator=g).to(torch.int16).view(dtype) * draw(st.sampled_from([1, -1]))
    index = sequential_groups(k, k // groups)
    if layout.act_order and draw(st.booleans()):
        index = index[torch.randperm(k, generator=g)].contiguous()
    return Int4Weight(codes, zeros, scales, index)


@pytest.mark.parametrize("name", LAYOUTS)
def test_unpack_inverts_pack(name: str) -> None:
    layout = LAYOUTS[name]

    @settings(max_examples=60, deadline=None)
    @given(weights(layout))
    def check(weight: Int4Weight) -> None:
        assert layout.unpack(layout.pack(weight)).equals(weight)

    check()


@pytest.mark.parametrize("name", [n for n, layout in LAYOUTS.items() if layout.high > layout.low])
def test_every_zero_point_at_once(name: str, make: Callable[..., Int4Weight]) -> None:
    layout = LAYOUTS[name]
    zeros = (torch.arange(4 * 128).reshape(4, 128) % (layout.high - layout.low + 1) + layout.low).to(torch.uint8)
    weight = replace(make(low=layout.low, high=layout.high), zeros=zeros)
    assert layout.unpack(layout.pack(weight)).equals(weight)


@pytest.mark.parametrize("module", [exllama, marlin])
def test_any_order_within_a_group_comes_back(module: Any, make: Callable[..., Int4Weight]) -> None:
    weight = make(low=1, act_order=True)
    last_first = torch.argsort(weight.group_index * weight.K + torch.arange(weight.K - 1, -1, -1)).int()
    packed, stable = module.pack(weight, perm=last_first), module.pack(weight)
    assert not torch.equal(packed.qweight, stable.qweight)
    assert module.unpack(packed).equals(weight)


@pytest.mark.parametrize("module", [exllama, marlin])
def test_a_permutation_of_rows_in_order_comes_back(module: Any, make: Callable[..., Int4Weight]) -> None:
    """vLLM sorts wherever the checkpoint says desc_act, and its sort may move rows that were in order."""
    weight = make(low=1)
    swapped = torch.arange(weight.K, dtype=torch.int32)
    swapped[:2] = torch.tensor([1, 0])
    assert module.unpack(module.pack(weight, perm=swapped)).equals(weight)


@pytest.mark.parametrize("name", LAYOUTS)
def test_name_and_input_scale_are_carried(name: str, make: Callable[..., Int4Weight]) -> None:
    layout = LAYOUTS[name]
    scale = torch.arange(1, 257, dtype=torch.float32)
    weight = replace(make(low=layout.low, high=layout.high), input_scale=scale)
    back = layout.unpack(layout.pack(weight), name="model.o", input_scale=scale)
    assert back.name == "model.o"
    assert back.equals(weight)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_shared_in_memory(name: str, make: Callable[..., Int4Weight]) -> None:
    layout = LAYOUTS[name]
    weight = make(low=layout.low, high=layout.high, act_order=layout.act_order)
    before = weight.digest()
    packed = layout.pack(weight)
    back = layout.unpack(packed)
    tensors = [t for t in vars(packed).values() if isinstance(t, torch.Tensor)]
    assert all(t.is_contiguous() for t in tensors)
    for t in tensors:
        t.zero_()
    assert weight.digest() == before
    assert back.digest() == before


def test_views_pack_like_copies(make: Callable[..., Int4Weight]) -> None:
    """A column slice, as one shard of a fused layer is, has strides of its own."""
    fused = make(n=256)
    shard = fused.columns(64, 192)
    view = replace(fused, codes=fused.codes[:, 64:192], zeros=fused.zeros[:, 64:192], scales=fused.scales[:, 64:192])
    assert torch.equal(awq.pack(view).qweight, awq.pack(shard).qweight)
    assert torch.equal(marlin.pack(view).qweight, marlin.pack(shard).qweight)
    assert gptq.unpack(gptq.pack(view, 2)).equals(shard)


def test_nibbles_are_bits_4i_to_4i_plus_3() -> None:
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    assert nibbles.join(values).tolist() == [[0x87654321 - 2**32], [0xF0000000 - 2**32]]
    assert torch.equal(nibbles.split(nibbles.join(values)), values)
    assert nibbles.even_then_odd(torch.arange(8)).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert nibbles.undo_even_then_odd(nibbles.even_then_odd(torch.arange(16))).tolist() == list(range(16))
