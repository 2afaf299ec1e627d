"""``Int4Weight``: every refusal, dequantisation and AWQ's scaled input against exact fractions, and fusing."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from qlab.errors import WeightError
from qlab.inputs import random_weight
from qlab.weights import Int4Weight, fuse, round_once

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PRECISION = {F16: (11, -14, 15), BF16: (8, -126, 127), F32: (24, -126, 127), F64: (53, -1022, 1023)}


def nearest_even(value: Fraction, dtype: torch.dtype) -> float:
    """``value`` in ``dtype`` by exact rational arithmetic: round to nearest, ties to even, subnormals, overflow to infinity."""
    digits, smallest, largest = PRECISION[dtype]
    if value == 0:
        return 0.0
    exponent = smallest
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - digits + 1)
    rounded = round(value / unit) * unit  # Fraction rounds ties to even
    if abs(rounded) >= Fraction(2) ** (largest + 1):
        return float("inf") if rounded > 0 else float("-inf")
    return float(rounded)


def exact(t: Tensor) -> list[Fraction]:
    return [Fraction(v) for v in t.double().flatten().tolist()]


def weight(**parts: object) -> Int4Weight:
    return replace(random_weight(64, 8, 32, name="layer"), **{"input_scale": torch.ones(64), **parts})


def poked(t: Tensor, where: tuple[int, ...], value: float) -> Tensor:
    t = t.clone()
    t[where] = value
    return t


W = random_weight(64, 8, 32, name="layer")
S = torch.ones(64)
REFUSALS = {
    "codes dtype": ({"codes": W.codes.int()}, r"codes must be uint8 \[K, N\], not int32 \[64, 8\]"),
    "codes rank": ({"codes": W.codes[0]}, r"codes must be uint8 \[K, N\], not uint8 \[8\]"),
    "scales dtype": ({"scales": W.scales.float()}, r"scales must be fp16 or bf16 \[G, 8\], not float32 \[2, 8\]"),
    "scales width": ({"scales": W.scales[:, :4]}, r"scales must be fp16 or bf16 \[G, 8\], not float16 \[2, 4\]"),
    "scales rank": ({"scales": W.scales[0]}, r"scales must be fp16 or bf16 \[G, 8\], not float16 \[8\]"),
    "zeros dtype": ({"zeros": W.zeros.int()}, r"zeros must be uint8 \[2, 8\], not int32 \[2, 8\]"),
    "zeros shape": ({"zeros": W.zeros[:1]}, r"zeros must be uint8 \[2, 8\], not uint8 \[1, 8\]"),
    "index dtype": ({"group_index": W.group_index.long()}, r"group_index must be int32 \[64\], not int64 \[64\]"),
    "index shape": ({"group_index": W.group_index[:32]}, r"group_index must be int32 \[64\], not int32 \[32\]"),
    "no groups": ({"scales": W.scales[:0], "zeros": W.zeros[:0]}, r"K=64, N=8 and its 0 groups must all be positive"),
    "K and groups": (
        {"scales": W.scales.repeat(2, 1)[:3], "zeros": W.zeros.repeat(2, 1)[:3]},
        r"K=64 must be a multiple of its 3 groups",
    ),
    "devices": ({"zeros": W.zeros.to("meta")}, r"all parts must lie on one device, not on cpu and meta"),
    "input scale dtype": ({"input_scale": S.half()}, r"input_scale must be float32 \[64\], not float16 \[64\]"),
    "input scale shape": ({"input_scale": S[:3]}, r"input_scale must be float32 \[64\], not float32 \[3\]"),
    "input scale zero": ({"input_scale": poked(S, (5,), 0)}, r"input_scale must be finite and positive; row 5 is not"),
    "input scale inf": ({"input_scale": poked(S, (6,), float("inf"))}, r"input_scale .* row 6 is not"),
    "input scale nan": ({"input_scale": poked(S, (7,), float("nan"))}, r"input_scale .* row 7 is not"),
    "code 16": ({"codes": poked(W.codes, (9, 3), 16)}, r"codes must be 0 to 15; \(k, n\) = \(9, 3\) is not"),
    "zero point 17": ({"zeros": poked(W.zeros, (1, 3), 17)}, r"zero points must be 0 to 16; \(group, n\) = \(1, 3\) is not"),
    "scale 0": ({"scales": poked(W.scales, (1, 2), 0)}, r"scales must be finite and not zero; \(group, n\) = \(1, 2\) is not"),
    "scale nan": ({"scales": poked(W.scales, (0, 4), float("nan"))}, r"scales .* \(group, n\) = \(0, 4\) is not"),
    "scale inf": ({"scales": poked(W.scales, (0, 5), float("-inf"))}, r"scales .* \(group, n\) = \(0, 5\) is not"),
    "group -1": ({"group_index": poked(W.group_index, (3,), -1)}, r"group_index must be 0 to 1; row 3 is not"),
    "group 2": ({"group_index": poked(W.group_index, (60,), 2)}, r"group_index must be 0 to 1; row 60 is not"),
    "group sizes": ({"group_index": poked(W.group_index, (0,), 1)}, r"every group must have 32 rows; 0 has not"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_names_the_part_and_the_place(case: str) -> None:
    parts, sentence = REFUSALS[case]
    with pytest.raises(WeightError, match=rf"^weight 'layer': {sentence}$"):
        weight(**parts)


def test_nothing_to_hold() -> None:
    with pytest.raises(WeightError, match="K=64, N=0 and its 2 groups must all be positive"):
        W.columns(3, 3)


def test_zero_point_16_and_negative_scales_are_held() -> None:
    w = weight(zeros=torch.full_like(W.zeros, 16), scales=-W.scales)
    assert torch.equal(w.dequantize(F64), (16.0 - w.codes.double()) * W.scales.double().repeat_interleave(32, 0))


@pytest.mark.parametrize("scales", [F16, BF16], ids=str)
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_dequantize_rounds_the_exact_product_once(dtype: torch.dtype, scales: torch.dtype) -> None:
    w = random_weight(64, 16, 32, dtype=scales, act_order=True, seed=1)
    # Both ends of the scales' range join: subnormals, and products that overflow fp16.
    tiny, huge = torch.finfo(scales).smallest_normal / 4, torch.finfo(scales).max / 8
    ends = w.scales.clone()
    ends[0, :8], ends[1, :8] = (ends[0, :8].double() * (tiny * 2**7)).to(scales), huge
    w = replace(w, scales=ends)
    got = w.dequantize(dtype)
    assert got.dtype == dtype
    q, z, s, g = w.codes.tolist(), w.zeros.tolist(), w.scales.double().tolist(), w.group_index.tolist()
    for k in range(w.K):
        for n in range(w.N):
            want = nearest_even((q[k][n] - z[g[k]][n]) * Fraction(s[g[k]][n]), dtype)
            assert float(got[k, n].double()) == want, (k, n)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_scaled_input_is_the_nearest_quotient(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    k = 64
    s = (torch.randint(1, 1 << 23, (k,), generator=g).double() * 2.0**-21).to(F32)
    x = (torch.randint(-(1 << 11), 1 << 11, (32, k), generator=g).double() * 2.0**-7).to(dtype)
    # Quotients within 2^-25 of a tie of dtype: float32 lands on the tie, so rounding twice goes wrong on half of them.
    digits = PRECISION[dtype][0]
    ties = 1 + (2 * torch.arange(k).double() + 1) * 2.0**-digits
    s[: k // 2] = (1.5 / ties[: k // 2]).to(F32)
    x[0], x[1] = 1.5, -1.5
    w = replace(W, input_scale=s)
    got, rows, columns = w.scaled_input(x), exact(x), exact(s)
    assert got.dtype == dtype
    want = [nearest_even(v / columns[i % k], dtype) for i, v in enumerate(rows)]
    assert got.double().flatten().tolist() == want


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_round_once_where_rounding_twice_is_wrong(dtype: torch.dtype) -> None:
    digits, smallest, largest = PRECISION[dtype]
    tie, hair = 1 + 2.0**-digits, 2.0**-40
    subnormal_tie = 2.5 * 2.0 ** (smallest - digits + 1)
    top = 2.0**largest * (2 - 2.0**-digits)  # halfway between the largest number and the overflow
    values = [tie, tie + hair, tie - hair, subnormal_tie, subnormal_tie * (1 + hair), subnormal_tie * (1 - hair)]
    values += [top, top * (1 - hair), 2.0**300, 2.0**-300, 1.0, 0.0]
    x = torch.tensor([*values, *(-v for v in values)], dtype=F64)
    want = [nearest_even(Fraction(v), dtype) for v in x.tolist()]
    assert round_once(x, dtype).double().tolist() == want
    assert x.to(dtype).double().tolist() != want
    special = torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=F64)
    assert str(round_once(special, dtype).tolist()) == "[inf, -inf, nan]"


def test_without_input_scale_x_stays() -> None:
    x = torch.ones(2, 64, dtype=F16)
    assert W.scaled_input(x) is x


def test_properties() -> None:
    w = random_weight(256, 16, 64, act_order=True)
    assert (w.K, w.N, w.groups, w.group_size, w.dtype) == (256, 16, 4, 64, F16)
    assert w.act_order
    assert not W.act_order
    assert random_weight(64, 8, 32, symmetric=True).symmetric
    assert not W.symmetric
    assert random_weight(64, 8, -1).group_size == 64


def test_with_dtype_rounds_the_scales() -> None:
    w = W.with_dtype(BF16)
    assert [float(v) for v in w.scales.double().flatten()] == [nearest_even(v, BF16) for v in exact(W.scales)]
    assert torch.equal(w.codes, W.codes)


@pytest.mark.parametrize("part", ["codes", "zeros", "scales", "group_index", "input_scale"])
def test_digest_sees_one_changed_element_of_every_part(part: str) -> None:
    w = replace(random_weight(64, 8, 32, act_order=True), input_scale=S)
    changed = getattr(w, part).clone()
    if part == "group_index":
        first, other = 0, int((changed != changed[0]).nonzero()[0])
        changed[[first, other]] = changed[[other, first]]
    else:
        flat = changed.view(-1)
        flat[3] = flat[3] * 2 if changed.is_floating_point() else (flat[3] + 1) % 16
    assert not w.equals(replace(w, **{part: changed}))
    assert w.equals(replace(w, name="another name"))


def test_fuse_is_columns_undone() -> None:
    w = replace(random_weight(64, 24, 32, act_order=True), input_scale=S)
    parts = [w.columns(0, 8, "q"), w.columns(8, 16, "k"), w.columns(16, 24, "v")]
    fused = fuse(parts, "qkv")
    assert fused.equals(w)
    assert fused.name == "qkv"


def test_fuse_refuses_what_one_call_cannot_hold() -> None:
    q = replace(random_weight(64, 8, 32, act_order=True, seed=1), name="q")
    with pytest.raises(WeightError, match="weight 'qkv': no shards to fuse"):
        fuse([], "qkv")
    with pytest.raises(WeightError, match=r"cannot fuse 'k' \(K=128, 2 groups, torch.float16\) with 'q' \(K=64"):
        fuse([q, random_weight(128, 8, 64, name="k")])
    with pytest.raises(WeightError, match=r"cannot fuse 'k' \(K=64, 1 groups"):
        fuse([q, random_weight(64, 8, 64, name="k")])
    with pytest.raises(WeightError, match=r"cannot fuse 'k' \(K=64, 2 groups, torch.bfloat16\)"):
        fuse([q, random_weight(64, 8, 32, dtype=BF16, name="k")])
    index = q.group_index.clone()
    other = int((index != index[0]).nonzero()[0])
    index[[0, other]] = index[[other, 0]]
    with pytest.raises(WeightError, match="cannot fuse 'k' with 'q': their group indices differ, first at row 0"):
        fuse([q, replace(q, group_index=index, name="k")])
    with pytest.raises(WeightError, match="cannot fuse 'k' with 'q': their AWQ input scales differ"):
        fuse([q, replace(q, input_scale=S, name="k")])
    with pytest.raises(WeightError, match="cannot fuse 'k' with 'q': their AWQ input scales differ"):
        fuse([replace(q, input_scale=S), replace(q, input_scale=2 * S, name="k")])
