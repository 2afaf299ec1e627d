"""Inputs as a language model makes them: correlated features, a few channels far larger than the rest."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlab.inputs import random_activations

SHIPPED = Path(__file__).parents[2] / "qlab" / "data"


@pytest.fixture(scope="session")
def activations():
    """rows, K and seed to float64 X [rows, K] of rank 24 plus noise; every 16th channel eight times larger."""

    def make(rows, k, seed=0):
        features = random_activations(rows, 24, dtype=torch.float32, seed=seed).double()
        mixing = random_activations(24, k, dtype=torch.float32, seed=seed + 1).double()
        noise = random_activations(rows, k, dtype=torch.float32, seed=seed + 2).double()
        x = features @ mixing / 4 + noise / 2
        x[:, 5::16] *= 8
        return x

    return make


@pytest.fixture(scope="session")
def matrix():
    """K, N and seed to a float64 weight [K, N] whose columns differ in size."""

    def make(k, n, seed=0):
        w = random_activations(k, n, dtype=torch.float32, seed=seed + 100).double() / 32
        return w * torch.tensor([0.25, 1.0, 2.0, 0.5], dtype=torch.float64).repeat(n)[:n]

    return make


@pytest.fixture
def tiny():
    """kv_heads to a small untrained Llama in float64, two layers, hidden 64, 4 heads; the same one every time."""

    def make(kv_heads=2):
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config).double().eval()
        with torch.no_grad():
            for i, (name, p) in enumerate(model.named_parameters()):
                drawn = random_activations(p.numel(), 1, dtype=torch.float32, seed=i).double().reshape(p.shape)
                p.copy_(1 + drawn / 4 if "norm" in name else drawn / 8)
        return model

    return make


@pytest.fixture(scope="session")
def token_batches():
    """Calibration tokens for the small Llama: 4 batches [4, 32]."""
    g = torch.Generator().manual_seed(7)
    return tuple(torch.randint(0, 96, (16, 32), generator=g).split(4))


@pytest.fixture(scope="session")
def shipped():
    """Folder of the shipped model and texts; skips where the weights are absent."""
    if not (SHIPPED / "model" / "fp16" / "model.safetensors").is_file():
        pytest.skip("the shipped model is not in qlab/data/model/fp16")
    return SHIPPED
