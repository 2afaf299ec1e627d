"""Activations of a model run layer by layer, against the whole model in transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlab.errors import CheckpointError
from qlab.lab.activations import TAPS, layer_inputs, tokenize
from qlab.lab.model_files import ModelFiles
from qlab.lab.transformer import FAMILIES

TEXT = "def run(self, item):\n    return self.queue.get(item)\n\nThe module provides an interface to the file system.\n"
TOKENS = 24


@pytest.fixture
def copied(unquantised, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(unquantised, folder)
    return folder


def inputs(folder, ids=None):
    ids = tokenize(folder, TEXT, TOKENS) if ids is None else ids
    return {
        f"model.layers.{i}.{tap}": x
        for i, seen in layer_inputs(folder, ModelFiles(folder).dense, ids)
        for tap, x in seen.items()
    }


def by_hand(parameters, ids):
    """Llama as its paper has it, in float64: what each fused linear of the tiny model receives."""
    p = {name: t.double() for name, t in parameters.items()}
    heads, kv_heads, width = 4, 2, 32
    at = torch.arange(len(ids)).double()[:, None] * 10000.0 ** (-torch.arange(width // 2).double() / (width // 2))

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x, count):
        low, high = x.reshape(len(ids), count, width).transpose(0, 1).split(width // 2, -1)
        return torch.cat((low * at.cos() - high * at.sin(), high * at.cos() + low * at.sin()), -1)

    hidden, seen = p["model.embed_tokens.weight"][ids], {}
    for name in (f"model.layers.{i}" for i in range(2)):
        linear = {k.removeprefix(f"{name}."): v for k, v in p.items() if k.startswith(name)}
        x = seen[f"{name}.self_attn.qkv_proj"] = norm(hidden, linear["input_layernorm.weight"])
        q, k, v = (x @ linear[f"self_attn.{s}_proj.weight"].t() for s in "qkv")
        q, k = turned(q, heads), turned(k, kv_heads).repeat_interleave(heads // kv_heads, 0)
        v = v.reshape(len(ids), kv_heads, width).transpose(0, 1).repeat_interleave(heads // kv_heads, 0)
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        x = seen[f"{name}.self_attn.o_proj"] = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
        hidden = hidden + x @ linear["self_attn.o_proj.weight"].t()
        x = seen[f"{name}.mlp.gate_up_proj"] = norm(hidden, linear["post_attention_layernorm.weight"])
        gate, up = x @ linear["mlp.gate_proj.weight"].t(), x @ linear["mlp.up_proj.weight"].t()
        x = seen[f"{name}.mlp.down_proj"] = gate * gate.sigmoid() * up
        hidden = hidden + x @ linear["mlp.down_proj.weight"].t()
    return seen


def test_against_llama_written_by_hand(unquantised, parameters):
    got = inputs(unquantised)
    wanted = by_hand(parameters, tokenize(unquantised, TEXT, TOKENS))
    assert list(got) == list(wanted) == [f"model.layers.{i}.{tap}" for i in range(2) for tap in TAPS]
    for name, x in got.items():
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, wanted[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_whole_model(copied, family):
    """transformers' own forward pass, whose norms and rotations are float32; every parameter of each family random."""
    change_config(copied, model_type=family, head_dim=32)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(copied)).state_dict()
    assert any("q_proj.bias" in name for name in shapes) == (family == "qwen2")
    g = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(t.shape, generator=g) * t.shape[-1] ** -0.5 + (t.ndim == 1) for name, t in shapes.items()}
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float64).eval()
    seen = {}
    for name, module in model.named_modules():
        for tap, inner in TAPS.items():
            if name.endswith(inner):
                key = name.removesuffix(inner) + tap
                module.register_forward_pre_hook(lambda m, args, key=key: seen.__setitem__(key, args[0][0].clone()))
    with torch.no_grad():
        model(tokenize(copied, TEXT, TOKENS)[None])
    for name, x in inputs(copied).items():
        torch.testing.assert_close(x, seen[name].double(), rtol=1e-5, atol=1e-5)


def test_a_later_token_does_not_change_an_earlier_row(unquantised):
    ids = tokenize(unquantised, TEXT, TOKENS)
    other = ids.clone()
    other[-1] = (other[-1] + 1) % 2048
    a, b = inputs(unquantised, ids), inputs(unquantised, other)
    for name in a:
        torch.testing.assert_close(a[name][:-1], b[name][:-1], rtol=0, atol=1e-12)
        assert not torch.equal(a[name][-1], b[name][-1])


def test_shards_of_a_fused_layer_share_their_input(unquantised):
    """What lets one tap stand for q, k and v, and for gate and up."""
    model = AutoModelForCausalLM.from_pretrained(unquantised, dtype=torch.float64).eval()
    seen = {}
    for name, module in model.model.layers[0].named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0].clone()))
    with torch.no_grad():
        model(tokenize(unquantised, TEXT, TOKENS)[None])
    for one, two in (("q", "k"), ("q", "v")):
        assert torch.equal(seen[f"self_attn.{one}_proj"], seen[f"self_attn.{two}_proj"])
    assert torch.equal(seen["mlp.gate_proj"], seen["mlp.up_proj"])


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, r"tensor 'model.layers.0.* is \[128.*\], config.json asks for \[.*64.*\]"),
        ({"num_hidden_layers": 3}, r"tensor 'model.layers.2.* is missing"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not built like Llama"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not built like Llama"),
        ({"model_type": "gemma"}, "model_type 'gemma' is not built like Llama"),
        ({"model_type": "mistral", "sliding_window": 3}, "4 tokens exceed the sliding window; give --tokens 3 or fewer"),
        ({"model_type": "nothing"}, "config.json: "),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"hidden_size": "many"}, "config.json: "),
    ],
)
def test_a_model_that_does_not_fit_its_configuration(copied, changes, said):
    change_config(copied, **changes)
    with pytest.raises(CheckpointError, match=said) as e:
        inputs(copied, torch.arange(4))
    assert "\n" not in str(e.value)


def test_a_tokenizer_of_another_model(copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:10].clone()
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the tokenizer gives token \d+, the embedding has 10 rows"):
        inputs(copied)


@pytest.mark.parametrize("content", [None, "{bad", '{"version": "1.0", "model": {"type": "none"}}', "[]"])
def test_no_usable_tokenizer(copied, content):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    if content is not None:
        (copied / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="no usable tokenizer") as e:
        tokenize(copied, TEXT, 4)
    assert "\n" not in str(e.value)


def test_the_reader_keeps_its_gradients(unquantised):
    """Between layers, and where two models are read in turn and neither to its end."""
    ids = tokenize(unquantised, TEXT, 4)
    one, other = (layer_inputs(unquantised, ModelFiles(unquantised).dense, ids) for _ in range(2))
    for found in (one, other):
        _, seen = next(found)
        assert torch.is_grad_enabled()
        assert not any(x.requires_grad for x in seen.values())
    one.close()
    other.close()
    assert torch.is_grad_enabled()


def test_a_short_text(unquantised):
    with pytest.raises(CheckpointError, match="the text has only 3 tokens; give a longer --text or --tokens 3"):
        tokenize(unquantised, "a b", 100)


def test_code_in_a_checkpoint_is_not_run(copied):
    (copied / "own.py").write_text("raise SystemExit('ran')")
    change_config(copied, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inputs(copied, torch.arange(4))
