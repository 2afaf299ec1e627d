"""The driver: a whole Llama model, layer by layer, each layer fed by the already quantised ones before it.

GPTQ also goes unit by unit inside a layer, so that o meets the outputs of the quantised q, k and v. AWQ looks at a layer once:
its scales fold into tensors that are themselves quantised, so they must all be known before any code is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlab.errors import QlabError
from qlab.quantize import awq, gptq, rtn
from qlab.quantize.fold import NORMS, UNITS, fold, foldable, storable
from qlab.quantize.llama import Inputs, check, first_inputs, forward, gather, install, layers, module_name, tensors
from qlab.quantize.statistics import Statistics
from qlab.weights import Int4Weight

METHODS = ("awq", "gptq", "rtn")
Done = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to do. Raises QlabError for a combination that no method has."""

    method: str
    group_size: int = 128
    """Rows per scale; -1 for whole columns."""
    symmetric: bool = True
    act_order: bool = False
    """GPTQ only: rows in the order of falling Hessian diagonal."""
    static_groups: bool = False
    """GPTQ only: all grids fitted to the original weight."""
    damping: float = 0.01
    """GPTQ only: part of the mean Hessian diagonal that is added to it."""
    clip: bool = True
    """AWQ only: search for smaller ranges. q and k are never clipped: their errors meet in a product."""
    dtype: torch.dtype = torch.float16
    """Of scales and of every tensor that stays unquantised."""
    zero_min: int = 1
    """Least asymmetric zero point; see :func:`qlab.quantize.grid.choose`."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise QlabError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")
        if self.method != "gptq" and (self.act_order or self.static_groups):
            raise QlabError(f"act-order and static groups belong to gptq, not to {self.method}; leave them out")


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised model, ready for a checkpoint."""

    weights: Mapping[str, Int4Weight]
    """By module name, e.g. ``model.layers.0.self_attn.q_proj``; AWQ's input scale beside each."""
    others: Mapping[str, Tensor]
    """Every other tensor of the checkpoint by name, in the options' dtype, AWQ's scales folded in."""


def steps(model: nn.Module) -> int:
    """How often :func:`quantize_model` will call ``done``."""
    return len(layers(model)) * len(UNITS)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    batches: Sequence[Tensor],
    options: Options,
    done: Done = lambda name: None,
) -> Quantized:
    """Quantise all seven projections of every layer of a LlamaForCausalLM (float32 or float64).

    ``batches`` are calibration tokens, int64 [B, T] each (unused by rtn); ``done`` hears each unit's name.
    The model is changed in place and then computes, in its own dtype, what the checkpoint means.
    Raises QlabError for other architectures, missing calibration tokens, or tensors that the options' dtype cannot hold.
    """
    check(model)
    if options.method != "rtn" and not batches:
        raise QlabError(f"{options.method} needs calibration text; give some tokens")
    weights: dict[str, Int4Weight] = {}
    inputs = first_inputs(model, batches) if options.method != "rtn" else []
    last = len(layers(model)) - 1
    for i, layer in enumerate(layers(model)):
        name = module_name(i, "")

        def tell(unit: str, prefix: str = name) -> None:
            done(prefix + unit)

        if options.method == "awq":
            found, norms = _awq(layer, gather(layer, inputs, UNITS, name), name, options, tell)
            install(model, {}, norms)
        elif options.method == "gptq":
            found = _gptq(layer, inputs, name, options, tell)
        else:
            found = _rtn(layer, name, options, tell)
        install(model, found)
        weights |= found
        inputs = forward(layer, inputs) if i < last else []
    return Quantized(weights, _others(model, weights, options.dtype))


def _rtn(layer: nn.Module, name: str, options: Options, done: Done) -> dict[str, Int4Weight]:
    parts, found = tensors(layer), {}
    for unit in UNITS:
        for path in unit.members:
            found[name + path] = rtn.quantize(
                parts[path], options.group_size, options.symmetric, options.dtype, zero_min=options.zero_min, name=name + path
            )
        done(unit.name)
    return found


def _gptq(layer: nn.Module, inputs: Inputs, name: str, options: Options, done: Done) -> dict[str, Int4Weight]:
    parts, found = tensors(layer), {}
    for unit in UNITS:
        hessian = gather(layer, inputs, [unit], name)[unit.name].hessian
        factor = gptq.prepare(hessian, act_order=options.act_order, damping=options.damping)
        for path in unit.members:
            found[name + path] = gptq.quantize(
                parts[path],
                factor,
                options.group_size,
                options.symmetric,
                options.dtype,
                static_groups=options.static_groups,
                zero_min=options.zero_min,
                name=name + path,
            )
        first, *rest = (found[name + path] for path in unit.members)
        assert all(torch.equal(first.group_index, other.group_index) for other in rest), "one factor, one order of rows"
        install(layer, {path: found[name + path] for path in unit.members})
        done(unit.name)
    return found


def _awq(
    layer: nn.Module, statistics: Mapping[str, Statistics], name: str, options: Options, done: Done
) -> tuple[dict[str, Int4Weight], dict[str, Tensor]]:
    parts = tensors(layer)
    scales: dict[str, Tensor] = {}
    for unit in UNITS:
        if foldable(unit, parts):
            searched = awq.search_scale(
                [parts[path] for path in unit.members],
                statistics[unit.name],
                options.group_size,
                options.symmetric,
                options.dtype,
                zero_min=options.zero_min,
            )
            if unit.previous in NORMS:
                searched = storable(searched, parts[unit.previous], options.dtype)
            scales[unit.name] = searched
        done(unit.name)
    folded = fold(parts, scales)
    found = {
        name + path: awq.quantize_scaled(
            folded[path],
            statistics[unit.name].gram,
            options.group_size,
            options.symmetric,
            options.dtype,
            input_scale=scales.get(unit.name),
            clip=options.clip and not path.endswith(("q_proj", "k_proj")),
            zero_min=options.zero_min,
            name=name + path,
        )
        for unit in UNITS
        for path in unit.members
    }
    return found, {f"{name}{path}.weight": folded[path].to(options.dtype) for path in NORMS}


def _others(model: nn.Module, weights: Mapping[str, Int4Weight], dtype: torch.dtype) -> dict[str, Tensor]:
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()  # type: ignore[union-attr]
    others = {}
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") in weights or name in tied:
            continue
        others[name] = tensor.to(dtype).contiguous()
        if not bool(torch.isfinite(others[name]).all()):
            raise QlabError(f"{name} has values that {dtype} cannot hold; use bfloat16")
    return others
