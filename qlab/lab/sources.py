"""Where the lab's layers come from: the shipped model, checkpoints, an unquantised model, or a shape."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlab.errors import CheckpointError
from qlab.inputs import random_activations, random_weight
from qlab.lab.activations import TAPS, layer_inputs, tokenize
from qlab.lab.model_files import ModelFiles
from qlab.lab.run import SAME, Layer
from qlab.weights import Int4Weight, round_once


@dataclass(frozen=True)
class Request:
    """Which activations, in which dtype, of which layers."""

    dtype: torch.dtype
    tokens: int
    text: str
    layers: str = "*"
    """Glob over layer names."""


def from_shape(shape: tuple[int, int, int], group_size: int, dtype: torch.dtype, seed: int, mode: str) -> Iterator[Layer]:
    """One random layer ``(M, K, N)``, re-creatable from its seed.

    In mode ``same`` it is symmetric, which every kernel can hold; in mode ``own`` AWQ gets an asymmetric weight of its own.
    """
    m, k, n = shape
    name, x = f"{m},{k},{n}", random_activations(m, k, dtype=dtype, seed=seed)
    symmetric = random_weight(k, n, group_size, dtype=dtype, symmetric=True, seed=seed, name=name)
    if mode == SAME:
        yield Layer(name, {SAME: symmetric}, {SAME: x})
    else:
        asymmetric = random_weight(k, n, group_size, dtype=dtype, seed=seed + 1, name=name)
        yield Layer(name, {"awq": asymmetric, "gptq": symmetric}, {"awq": x, "gptq": x})


def same_weights(
    directory: Path, request: Request, *, original: Path | None = None, trusted: Path | None = None
) -> Iterator[Layer]:
    """Mode ``same``: each layer's one Int4Weight and one x for every kernel.

    x comes from the float64 model in ``original``; without one from the checkpoint's own dequantised model, whose previous
    operations already hold AWQ's 1 / s. ``trusted`` is the checkpoint that a probe compares with.
    """
    model = ModelFiles(directory, request.dtype)
    if original and model.method == "awq" and not model.keeps_input_scales:
        raise CheckpointError(
            f"--original: {directory} keeps no AWQ input scales, so the x' it expects cannot be had from another model's x; "
            "leave the option out"
        )
    right = ModelFiles(trusted, request.dtype) if trusted else None
    for name, x in _activations(ModelFiles(original) if original else model, request):
        weight = model.weight(name)
        if original:
            x = weight.scaled_input(x)
        expected = {SAME: _same_shape(right.weight(name), weight)} if right else None
        yield Layer(name, {SAME: weight}, {SAME: x}, expected, right.shards(name) if right else ())


def own_weights(awq: Path, gptq: Path, request: Request, *, original: Path | None = None) -> Iterator[Layer]:
    """Mode ``own``: each checkpoint's weight with the input that it expects.

    x comes from the float64 model in ``original`` (without one, from GPTQ's own dequantised model). AWQ's x' is RN(x / s)
    where the checkpoint keeps s; otherwise it comes from running the AWQ checkpoint itself.
    """
    models = {"awq": ModelFiles(awq, request.dtype), "gptq": ModelFiles(gptq, request.dtype)}
    for source, methods in {"awq": ("awq",), "gptq": ("gptq", "compressed-tensors")}.items():
        model = models[source]
        if model.method not in methods:
            wanted = " or ".join(methods)
            raise CheckpointError(f"--{source} {model.directory}: its method is {model.method}; name a checkpoint of {wanted}")
    own = None if models["awq"].keeps_input_scales else _activations(models["awq"], request)
    for name, x in _activations(ModelFiles(original) if original else models["gptq"], request):
        weights = {source: model.weight(name) for source, model in models.items()}
        awq_x = weights["awq"].scaled_input(x) if own is None else next(own)[1]
        yield Layer(name, weights, {"awq": awq_x, "gptq": x})


def layer_count(directory: Path, request: Request) -> int:
    """How many layers a run over ``directory`` visits, for a progress bar."""
    depth = ModelFiles(directory).config.get("num_hidden_layers")
    if not isinstance(depth, int):
        raise CheckpointError(f"{directory / 'config.json'}: num_hidden_layers is {depth!r}; is this a Llama-like model?")
    names = (f"model.layers.{i}.{tap}" for i in range(depth) for tap in TAPS)
    return sum(fnmatch.fnmatch(name, request.layers) for name in names)


def _activations(model: ModelFiles, request: Request) -> Iterator[tuple[str, Tensor]]:
    ids = tokenize(model.directory, request.text, request.tokens)
    for index, seen in layer_inputs(model.directory, model.dense, ids):
        for tap, x in seen.items():
            name = f"model.layers.{index}.{tap}"
            if fnmatch.fnmatch(name, request.layers):
                yield name, round_once(x, request.dtype)


def _same_shape(right: Int4Weight, weight: Int4Weight) -> Int4Weight:
    if right.codes.shape != weight.codes.shape or right.group_size != weight.group_size:
        raise CheckpointError(
            f"--trusted: {right.name} is {list(right.codes.shape)} in groups of {right.group_size}, the checkpoint's is "
            f"{list(weight.codes.shape)} in groups of {weight.group_size}; name the checkpoint that this one was copied from"
        )
    return right
