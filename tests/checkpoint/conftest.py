"""A small Llama-shaped model of re-creatable INT4 weights, and ways to damage a checkpoint written from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlab.checkpoint import write
from qlab.inputs import random_weight
from qlab.weights import Int4Weight

HIDDEN, KV, INTER, LAYERS, VOCAB = 64, 32, 128, 2, 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTER),
    "mlp.up_proj": (HIDDEN, INTER),
    "mlp.down_proj": (INTER, HIDDEN),
}
INPUT_OF = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


@dataclass(frozen=True)
class Model:
    weights: dict[str, Int4Weight]
    others: dict[str, torch.Tensor]
    config: dict

    def write(self, directory, method, **options):
        return write(directory, method, self.weights, self.others, self.config, **options)


def trained(k, n, group, *, symmetric, dtype, seed):
    """Round to nearest of Gaussian values, min-max per group: codes centre on zero as those of a trained weight do."""
    w = torch.randn((k // group, group, n), generator=torch.Generator().manual_seed(seed)) * 0.02
    if symmetric:
        scale = (w.abs().amax(1) / 7.5).to(dtype).float()
        zero = torch.full_like(scale, 8)
    else:
        scale = ((w.amax(1) - w.amin(1)) / 15).to(dtype).float()
        zero = (-w.amin(1) / scale).round().clamp(1, 15)
    codes = (w / scale[:, None] + zero[:, None]).round().clamp(0, 15)
    index = torch.arange(k, dtype=torch.int32) // group
    return Int4Weight(codes.reshape(k, n).to(torch.uint8), zero.to(torch.uint8), scale.to(dtype), index)


@pytest.fixture
def make_model():
    def make(*, group=32, symmetric=False, act_order=False, dtype=torch.float16, scaled=False, real=False) -> Model:
        weights = {}
        for layer in range(LAYERS):
            orders = [torch.randperm(INTER, generator=torch.Generator().manual_seed(10 * layer + i)) for i in range(4)]
            for i, (role, (k, n)) in enumerate(SHAPES.items()):
                name, seed = f"model.layers.{layer}.{role}", 100 * layer + i
                if real:
                    w = trained(k, n, k if group == -1 else group, symmetric=symmetric, dtype=dtype, seed=seed)
                else:
                    w = random_weight(k, n, group, dtype=dtype, symmetric=symmetric, seed=seed)
                order = orders[INPUT_OF[role.split(".")[1]]]  # shards that share an input share its order and scale
                if act_order:
                    rows = order[order < k]
                    w = replace(w, codes=w.codes[rows], group_index=w.group_index[rows])
                if scaled:
                    w = replace(w, input_scale=(order[:k].float() + 1) / 64)
                weights[name] = replace(w, name=name)
        g = torch.Generator().manual_seed(9)
        others = {
            "model.embed_tokens.weight": torch.randn((VOCAB, HIDDEN), generator=g).to(dtype),
            "model.norm.weight": torch.ones(HIDDEN, dtype=dtype),
            "lm_head.weight": torch.randn((VOCAB, HIDDEN), generator=g).to(dtype),
            "model.layers.0.self_attn.q_proj.bias": torch.randn(HIDDEN, generator=g).to(dtype),
        }
        return Model(weights, others, dict(CONFIG))

    return make


@pytest.fixture
def edit():
    """Rewrite the tensors of a safetensors file through a function, metadata kept."""

    def change(path, function):
        tensors = {n: t.clone() for n, t in load_file(path).items()}
        function(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return change
