"""Small checkpoints of one model, a deep one among them, and pairs of paths on them."""

from __future__ import annotations

import pytest
import torch

from qlab.engine.path import Path
from qlab.layers.pair import open_pair
from qlab.layers.run import Plan, run
from tests.tiny_llama import (
    LAYERS,
    awq,
    changed,
    gptq,
    parameters,
    relative,
    tokenizer_files,
    unquantised,
    write_checkpoint,
)

__all__ = ["awq", "changed", "gptq", "parameters", "relative", "tokenizer_files", "unquantised", "write_checkpoint"]

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
def deep(awq, changed):
    """Six decoder layers, the tiny model's in turn."""

    def deepen(t):
        layers = [{n: v for n, v in t.items() if n.startswith(f"model.layers.{i}.")} for i in range(LAYERS)]
        for i in range(LAYERS, 6):
            old = f"model.layers.{i % LAYERS}."
            t.update({n.replace(old, f"model.layers.{i}."): v.clone() for n, v in layers[i % LAYERS].items()})

    return changed(awq, deepen, lambda c: c.update(num_hidden_layers=6))
