"""Kernels with planted behaviour, and plans that run them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qlab import environment, hardware
from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, kernel
from qlab.inputs import random_activations, random_weight
from qlab.lab.run import SAME, Layer, Plan, run
from tests.tiny_llama import awq, gptq, parameters, tokenizer_files, unquantised, write_checkpoint

__all__ = ["awq", "gptq", "parameters", "tokenizer_files", "unquantised", "write_checkpoint"]


class Planted(Kernel):
    """The float64 reference with a change to its output, its support or its packing."""

    layout, portable = "none", True

    def __init__(self, name="planted", change=lambda y, call: y, support=YES, pack_error=None):
        self.name, self.change, self.support, self.pack_error = name, change, support, pack_error
        self.calls = 0

    def supports(self, problem: Problem, device: torch.device) -> Support:
        return self.support

    def pack(self, weight):
        if self.pack_error:
            raise self.pack_error
        return Packed({"weight": weight.dequantize(weight.dtype)}, Problem.of(weight, 0))

    def run(self, x, packed):
        self.calls += 1
        return self.change(kernel("reference.float64").run(x, packed).clone(), self.calls)


@pytest.fixture
def planted():
    return Planted


def random_layers(count=2, k=512, n=64, m=5, seed=0):
    for i in range(count):
        name = f"model.layers.{i}.mlp.down_proj"
        weight = random_weight(k, n * (i + 1), 32, symmetric=True, seed=seed + i, name=name)
        yield Layer(name, {SAME: weight}, {SAME: random_activations(m, k, seed=seed + i)})


@pytest.fixture
def make_layers():
    return random_layers


@pytest.fixture
def plan():
    def make(*kernels, **changes):
        chosen = [kernel(k) if isinstance(k, str) else k for k in kernels]
        base = Plan(chosen, hardware.gpu("h100"), torch.device("cpu"), SAME, "tiny", (), torch.float16)
        return replace(base, **changes)

    return make


@pytest.fixture(scope="session")
def here():
    return environment.collect(details=False)


@pytest.fixture
def result(plan, make_layers, here):
    """Run kernels (names or objects) over two random layers."""

    def go(*kernels, layers=None, **changes):
        return run(plan(*kernels, **changes), make_layers() if layers is None else layers, here)

    return go
