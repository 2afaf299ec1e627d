"""The compressed-tensors library's own reading of what we write, and ours of what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qlab.checkpoint import read, write
from qlab.inputs import random_weight

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


@pytest.mark.parametrize("kind", [k for k in KINDS if "act_order" not in k], ids=lambda k: "-".join(k) or "plain")
def test_transformers_loads_a_tied_model(make_model, tmp_path, kind):
    """Not with act-order: transformers 5.23 drops ``weight_g_idx`` when it dequantises."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors and psutil")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = make_model(real=True, **kind)
    del model.others["lm_head.weight"], model.others["model.layers.0.self_attn.q_proj.bias"]
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            model.others[f"model.layers.{i}.{norm}.weight"] = torch.ones(64, dtype=torch.float16)
    model.config["tie_word_embeddings"] = True
    directory = model.write(tmp_path / "m", "compressed-tensors")
    assert AutoModelForCausalLM.from_pretrained(directory).lm_head.weight.shape == (24, 64)  # packed, save what is tied
    loaded = AutoModelForCausalLM.from_pretrained(directory, quantization_config=CompressedTensorsConfig(run_compressed=False))
    x = torch.randn((2, 128), generator=torch.Generator().manual_seed(0)).half()
    for module, w in model.weights.items():
        y = loaded.get_submodule(module)(x[:, : w.K])
        torch.testing.assert_close(y, (x[:, : w.K].float() @ w.dequantize(torch.float32)).half(), rtol=2e-3, atol=2e-3)
    assert torch.equal(loaded.lm_head.weight, model.others["model.embed_tokens.weight"])


def test_sizes_that_fill_no_int32(tmp_path):
    """K and N need not be multiples of 8 here; the filler is neither code nor zero point."""
    odd = {f"model.layers.0.mlp.{r}_proj": random_weight(36, 12, 18, seed=i) for i, r in enumerate(("gate", "up"))}
    symmetric = {"model.layers.0.mlp.down_proj": random_weight(36, 20, 18, symmetric=True)}
    c = read(write(tmp_path / "m", "compressed-tensors", odd | symmetric, {}, {}))
    assert all(w.equals((odd | symmetric)[n]) for n, w in c.weights.items())
    assert "stored values 1 to 15" in c.zero_points.evidence


def test_group_index_of_minus_one_means_none(make_model, tmp_path, edit):
    model = make_model(act_order=True)
    name = "model.layers.0.mlp.up_proj"
    plain = make_model().weights[name]
    model.weights[name] = plain
    directory = model.write(tmp_path / "m", "compressed-tensors")
    edit(directory / "model.safetensors", lambda t: t[f"{name}.weight_g_idx"].fill_(-1))
    assert read(directory).weight(name).equals(plain)


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
