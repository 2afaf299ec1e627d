"""The linear layers that the benchmark times: one decoder block each of three models, fused as vLLM serves them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlab.errors import QlabError
from qlab.weights import Int4Weight, sequential_groups

BLOCK = "block"
"""Name of the four layers of a decoder block together, in one CUDA graph."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)


@dataclass(frozen=True)
class Layer:
    """One linear, ``y[M, N] = x[M, K] @ w[K, N]``."""

    model: str
    name: str
    K: int
    N: int

    @property
    def key(self) -> str:
        return f"{self.model}.{self.name}"


def _model(model: str, qkv: tuple[int, int], o: tuple[int, int], gate_up: tuple[int, int], down: tuple[int, int]):
    shapes = {"qkv": qkv, "o": o, "gate_up": gate_up, "down": down}
    return tuple(Layer(model, name, k, n) for name, (k, n) in shapes.items())


MODELS: dict[str, tuple[Layer, ...]] = {
    "llama-3-8b": _model("llama-3-8b", (4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
    "qwen2.5-7b": _model("qwen2.5-7b", (3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)),
    "llama-70b": _model("llama-70b", (8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)),
}
"""The layers of each model's decoder block, in the order in which they run."""


def choose(text: str) -> tuple[Layer, ...]:
    """Layers by comma-separated names: ``llama-3-8b`` (all four), ``llama-70b.down``, or ``K x N`` as ``4096x4096``.

    Raises QlabError for a name that is none of these.
    """
    known = {layer.key: layer for layers in MODELS.values() for layer in layers}
    chosen: dict[str, Layer] = {}
    for part in (p.strip() for p in text.split(",")):
        k, cross, n = part.partition("x")
        if part in MODELS:
            found = MODELS[part]
        elif part in known:
            found = (known[part],)
        elif cross and k.isdigit() and n.isdigit() and int(k) > 0 and int(n) > 0:
            found = (Layer("shape", part, int(k), int(n)),)
        else:
            names = ", ".join((*MODELS, *known))
            raise QlabError(f"--layers {part!r} is neither K x N, as 4096x4096, nor one of {names}")
        chosen |= {layer.key: layer for layer in found}
    return tuple(chosen.values())


def random_layer(layer: Layer, group: int, dtype: torch.dtype, symmetric: bool, device: torch.device, seed: int) -> Int4Weight:
    """A weight drawn on ``device``: every code, zero points 1 to 15 (8 where symmetric), scales of many values.

    Drawn where it is used, since the CPU takes seconds for the largest. The device's generator differs from the CPU's, so
    that two kinds of device do not draw the same weight.
    """
    k, n = layer.K, layer.N
    group = k if group == -1 else group
    if group < 1 or k % group:
        raise QlabError(f"--group {group} does not divide K={k} of {layer.key}")
    generator, groups = torch.Generator(device).manual_seed(seed), k // group
    codes = torch.randint(0, 16, (k, n), generator=generator, dtype=torch.uint8, device=device)
    if symmetric:
        zeros = torch.full((groups, n), 8, dtype=torch.uint8, device=device)
    else:
        zeros = torch.randint(1, 16, (groups, n), generator=generator, dtype=torch.uint8, device=device)
    # Representable values from 2^-8 up to 2^-6, each as often as another: a wrong group or column has another scale.
    start, stop = (int(torch.tensor(2.0**e, dtype=dtype).view(torch.int16)) for e in (-8, -6))
    steps = torch.randint(start, stop, (groups, n), generator=generator, dtype=torch.int16, device=device)
    return Int4Weight(codes, zeros, steps.view(dtype), sequential_groups(k, group, device), name=layer.key)


def random_rows(m: int, k: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """x [m, k], near N(0, 1), drawn on ``device``."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn((m, k), generator=generator, dtype=torch.float32, device=device).to(dtype)
