"""Our pack-quantized against compressed-tensors' own compressor, both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlab.packing import compressed_tensors as ours
from qlab.weights import Int4Weight

theirs = pytest.importorskip(
    "compressed_tensors.compressors.pack_quantized",
    reason="needs compressed-tensors and psutil, which it imports: pip install qlab[test]",
    exc_type=ImportError,
)
quantization = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)


def signed(values: torch.Tensor) -> torch.Tensor:
    return (values.int() - 8).to(torch.int8)


@pytest.mark.parametrize("shape", [(256, 128, 64), (96, 40, 32), (60, 12, 20), (33, 7, 11)])
def test_their_packer(make: Callable[..., Int4Weight], shape: tuple[int, int, int]) -> None:
    """Codes along K and zero points along N, filled up where a size is no multiple of 8."""
    w = make(*shape)
    packed = ours.pack(w)
    assert packed.weight_zero_point is not None
    assert torch.equal(packed.weight_packed, theirs.pack_to_int32(signed(w.codes.t()), 4))
    assert torch.equal(packed.weight_zero_point, theirs.pack_to_int32(signed(w.zeros.t()), 4, packed_dim=0))
    assert ours.unpack(packed).equals(w)


def scheme(weight: Int4Weight) -> Any:
    whole = weight.groups == 1
    return quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(
            num_bits=4,
            symmetric=weight.symmetric,
            strategy="channel" if whole else "group",
            group_size=None if whole else weight.group_size,
            actorder="group" if weight.act_order else None,
        ),
    )


def state(packed: ours.CompressedTensors) -> dict[str, torch.Tensor]:
    return {name: t for name, t in vars(packed).items() if t is not None}


def check_both_ways(w: Int4Weight) -> None:
    """Their decompressor reads our tensors as the weight's values; their compressor makes our tensors from those values."""
    packed = ours.pack(w)
    values = theirs.PackedQuantizationCompressor.decompress(state(packed), scheme(w))["weight"]
    # They round the product to the scale's dtype, as dequantize does; its transpose is their [N, K].
    assert torch.equal(values, w.dequantize(w.dtype).t())
    wide = {"weight": w.dequantize(torch.float32).t(), "weight_scale": w.scales.t().float()}
    if not w.symmetric:
        wide["weight_zero_point"] = signed(w.zeros.t())
    if w.act_order:
        wide["weight_g_idx"] = w.group_index
    made = theirs.PackedQuantizationCompressor.compress(wide, scheme(w))
    assert set(made) == set(state(packed))
    for part in set(made) - {"weight_scale"}:
        assert torch.equal(made[part], state(packed)[part]), part


def test_asymmetric(any_order: Int4Weight) -> None:
    check_both_ways(any_order)


def test_symmetric(symmetric: Int4Weight) -> None:
    assert ours.pack(symmetric).weight_zero_point is None
    check_both_ways(symmetric)


def test_group_index_of_minus_ones_means_none(make: Callable[..., Int4Weight]) -> None:
    """compressed-tensors registers the index as -1 and leaves it so where rows are in order."""
    w = make()
    packed = state(ours.pack(w)) | {"weight_g_idx": torch.full((w.K,), -1, dtype=torch.int32)}
    assert ours.unpack(ours.CompressedTensors(**packed)).equals(w)
