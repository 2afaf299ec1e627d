"""Our packings against recorded digests of vLLM's, on any machine. Recorded by record_vllm_golden.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlab.inputs import random_weight
from qlab.packing import awq, gptq, marlin
from qlab.weights import Int4Weight, tensor_bytes

GOLDEN = json.loads(Path(__file__).with_name("vllm_golden.json").read_text(encoding="utf-8"))


def our_outputs(w: Int4Weight) -> dict[str, Tensor]:
    g, m = gptq.pack(w), marlin.pack(w, "uint4")
    assert m.zeros is not None
    found = {
        "gptq.qweight": g.qweight,
        "gptq.qzeros": g.qzeros,
        "gptq.qzeros.v2": gptq.pack(w, 2).qzeros,
        "marlin.qweight": m.qweight,
        "marlin.scales": m.scales,
        "marlin.zeros": m.zeros,
        "marlin.bias": marlin.permute_bias(w.scales[0]),
    }
    if not w.act_order:
        a = awq.pack(w)
        found |= {"awq.qweight": a.qweight, "awq.qzeros": a.qzeros}
    return found


@pytest.mark.parametrize("golden", GOLDEN["cases"], ids=lambda g: "-".join(str(v) for v in g["case"].values()))
def test_same_bits_as_vllm(golden: dict[str, Any]) -> None:
    case = golden["case"]
    w = random_weight(**case | {"dtype": getattr(torch, case["dtype"])})
    assert w.digest() == golden["weight"], "random_weight makes another weight than was recorded; record again"
    ours = {part: hashlib.sha256(tensor_bytes(t)).hexdigest() for part, t in our_outputs(w).items()}
    assert ours == golden["sha256"]


def test_cases_cover_orders_dtypes_and_whole_columns() -> None:
    cases = [g["case"] for g in GOLDEN["cases"]]
    assert {c["act_order"] for c in cases} == {False, True}
    assert {c["dtype"] for c in cases} == {"float16", "bfloat16"}
    assert {32, 64, 128} <= {c["group_size"] for c in cases if c["group_size"] < c["k"]}
    assert any(c["group_size"] == c["k"] for c in cases)
