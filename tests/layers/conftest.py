"""Small checkpoints of one model: a deep one, relatives of Llama, and copies with a tensor changed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlab.engine.path import Path
from qlab.layers.pair import open_pair
from qlab.layers.run import Plan, run
from tests.tiny_llama import HIDDEN, LAYERS, awq, gptq, parameters, tokenizer_files, unquantised, write_checkpoint

__all__ = ["awq", "gptq", "parameters", "tokenizer_files", "unquantised", "write_checkpoint"]

CPU = torch.device("cpu")
IDS = (40, 2000, 7, 7, 900, 31, 77, 1200, 5)


@pytest.fixture(scope="session")
def opened():
    """Two paths, and a checkpoint for both or each, as a pair."""

    def make(a, b, folder, other=None, **options):
        return open_pair(Path.parse(a), Path.parse(b), folder, other or folder, CPU, **options)

    return make


@pytest.fixture(scope="session")
def found(opened):
    """The result of a pair."""

    def make(a, b, folder, other=None, ids=IDS, **options):
        return run(opened(a, b, folder, other), Plan(ids, **options))

    return make


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
def deep(awq, changed):
    """Six decoder layers, the tiny model's in turn."""

    def deepen(t):
        layers = [{n: v for n, v in t.items() if n.startswith(f"model.layers.{i}.")} for i in range(LAYERS)]
        for i in range(LAYERS, 6):
            old = f"model.layers.{i % LAYERS}."
            t.update({n.replace(old, f"model.layers.{i}."): v.clone() for n, v in layers[i % LAYERS].items()})

    return changed(awq, deepen, lambda c: c.update(num_hidden_layers=6))


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
