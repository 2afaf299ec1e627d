"""The same code on a GPU gives the same bits, and vLLM's repacking operators leave the tensors that we pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlab.packing import awq, compressed_tensors, exllama, gptq, marlin
from qlab.weights import Int4Weight

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("module", [awq, gptq, exllama, marlin, compressed_tensors])
def test_same_bits_as_on_the_cpu(make: Callable[..., Int4Weight], module: Any) -> None:
    w = make(low=1, act_order=module is not awq)
    here, there = module.pack(w), module.pack(w.to("cuda"))
    for part, t in vars(here).items():
        if isinstance(t, torch.Tensor):
            assert vars(there)[part].is_cuda
            assert torch.equal(t, vars(there)[part].cpu()), part
    assert module.unpack(there).to("cpu").equals(w)


@pytest.fixture
def operators() -> Any:
    from qlab.backends.vllm_extension import operators

    return operators()


@pytest.mark.vllm
def test_exllama_is_what_gptq_shuffle_leaves(operators: Any, any_order: Int4Weight) -> None:
    ours = exllama.pack(any_order.to("cuda"))
    theirs = gptq.pack(any_order.to("cuda"))
    operators.gptq_shuffle(theirs.qweight, ours.q_perm, 4)
    assert torch.equal(ours.qweight, theirs.qweight)
    assert torch.equal(ours.qzeros, theirs.qzeros)


@pytest.mark.vllm
def test_marlin_is_what_the_repacking_operators_make(operators: Any, any_order: Int4Weight) -> None:
    w = any_order.to("cuda")
    ours = marlin.pack(w)
    assert torch.equal(ours.qweight, operators.gptq_marlin_repack(gptq.pack(w).qweight, ours.perm, w.K, w.N, 4, False))
    if not w.act_order:
        assert torch.equal(ours.qweight, operators.awq_marlin_repack(awq.pack(w).qweight, w.K, w.N, 4, False))
