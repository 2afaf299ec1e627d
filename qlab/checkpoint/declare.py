"""What ``quantization_config`` must say of a set of weights so that vLLM and transformers read them back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.checkpoint.config import METHODS
from qlab.checkpoint.layouts import LAYOUTS
from qlab.checkpoint.llama import fused_name, shard_names
from qlab.errors import CheckpointError
from qlab.packing.gptq import Version
from qlab.weights import Int4Weight

_HEAD = "lm_head"
"""A linear, so compressed-tensors counts it among its targets even where it is tied and stored nowhere."""


@dataclass(frozen=True)
class Facts:
    """One checkpoint's common properties: the configuration has one value for all modules."""

    method: str
    version: Version
    """GPTQ's: 1 stores zero points minus one, 2 as they are."""
    group_size: int
    """-1 for whole columns."""
    symmetric: bool
    act_order: bool
    dtype: torch.dtype
    unquantised: tuple[str, ...]
    """Modules with a full-precision matrix, embeddings and lm_head among them."""
    lm_head: bool
    """Whether lm_head is quantised."""


def survey(method: str, weights: Mapping[str, Int4Weight], others: Mapping[str, Tensor], version: Version) -> Facts:
    """Walk the weights once. Raises CheckpointError when they cannot share one configuration."""
    if method not in METHODS:
        raise CheckpointError(f"method {method!r} is not supported; supported: {', '.join(METHODS)}")
    if version not in (1, 2):
        raise CheckpointError(f"GPTQ version {version!r} does not exist; it is 1 or 2")
    if not weights:
        raise CheckpointError("weights is empty; a checkpoint needs at least one quantised module")
    sizes: dict[str, tuple[int, int]] = {}
    symmetric, act_order, dtypes = True, False, set()
    for name, w in weights.items():
        sizes[name] = (w.group_size, w.groups)
        symmetric &= w.symmetric
        act_order |= w.act_order
        dtypes.add(w.dtype)
    if len(dtypes) > 1:
        raise CheckpointError("weights have both fp16 and bf16 scales; round them to one dtype with with_dtype")
    for name in others:
        module, _, part = name.rpartition(".")
        if part in LAYOUTS[method] or (module in sizes and part == "weight"):
            raise CheckpointError(f"tensor {name!r} among the others would clash with a quantised module; leave it out")
    matrices = tuple(n.removesuffix(".weight") for n, t in others.items() if n.endswith(".weight") and t.ndim == 2)
    return Facts(method, version, _group_size(sizes), symmetric, act_order, dtypes.pop(), matrices, _HEAD in sizes)


def declare(facts: Facts) -> dict[str, Any]:
    """The ``quantization_config`` object."""
    if facts.method == "awq":
        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": facts.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(facts.unquantised) or None,
        }
        return {**config, "lm_head": True} if facts.lm_head else config
    if facts.method == "gptq":
        config = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": facts.group_size,
            "desc_act": facts.act_order,
            "sym": facts.symmetric,
            "lm_head": facts.lm_head,
            "checkpoint_format": "gptq" if facts.version == 1 else "gptq_v2",
        }
        excluded = _excluded(facts.unquantised)
        return {**config, "dynamic": {f"-:^{re.escape(n)}$": {} for n in excluded}} if excluded else config
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": facts.symmetric,
        "strategy": "channel" if facts.group_size == -1 else "group",
        "group_size": None if facts.group_size == -1 else facts.group_size,
        "actorder": "group" if facts.act_order else None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(facts.unquantised if facts.lm_head else dict.fromkeys((*facts.unquantised, _HEAD))),
    }


def _group_size(sizes: Mapping[str, tuple[int, int]]) -> int:
    """The one group size of all modules; a module that is one group long may read as either."""
    several = {name: size for name, (size, groups) in sizes.items() if groups > 1}
    if not several:
        return -1
    first, size = next(iter(several.items()))
    for name, (other, _) in sizes.items():
        if other != size:
            raise CheckpointError(
                f"module {name!r} has group size {other} and {first!r} has {size}; one checkpoint has one group size"
            )
    return size


def _excluded(modules: tuple[str, ...]) -> list[str]:
    """Linears inside blocks that GPTQ loaders must leave alone, under their own and, where all shards agree, vLLM's name."""
    inner = [m for m in modules if any(part.isdecimal() for part in m.split("."))]
    wholes = [w for w in dict.fromkeys(fused_name(m) for m in inner) if w not in inner and set(shard_names(w)) <= set(inner)]
    return inner + wholes
