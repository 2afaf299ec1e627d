"""Our packings against vLLM's own helpers, where its sources are at hand; test_vllm_golden.py is for everywhere else."""

from __future__ import annotations

from typing import Any

import torch

from qlab.packing import awq, gptq, marlin
from qlab.weights import Int4Weight


def test_awq(vllm: Any, weight: Int4Weight) -> None:
    packed = awq.pack(weight)
    assert torch.equal(packed.qweight, vllm.quant.awq_pack(weight.codes.int(), 4, weight.K, weight.N))
    assert torch.equal(packed.qzeros, vllm.quant.awq_pack(weight.zeros.int(), 4, weight.groups, weight.N))


def test_gptq(vllm: Any, any_order: Int4Weight) -> None:
    w = any_order
    rows = vllm.quant.gptq_pack(w.codes.int(), 4, w.K, w.N)
    for version in (1, 2):
        packed = gptq.pack(w, version)
        assert torch.equal(packed.qweight, rows)
        assert torch.equal(packed.qzeros, vllm.quant.pack_cols(w.zeros.int() - (2 - version), 4, w.groups, w.N))


def test_marlin_codes(vllm: Any, any_order: Int4Weight) -> None:
    w = any_order
    codes, g_idx, perm = w.codes.int(), torch.empty(0, dtype=torch.int32), None
    if w.act_order:
        codes, g_idx, perm = vllm.quant.sort_weights(codes, w.group_index)
    packed = marlin.pack(w, perm=perm)
    weight_perm = vllm.marlin_test.get_weight_perm(4)
    assert torch.equal(packed.qweight, vllm.marlin_test.marlin_weights(codes, w.K, w.N, 4, weight_perm))
    assert torch.equal(packed.g_idx, g_idx)
    assert marlin.unpack(packed).equals(w)


def test_marlin_takes_vllms_order_of_rows(vllm: Any, symmetric: Int4Weight) -> None:
    g_idx, perm = vllm.marlin.marlin_sort_g_idx(symmetric.group_index)
    given = perm if symmetric.groups > 1 else None
    packed = marlin.pack(symmetric, perm=given)
    if given is not None:
        assert torch.equal(packed.g_idx, g_idx)
        assert torch.equal(packed.perm, perm)
    assert marlin.unpack(packed).equals(symmetric)


def test_marlin_scales_and_bias(vllm: Any, weight: Int4Weight) -> None:
    packed = marlin.pack(weight)
    group_size = weight.group_size
    assert torch.equal(packed.scales, vllm.marlin.marlin_permute_scales(weight.scales, weight.K, weight.N, group_size))
    assert torch.equal(marlin.permute_bias(weight.scales[0]), vllm.marlin.marlin_permute_bias(weight.scales[0]))


def test_marlin_zero_points_both_ways(vllm: Any, weight: Int4Weight) -> None:
    zeros, shape = marlin.pack(weight).zeros, (weight.groups, weight.N)
    assert zeros is not None
    assert torch.equal(zeros, vllm.marlin.marlin_zero_points(weight.zeros.int(), *shape, 4))
    assert torch.equal(zeros, vllm.marlin.awq_to_marlin_zero_points(awq.pack(weight).qzeros, *shape, 4))
