"""Records what vLLM's packing helpers make of re-creatable weights: digests in vllm_golden.json, beside this file.

Run from the repository's root with vLLM installed, or with its wheel or source folder named:

    PYTHONPATH=. QLAB_VLLM_SOURCE=vllm-0.20.2-….whl python tests/packing/record_vllm_golden.py
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import vllm_helpers
from torch import Tensor

from qlab.inputs import random_weight
from qlab.weights import tensor_bytes

GOLDEN = Path(__file__).with_name("vllm_golden.json")
SHAPES = [(128, 64, 32), (256, 128, 64), (384, 320, 128), (256, 192, 256), (1024, 512, 128), (128, 256, 128)]


def vllm_outputs(vllm: vllm_helpers.Helpers, case: dict[str, Any]) -> dict[str, Tensor]:
    """Every packed tensor that the helpers can make of a case's weight, rows sorted by group in stable order."""
    w = random_weight(**case | {"dtype": getattr(torch, case["dtype"])})
    codes, zeros = w.codes.int(), w.zeros.int()
    rows = codes[torch.argsort(w.group_index, stable=True)]
    tile = vllm.marlin_test.get_weight_perm(4)
    found = {
        "gptq.qweight": vllm.quant.gptq_pack(codes, 4, w.K, w.N),
        "gptq.qzeros": vllm.quant.pack_cols(zeros - 1, 4, w.groups, w.N),
        "gptq.qzeros.v2": vllm.quant.pack_cols(zeros, 4, w.groups, w.N),
        "marlin.qweight": vllm.marlin_test.marlin_weights(rows, w.K, w.N, 4, tile),
        "marlin.scales": vllm.marlin.marlin_permute_scales(w.scales, w.K, w.N, w.group_size),
        "marlin.zeros": vllm.marlin.marlin_zero_points(zeros, w.groups, w.N, 4),
        "marlin.bias": vllm.marlin.marlin_permute_bias(w.scales[0]),
    }
    if not w.act_order:
        found["awq.qweight"] = vllm.quant.awq_pack(codes, 4, w.K, w.N)
        found["awq.qzeros"] = vllm.quant.awq_pack(zeros, 4, w.groups, w.N)
    return found


def record() -> None:
    source = vllm_helpers.find()
    if source is None:
        sys.exit("vLLM's sources are not at hand: install vllm or set QLAB_VLLM_SOURCE to its wheel or unpacked folder")
    vllm = vllm_helpers.load(source)
    cases = []
    for seed, (k, n, group_size) in enumerate(SHAPES):
        for act_order in (False, True) if group_size < k else (False,):
            dtype = ("float16", "bfloat16")[seed % 2]
            case = {"k": k, "n": n, "group_size": group_size, "dtype": dtype, "act_order": act_order, "seed": seed}
            weight = random_weight(**case | {"dtype": getattr(torch, dtype)})
            digests = {p: hashlib.sha256(tensor_bytes(t)).hexdigest() for p, t in vllm_outputs(vllm, case).items()}
            cases.append({"case": case, "weight": weight.digest(), "sha256": digests})
    beside = GOLDEN.with_suffix(".json.new")
    beside.write_text(json.dumps({"vllm": vllm.version, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, GOLDEN)


if __name__ == "__main__":
    record()
