"""vLLM's fused linears out of a checkpoint's projections."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab.checkpoint import fused, fused_weight, read
from qlab.checkpoint.llama import forward_order
from qlab.errors import CheckpointError


@pytest.mark.parametrize(("method", "act_order"), [("awq", False), ("gptq", True), ("compressed-tensors", True)])
def test_fused_layers_are_the_shards_side_by_side(make_model, tmp_path, method, act_order):
    model = make_model(act_order=act_order, scaled=method == "awq")
    layers = {w.name: w for w in fused(read(model.write(tmp_path / "m", method)))}
    units = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert list(layers) == [f"model.layers.{i}.{unit}" for i in range(2) for unit in units]
    qkv = layers["model.layers.1.self_attn.qkv_proj"]
    assert fused_weight(read(tmp_path / "m"), qkv.name).equals(qkv)
    start = 0
    for shard in ("q", "k", "v"):
        w = model.weights[f"model.layers.1.self_attn.{shard}_proj"]
        assert torch.equal(qkv.codes[:, start : start + w.N], w.codes)
        assert torch.equal(qkv.zeros[:, start : start + w.N], w.zeros)
        assert torch.equal(qkv.scales[:, start : start + w.N], w.scales)
        assert torch.equal(qkv.group_index, w.group_index)
        start += w.N
    assert start == qkv.N
    assert (qkv.input_scale is not None) == (method == "awq")


def test_order_is_that_of_the_forward_pass():
    roles = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    roles += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names = [f"model.layers.{i}.{r}" for i in (0, 2, 10) for r in roles] + ["lm_head"]
    shuffled = sorted(names)
    assert shuffled != names
    assert sorted(shuffled, key=forward_order) == names


def test_shards_with_different_group_indices_are_refused(make_model, tmp_path):
    model = make_model(act_order=True)
    name = "model.layers.0.self_attn.k_proj"
    index = model.weights[name].group_index.flip(0).contiguous()
    model.weights[name] = replace(model.weights[name], group_index=index)
    c = read(model.write(tmp_path / "m", "gptq"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*k_proj.*q_proj.*group indices differ, first at row \d+"):
        list(fused(c))


def test_half_quantised_layer_is_refused(make_model, tmp_path):
    model = make_model()
    del model.weights["model.layers.1.self_attn.k_proj"]
    c = read(model.write(tmp_path / "m", "gptq"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj', a part of .* is not quantised"):
        list(fused(c))
