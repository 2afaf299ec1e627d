"""What a layout cannot hold, and tensors that are not of a layout, get one sentence that names the place and the mend."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qlab.errors import PackingError
from qlab.packing import awq, compressed_tensors, exllama, gptq, marlin
from qlab.weights import Int4Weight

Make = Callable[..., Int4Weight]

INT = torch.int32


def with_zero(weight: Int4Weight, value: int, group: int = 2, column: int = 37) -> Int4Weight:
    zeros = weight.zeros.clone()
    zeros[group, column] = value
    return replace(weight, zeros=zeros)


@pytest.mark.parametrize(
    ("pack", "zero", "held"),
    [
        (awq.pack, 16, "layer' as awq: zero point 16 at group 2, column 37, but the layout holds 0 to 15; pack it as gptq"),
        (gptq.pack, 0, "gptq version 1: zero point 0 at group 2, column 37, but the layout holds 1 to 16; use version 2"),
        (lambda w: gptq.pack(w, 2), 16, "gptq version 2: zero point 16 at group 2, column 37, .* 0 to 15; use version 1"),
        (exllama.pack, 0, "exllama version 1: zero point 0 at group 2, column 37"),
        (lambda w: exllama.pack(w, 2), 16, "exllama version 2: zero point 16 at group 2, column 37"),
        (marlin.pack, 16, "marlin uint4: zero point 16 at group 2, column 37"),
        (lambda w: marlin.pack(w, "uint4b8"), 7, "marlin uint4b8: zero point 7 at group 2, column 37, .* only 8; use kind"),
        (compressed_tensors.pack, 16, "compressed-tensors: zero point 16 at group 2, column 37"),
    ],
)
def test_zero_points(make: Make, pack: Callable[[Int4Weight], Any], zero: int, held: str) -> None:
    good = make(low=8, high=8)
    pack(good)
    with pytest.raises(PackingError, match=held):
        pack(with_zero(good, zero))


def test_awq_has_no_group_index(make: Make) -> None:
    w = make()
    index = w.group_index.clone()
    index[[5, 200]] = index[[200, 5]]
    with pytest.raises(PackingError, match=r"act-order \(row 5 is in group 3\).*pack it as gptq"):
        awq.pack(replace(w, group_index=index))


@pytest.mark.parametrize(
    ("pack", "k", "n", "text"),
    [
        (awq.pack, 64, 12, "N=12 is not a multiple of 8; pad the layer to 16"),
        (gptq.pack, 60, 16, "K=60 is not a multiple of 8; pad the layer to 64"),
        (gptq.pack, 64, 12, "N=12"),
        (exllama.pack, 60, 16, "K=60"),
        (exllama.pack, 64, 12, "N=12"),
        (marlin.pack, 72, 64, "K=72 is not a multiple of 16; pad the layer to 80"),
        (marlin.pack, 64, 96, "N=96 is not a multiple of 64; pad the layer to 128"),
    ],
)
def test_sizes(make: Make, pack: Callable[[Int4Weight], Any], k: int, n: int, text: str) -> None:
    with pytest.raises(PackingError, match=text):
        pack(make(k, n, k, low=1))


@pytest.mark.parametrize("module", [exllama, marlin])
def test_permutations(make: Make, module: Any) -> None:
    w = make(low=1, act_order=True)
    with pytest.raises(PackingError, match="does not sort the group index: row 0, of group"):
        module.pack(w, perm=torch.arange(w.K, dtype=INT))
    for bad in (torch.zeros(w.K, dtype=INT), torch.arange(w.K), torch.arange(w.K - 1, dtype=INT)):
        with pytest.raises(PackingError, match=r"perm must be int32 \[256\] on cpu and hold every row once"):
            module.pack(w, perm=bad)


def test_marlin_sorts_nothing_within_one_group(make: Make) -> None:
    w = make(group_size=256)
    with pytest.raises(PackingError, match="single group; leave perm out"):
        marlin.pack(w, perm=torch.arange(w.K, dtype=INT))


def test_unknown_versions_and_kinds(make: Make) -> None:
    w = make(low=1)
    with pytest.raises(PackingError, match="versions 1 and 2, not 3"):
        gptq.pack(w, 3)  # type: ignore[arg-type]
    with pytest.raises(PackingError, match='"uint4" or "uint4b8"'):
        marlin.pack(w, "int4")  # type: ignore[arg-type]
    with pytest.raises(PackingError, match="multiple of 32"):
        marlin.permute_bias(torch.zeros(40))


UNPACK = {"awq": awq, "gptq": gptq, "exllama": exllama, "marlin": marlin, "compressed": compressed_tensors}

ODD_INDEX = torch.arange(256, dtype=INT) // 64
ODD_INDEX[7] = 1


@pytest.mark.parametrize(
    ("layout", "part", "bad", "text"),
    [
        ("awq", "qweight", torch.zeros(256, 16), r"qweight must be int32 \[any, any\], not float32 \[256, 16\]"),
        ("awq", "qweight", torch.zeros(0, 16, dtype=INT), r"qweight .* not int32 \[0, 16\]"),
        ("awq", "qzeros", torch.zeros(4, 15, dtype=INT), r"qzeros must be int32 \[4, 16\], not int32 \[4, 15\]"),
        ("awq", "qzeros", torch.zeros(4, 16, dtype=INT, device="meta"), "qzeros is on meta, the codes are on cpu"),
        ("awq", "scales", torch.ones(4, 128), r"scales must be float16 or bfloat16 \[any, 128\], not float32"),
        ("awq", "scales", torch.ones(3, 128).half(), r"qzeros must be int32 \[3, 16\]"),
        ("awq", "scales", torch.full((4, 128), float("nan")).half(), r"weight 'mlp': scales must be finite"),
        ("gptq", "g_idx", torch.zeros(255, dtype=INT), r"g_idx must be int32 \[256\], not int32 \[255\]"),
        ("gptq", "g_idx", torch.arange(256), "g_idx must be int32"),
        ("gptq", "g_idx", torch.arange(256, dtype=INT), "g_idx must be 0 to 3, but row 4 holds 4"),
        ("gptq", "g_idx", -torch.arange(256, dtype=INT), "g_idx must be 0 to 3, but row 1 holds -1"),
        ("gptq", "g_idx", ODD_INDEX, "g_idx must put 64 rows into every group, but group 0 has 63"),
        ("gptq", "qweight", torch.zeros(32, 124, dtype=INT), r"scales must be float16 or bfloat16 \[any, 124\]"),
        ("exllama", "q_perm", torch.zeros(256, dtype=INT), "q_perm must hold every row 0 to 255 once"),
        ("exllama", "q_perm", torch.zeros(8, dtype=INT), r"q_perm must be int32 \[256\], not int32 \[8\]"),
        ("exllama", "qzeros", torch.zeros(3, 16, dtype=INT), r"qzeros must be int32 \[4, 16\]"),
        ("marlin", "qweight", torch.zeros(16, 250, dtype=INT), "multiple of 128 columns, two for each of N, not 250"),
        ("marlin", "zeros", None, "marlin uint4 .*zeros must be int32 for uint4"),
        ("marlin", "zeros", torch.zeros(1, 16, dtype=INT), r"zeros must be int32 \[4, 16\]"),
        ("marlin", "perm", torch.arange(256, dtype=INT), r"g_idx must be int32 \[256\], not int32 \[0\]"),
        ("marlin", "g_idx", torch.arange(256, dtype=INT), r"perm must be int32 \[256\], not int32 \[0\]"),
        ("marlin", "scales", torch.ones(4, 64).half(), r"scales must be float16 or bfloat16 \[any, 128\]"),
        ("compressed", "weight_packed", torch.zeros(128, 31, dtype=INT), r"weight_packed must be int32 \[128, 32\]"),
        ("compressed", "weight_shape", torch.tensor([128.0, 256.0]), "weight_shape must be int64"),
        ("compressed", "weight_shape", torch.tensor([128, 0]), "positive N and K, not 128 and 0"),
        ("compressed", "weight_scale", torch.ones(127, 4).half(), r"weight_scale must be .* \[128, any\]"),
        ("compressed", "weight_scale", torch.ones(128, 3).half(), "weight_scale has 3 groups, which do not divide K=256"),
        ("compressed", "weight_zero_point", torch.zeros(128, 4, dtype=INT), r"weight_zero_point must be int32 \[16, 4\]"),
        ("compressed", "weight_g_idx", torch.full((256,), 9, dtype=INT), "weight_g_idx must be 0 to 3, but row 0 holds 9"),
    ],
)
def test_tensors_of_another_shape(make: Make, layout: str, part: str, bad: torch.Tensor | None, text: str) -> None:
    module: Any = UNPACK[layout]
    good = module.pack(make(low=1))
    module.unpack(good, name="mlp")
    with pytest.raises(PackingError, match=text) as caught:
        module.unpack(replace(good, **{part: bad}), name="mlp")
    assert re.search("'mlp'", str(caught.value))


def test_marlin_wants_a_sorted_group_index(make: Make) -> None:
    w = make(act_order=True)
    packed = marlin.pack(w)
    with pytest.raises(PackingError, match="g_idx must be sorted, 64 rows to each group"):
        marlin.unpack(replace(packed, g_idx=w.group_index))
    assert marlin.pack(replace(w, zeros=torch.full_like(w.zeros, 8))).kind == "uint4b8"
    with pytest.raises(PackingError, match="None for uint4b8"):
        marlin.unpack(replace(packed, kind="uint4b8"))
