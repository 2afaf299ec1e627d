"""Faults of storage are told from other weights, and every kernel's packing gives its weight back."""

from dataclasses import replace

import pytest
import torch

from qlab.attribution.storage import packing_round_trip, storage_fault
from qlab.backends.registry import Problem, kernels
from qlab.errors import PackingError, QlabError
from qlab.inputs import random_weight
from qlab.lab.faults import hypotheses
from qlab.packing import awq, marlin, nibbles
from qlab.quantize import rtn

SYMMETRIC = random_weight(256, 128, 64, symmetric=True, seed=5, name="s")
ASYMMETRIC = random_weight(256, 128, 64, seed=6, name="a")
ORDERED = random_weight(256, 128, 64, symmetric=True, act_order=True, seed=7, name="o")


def flipped(weight, *places):
    codes = weight.codes.clone()
    for k, n, mask in places:
        codes[k, n] ^= mask
    return replace(weight, codes=codes)


def test_flipped_nibbles_by_row_column_and_code():
    code = int(ASYMMETRIC.codes[17, 60])
    assert storage_fault(ASYMMETRIC, flipped(ASYMMETRIC, (17, 60, 8))) == f"k=17, n=60 holds code {code ^ 8} instead of {code}"
    text = storage_fault(ASYMMETRIC, flipped(ASYMMETRIC, (17, 60, 8), (200, 3, 15)), (("q", 56), ("k", 72)))
    first, second = text.split("; ")
    assert first.startswith("k=17, n=60 (column 4 of k) holds code")
    assert second.startswith("k=200, n=3 (column 3 of q) holds code")


@pytest.mark.parametrize("weight", [ASYMMETRIC, ORDERED], ids=["asymmetric", "act-order"])
def test_every_named_fault_is_one(weight):
    told = 0
    for name, fault in hypotheses(weight):
        try:
            wrong = fault(weight)
        except QlabError:  # this weight has no room for it
            continue
        said = storage_fault(weight, wrong)
        same = torch.equal(wrong.dequantize(torch.float16), weight.dequantize(torch.float16))
        assert bool(said) != same, name
        told += not same
    assert told >= 10


def test_a_zero_point_and_a_scale():
    zeros, scales = ASYMMETRIC.zeros.clone(), ASYMMETRIC.scales.clone()
    zeros[2, 7] ^= 4
    scales[1, 9] *= 2
    assert storage_fault(ASYMMETRIC, replace(ASYMMETRIC, zeros=zeros)).startswith("zero points: group 2, n=7 has")
    assert storage_fault(ASYMMETRIC, replace(ASYMMETRIC, scales=scales)).startswith("scales: group 1, n=9 has")


def test_other_weights_are_no_fault_of_storage():
    w = torch.randn((256, 128), generator=torch.Generator().manual_seed(1))
    one, other = rtn.quantize(w, 64, True), rtn.quantize(w + 0.02 * torch.randn_like(w), 64, True)
    assert storage_fault(one, other) == ""
    assert storage_fault(one, one) == ""
    assert storage_fault(one, rtn.quantize(w, 32, True)) == ""
    assert storage_fault(one, rtn.quantize(w, 64, False)) == ""
    assert storage_fault(one, one.columns(0, 64)) == ""
    assert storage_fault(one, replace(flipped(one, (3, 4, 1)), input_scale=torch.ones(256))) == ""
    assert storage_fault(one, flipped(one, *((k, 5, 3) for k in range(40)))) == ""


def holds(kernel, weight):
    """Whether the kernel takes such a weight on a Hopper GPU."""
    if kernel.portable:
        return True
    return not kernel.refusal(Problem.of(weight, 16), (9, 0))


@pytest.mark.parametrize("kernel", kernels(), ids=lambda k: k.name)
@pytest.mark.parametrize("weight", [SYMMETRIC, ASYMMETRIC, ORDERED], ids=["symmetric", "asymmetric", "act-order"])
def test_every_kernels_storage_gives_the_weight_back(kernel, weight):
    weight = replace(weight, input_scale=torch.arange(1, 257).float())
    if not holds(kernel, weight):
        pytest.skip(kernel.refusal(Problem.of(weight, 16), (9, 0)))
    found = packing_round_trip(kernel.name, weight)
    assert (found.kernel, found.storage) == (kernel.name, kernel.layout)
    if "machete" in kernel.name:
        assert found.exact is None
        assert "no inverse here" in found.text
    else:
        assert found.exact is True


def test_a_wrong_packing_is_seen_and_named(monkeypatch):
    split = awq._split
    monkeypatch.setattr(awq, "_split", lambda packed: nibbles.split(packed))
    found = packing_round_trip("vllm.awq_gemm", ASYMMETRIC)
    assert found.exact is False
    assert found.text.startswith("codes and zero points:")
    monkeypatch.setattr(awq, "_split", split)
    assert packing_round_trip("vllm.awq_gemm", ASYMMETRIC).exact
    monkeypatch.setattr(marlin, "unpermute_scales", lambda s: s)
    assert "Marlin's 64-column permutation" in packing_round_trip("vllm.marlin.awq", ASYMMETRIC).text


def test_what_cannot_be_held_gives_one_sentence():
    with pytest.raises(PackingError, match="act-order"):
        packing_round_trip("vllm.awq_gemm", ORDERED)
    with pytest.raises(PackingError, match='use kind "uint4"'):
        packing_round_trip("vllm.marlin.gptq", ASYMMETRIC)
    with pytest.raises(QlabError, match="unknown kernel"):
        packing_round_trip("vllm.nothing", SYMMETRIC)
