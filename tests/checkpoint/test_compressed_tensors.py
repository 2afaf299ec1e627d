"""The compressed-tensors library's own reading of what we write, and ours of what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qlab.checkpoint import read

KINDS = [
    {"symmetric": True},
    {},
    {"act_order": True},
    {"symmetric": True, "act_order": True},
    {"group": -1, "symmetric": True},
    {"group": -1},
]


def scheme_of(directory):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors and psutil")
    from compressed_tensors.quantization import QuantizationConfig

    declared = json.loads((directory / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(declared).config_groups["group_0"]


def module_tensors(path, module):
    return {n.removeprefix(f"{module}."): t for n, t in load_file(path).items() if n.startswith(f"{module}.weight_")}


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k) or "plain")
def test_library_decompresses_to_the_same_values(make_model, tmp_path, kind):
    model = make_model(real=True, **kind)
    directory = model.write(tmp_path / "m", "compressed-tensors")
    scheme = scheme_of(directory)
    from compressed_tensors.compressors import PackedQuantizationCompressor

    for module, w in model.weights.items():
        got = PackedQuantizationCompressor.decompress(module_tensors(directory / "model.safetensors", module), scheme)
        assert torch.equal(got["weight"].t(), w.dequantize(torch.float16)), module


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(k) or "plain")
def test_reads_what_the_library_compresses(make_model, tmp_path, edit, kind):
    model = make_model(real=True, **kind)
    directory = model.write(tmp_path / "m", "compressed-tensors")
    scheme = scheme_of(directory)
    from compressed_tensors.compressors import PackedQuantizationCompressor

    def compress(tensors):
        for module, w in model.weights.items():
            state = {"weight": w.dequantize(torch.float32).t().contiguous(), "weight_scale": w.scales.t().contiguous()}
            if not kind.get("symmetric"):
                state["weight_zero_point"] = (w.zeros.t().to(torch.int8) - 8).contiguous()
            if kind.get("act_order"):
                state["weight_g_idx"] = w.group_index
            for part, t in PackedQuantizationCompressor.compress(state, scheme).items():
                tensors[f"{module}.{part}"] = t.contiguous()

    edit(directory / "model.safetensors", compress)
    assert all(w.equals(model.weights[n]) for n, w in read(directory).weights.items())
