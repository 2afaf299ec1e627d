"""A tiny Llama with random weights and the shipped tokenizer: in fp16, rounded to nearest as AWQ and GPTQ checkpoints, changed.

A conftest.py takes these fixtures by importing them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlab import checkpoint
from qlab.data import model_directory
from qlab.errors import CheckpointError
from qlab.quantize import rtn

HIDDEN, KV, INTER, LAYERS, VOCAB = 128, 64, 256, 2, 2048
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "torch_dtype": "float16",
}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTER, HIDDEN),
    "mlp.up_proj": (INTER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTER),
}
"""Module to the shape [N, K] of its parameter."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="session")
def tokenizer_files():
    try:
        folder = model_directory("fp16")
    except CheckpointError as absent:
        pytest.skip(str(absent))
    return {name: folder / name for name in TOKENIZER}


@pytest.fixture(scope="session")
def parameters():
    """Every parameter of the tiny model by its Hugging Face name, fp16."""
    g = torch.Generator().manual_seed(7)
    out = {"model.embed_tokens.weight": torch.randn((VOCAB, HIDDEN), generator=g), "model.norm.weight": torch.ones(HIDDEN)}
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"model.layers.{i}.{norm}.weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=g)
        for name, shape in LINEARS.items():
            out[f"model.layers.{i}.{name}.weight"] = torch.randn(shape, generator=g) / shape[1] ** 0.5
    out["lm_head.weight"] = torch.randn((VOCAB, HIDDEN), generator=g)
    return {name: t.half() for name, t in out.items()}


@pytest.fixture(scope="session")
def unquantised(parameters, tokenizer_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "fp16"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})
    for name, path in tokenizer_files.items():
        shutil.copy(path, folder / name)
    return folder


@pytest.fixture(scope="session")
def write_checkpoint(parameters, tokenizer_files):
    """Write the tiny model, rounded to nearest in groups of 32, as ``awq`` (asymmetric) or ``gptq`` (symmetric)."""

    def write(folder, method, *, scaled=False):
        linear = {name for name in parameters if name.removesuffix(".weight").endswith(tuple(LINEARS))}
        weights = {}
        for name in sorted(linear):
            module = name.removesuffix(".weight")
            w = rtn.quantize(parameters[name].float().t(), 32, symmetric=method == "gptq", name=module)
            if scaled:  # one scale for every module that shares an input
                w = replace(w, input_scale=(torch.arange(w.K).float() % 37 + 5) / 16)
            weights[module] = w
        others = {name: t for name, t in parameters.items() if name not in linear}
        return checkpoint.write(folder, method, weights, others, CONFIG, extra_files=tokenizer_files)

    return write


@pytest.fixture(scope="session")
def awq(write_checkpoint, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "awq", "awq")


@pytest.fixture(scope="session")
def gptq(write_checkpoint, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "gptq", "gptq")


@pytest.fixture(scope="session")
def changed(tmp_path_factory):
    """A copy of a checkpoint whose tensors and configuration went through functions."""

    def make(folder, tensors=lambda t: None, config=lambda c: None):
        copy = tmp_path_factory.mktemp("models") / "copy"
        shutil.copytree(folder, copy)
        file = next(copy.glob("*.safetensors"))
        found = load_file(file)
        tensors(found)
        save_file(found, file, metadata={"format": "pt"})
        plain = json.loads((copy / "config.json").read_text())
        config(plain)
        (copy / "config.json").write_text(json.dumps(plain))
        return copy

    return make


@pytest.fixture(scope="session")
def relative(awq, changed):
    """The tiny model under another family's name, with the tensors that family has besides."""

    def make(family):
        def grow(t):
            g = torch.Generator().manual_seed(3)
            for i in range(LAYERS):
                for shard, width in {"q": HIDDEN, "k": HIDDEN // 2, "v": HIDDEN // 2}.items() if family == "qwen2" else ():
                    t[f"model.layers.{i}.self_attn.{shard}_proj.bias"] = torch.randn(width, generator=g).half()
                for norm in ("q_norm", "k_norm") if family == "qwen3" else ():
                    t[f"model.layers.{i}.self_attn.{norm}.weight"] = (1 + 0.1 * torch.randn(32, generator=g)).half()

        name = f"{family.capitalize()}ForCausalLM"
        return changed(awq, grow, lambda c: c.update(model_type=family, architectures=[name], head_dim=32))

    return make
