"""GPTQ against llm-compressor (version 0.10.0.4, ``gptq_quantize.quantize_weight``), an independent implementation.

It fits every grid to the original weight and keeps scales in float32, so the comparison uses static groups and weights whose
scales are exact in fp16. The codes it gave are recorded as digests; where it is installed, they are computed anew.
"""

import hashlib

import pytest
import torch

from qlab.quantize import gptq
from qlab.quantize.statistics import Statistics

CASES = [(True, False), (True, True), (False, False), (False, True)]
RECORDED = {
    (True, False): "2439c27d1ebd3ab3",
    (True, True): "996656a08ba7156f",
    (False, False): "8d9ca73a9d059efc",
    (False, True): "c1be728d09c20ecb",
}
K, N, GROUP = 256, 48, 64


def case(activations, matrix, symmetric):
    """A Hessian, and a weight whose groups reach exactly from ``-z s`` to ``(15 - z) s`` (symmetric: ``-7.5 s``), s in fp16."""
    groups = matrix(K, N).reshape(K // GROUP, GROUP, N).clone()
    if symmetric:
        top = groups.abs().amax(1, keepdim=True)
        groups *= (top / 7.5).half().double() * 7.5 / top
    else:
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        s = ((high - low) / 15).half().double()
        z = torch.round(-low / s)
        groups = torch.where(
            groups == low, -z * s, torch.where(groups == high, (15 - z) * s, groups.clamp(-z * s, (15 - z) * s))
        )
    return groups.reshape(K, N), Statistics.of(activations(1200, K)).hessian


def digest(codes):
    return hashlib.sha256(codes.to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("symmetric", "act_order"), CASES)
def test_codes_are_those_that_llm_compressor_gave(activations, matrix, symmetric, act_order):
    w, hessian = case(activations, matrix, symmetric)
    q = gptq.quantize(w, gptq.prepare(hessian, act_order=act_order), GROUP, symmetric, static_groups=True)
    assert digest(q.codes) == RECORDED[symmetric, act_order]


@pytest.mark.parametrize(("symmetric", "act_order"), CASES)
def test_llm_compressor_still_gives_the_recorded_codes(activations, matrix, symmetric, act_order):
    peer = pytest.importorskip(
        "llmcompressor.modifiers.quantization.gptq.gptq_quantize", reason="llmcompressor is not installed", exc_type=ImportError
    )
    from compressed_tensors.quantization import QuantizationArgs

    w, hessian = case(activations, matrix, symmetric)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = w.T.float().contiguous()
    arguments = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=symmetric,
        strategy="group",
        group_size=GROUP,
        actorder="static" if act_order else None,
        observer="memoryless_minmax",
    )
    _, found = peer.quantize_weight(linear, arguments, hessian.float(), blocksize=128, percdamp=0.01)
    rows = torch.arange(K) // GROUP
    scale, zero = found["weight_scale"].T[rows].double(), found["weight_zero_point"].T[rows].double()
    codes = torch.round(found["weight"].T.double() / scale) + zero + 8
    assert digest(codes) == RECORDED[symmetric, act_order]
