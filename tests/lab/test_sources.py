"""Where layers come from: one weight for all, each checkpoint its own with x' = RN(x / s), or a shape."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlab import checkpoint
from qlab.errors import CheckpointError
from qlab.lab import sources
from qlab.lab.model_files import ModelFiles
from qlab.weights import fuse

TEXT = "def run(self, item):\n    return self.queue.get(item)\n\nThe module provides an interface to the file system.\n"
NAMES = [
    f"model.layers.{i}.{n}"
    for i in range(2)
    for n in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
]


def request(tokens=6, layers="*", dtype=torch.float16):
    return sources.Request(dtype, tokens, TEXT, layers)


def nearest_fp16(value: Fraction) -> float:
    """Round to nearest, ties to even, from the format's definition (values within range)."""
    exponent = -14
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - 10)
    return float(round(value / step) * step)  # Python's round takes ties to even


def test_same_gives_the_checkpoints_fused_weights(gptq, unquantised):
    layers = list(sources.same_weights(gptq, request(), original=unquantised))
    c = checkpoint.read(gptq)
    assert [x.name for x in layers] == NAMES
    for layer in layers:
        assert layer.weights.keys() == layer.inputs.keys() == {"same"}
        assert layer.inputs["same"].shape == (6, layer.weights["same"].K)
        assert layer.expected is None
    shards = [c.weight(f"model.layers.1.self_attn.{p}_proj") for p in "qkv"]
    assert layers[4].weights["same"].equals(fuse(shards))
    assert layers[7].weights["same"].equals(c.weight("model.layers.1.mlp.down_proj"))


def test_own_divides_x_by_the_input_scale_and_rounds_once(write_checkpoint, gptq, unquantised, tmp_path):
    awq = write_checkpoint(tmp_path / "awq", "awq", scaled=True)
    for layer in sources.own_weights(awq, gptq, request(), original=unquantised):
        s = layer.weights["awq"].input_scale
        x, own = layer.inputs["gptq"], layer.inputs["awq"]
        assert own.dtype == x.dtype == torch.float16
        for k in range(len(s)):
            for m in range(6):
                assert float(own[m, k]) == nearest_fp16(Fraction(float(x[m, k])) / Fraction(float(s[k]))), (layer.name, m, k)
        assert not layer.weights["awq"].symmetric
        assert layer.weights["gptq"].symmetric


def test_same_with_an_awq_checkpoint_feeds_what_it_expects(write_checkpoint, unquantised, tmp_path):
    awq = write_checkpoint(tmp_path / "awq", "awq", scaled=True)
    plain = list(sources.same_weights(unquantised, request(), original=unquantised))
    for layer, raw in zip(sources.same_weights(awq, request(), original=unquantised), plain, strict=True):
        assert torch.equal(layer.inputs["same"], layer.weights["same"].scaled_input(raw.inputs["same"]))


def test_own_without_kept_scales_runs_the_awq_checkpoint_for_its_inputs(awq, gptq, unquantised):
    alone = list(sources.same_weights(awq, request()))
    for layer, mine in zip(sources.own_weights(awq, gptq, request(), original=unquantised), alone, strict=True):
        assert torch.equal(layer.inputs["awq"], mine.inputs["same"])


def test_x_of_another_model_needs_the_scales(awq, unquantised):
    with pytest.raises(CheckpointError, match=r"--original: .* keeps no AWQ input scales"):
        next(iter(sources.same_weights(awq, request(), original=unquantised)))


@pytest.fixture
def copied(gptq, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(gptq, folder)
    return folder


def rewrite(folder, change):
    tensors = {name: change(name, t.clone()) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_scales_are_rounded_once_to_the_dtype_asked_for(copied, dtype):
    tie = 1 + 2.0**-8 + 2.0**-20  # by way of fp16 it would be a tie of bf16 and lose the last bit
    rewrite(copied, lambda name, t: torch.full(t.shape, tie) if name.endswith("scales") else t)
    scales = next(iter(sources.same_weights(copied, request(dtype=dtype)))).weights["same"].scales
    assert torch.equal(scales, torch.full(scales.shape, 1 + 2.0**-7 if dtype == torch.bfloat16 else 1 + 2.0**-8).to(dtype))


def test_a_quantisation_declared_beside_the_configuration(copied, gptq):
    config = json.loads((copied / "config.json").read_text())
    (copied / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (copied / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.qkv_proj"
    assert ModelFiles(copied).weight(name).equals(ModelFiles(gptq).weight(name))


def test_shards_that_differ_in_their_group_index_are_named_with_the_file(copied):
    rewrite(copied, lambda name, t: t.flip(0) if name.endswith("0.self_attn.k_proj.g_idx") else t)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot fuse .*k_proj.*their group indices differ"):
        ModelFiles(copied).weight("model.layers.0.self_attn.qkv_proj")


def test_own_wants_each_checkpoint_in_its_place(awq, gptq):
    with pytest.raises(CheckpointError, match=r"--awq .*: its method is gptq; name a checkpoint of awq"):
        list(sources.own_weights(gptq, awq, request()))


def test_layers_are_chosen_by_glob(gptq, unquantised):
    for glob, wanted in (("*.1.*", NAMES[4:]), ("*down_proj", NAMES[3::4]), ("*", NAMES), ("none", [])):
        asked = request(layers=glob)
        got = [x.name for x in sources.same_weights(gptq, asked, original=unquantised)]
        assert got == wanted
        assert sources.layer_count(gptq, asked) == len(wanted)


def test_a_choice_of_layers_changes_no_bit(gptq):
    everything = {x.name: x.inputs["same"] for x in sources.same_weights(gptq, request())}
    for layer in sources.same_weights(gptq, request(layers="*.1.mlp*")):
        assert torch.equal(layer.inputs["same"], everything[layer.name])


def test_trusted_must_be_the_same_model(gptq, write_checkpoint, unquantised):
    with pytest.raises(CheckpointError, match=r"--trusted: .* groups of 128, the checkpoint's is .* groups of 32"):
        list(sources.same_weights(gptq, request(), trusted=unquantised))
    layer = next(iter(sources.same_weights(gptq, request(), trusted=gptq)))
    assert layer.expected["same"].equals(layer.weights["same"])
    assert [width for _, width in layer.shards] == [128, 64, 64]


def test_bf16_rounds_scales_and_activations(gptq, unquantised):
    half = list(sources.same_weights(gptq, request(), original=unquantised))
    for a, b in zip(half, sources.same_weights(gptq, request(dtype=torch.bfloat16), original=unquantised), strict=True):
        assert b.inputs["same"].dtype == b.weights["same"].dtype == torch.bfloat16
        assert torch.equal(b.weights["same"].scales, a.weights["same"].scales.bfloat16())


def test_shapes_are_re_creatable_and_seeded():
    def make(mode="same", seed=0):
        return next(iter(sources.from_shape((3, 64, 16), 32, torch.float16, seed, mode)))

    a, b, c = make(), make(), make(seed=1)
    assert a.weights["same"].equals(b.weights["same"])
    assert torch.equal(a.inputs["same"], b.inputs["same"])
    assert not a.weights["same"].equals(c.weights["same"])
    assert not torch.equal(a.inputs["same"], c.inputs["same"])
    own = make("own")
    assert own.weights["gptq"].equals(a.weights["same"])
    assert not own.weights["awq"].symmetric


def test_an_unquantised_model_is_rounded_to_nearest(unquantised, parameters):
    model = ModelFiles(unquantised)
    assert model.method == "unquantised"
    w = model.weight("model.layers.0.self_attn.qkv_proj")
    dense = torch.cat([parameters[f"model.layers.0.self_attn.{p}_proj.weight"].t() for p in "qkv"], 1).double()
    assert w.symmetric
    assert w.group_size == 128
    off = (w.dequantize(torch.float64) - dense).abs() / w.scales.double().repeat_interleave(128, 0)
    assert float(off.max()) <= 0.5 + 2.0**-8  # the grid's end lies half a step and a rounding of the scale away
    assert model.shards("model.layers.0.self_attn.qkv_proj")[1] == ("model.layers.0.self_attn.k_proj", 64)


def test_a_path_without_a_name_is_described_by_its_folder(gptq, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(gptq)
    assert ModelFiles(Path()).describe().startswith("gptq (gptq): zero points stored minus one, as declared")
    with pytest.raises(CheckpointError, match="is not a directory; name one"):
        ModelFiles(gptq / "none")
