"""Llama-like models of transformers in float64: built from a configuration without memory, then filled part by part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import CheckpointError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose layers, run one by one, are known to add up to transformers' own forward pass. Relatives with the same
module names scale embeddings, turn q and k otherwise or normalise by ``1 + weight``, and would quietly give another x."""

ALIKE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
)
"""Fields of the configuration that two checkpoints of one model have in common: what is computed besides the tensors."""

Dense = Callable[[str], Tensor | None]
"""Parameter by name, in any float dtype (quantised ones dequantised); None where the checkpoint has none."""


def read_config(directory: Path) -> Any:
    """transformers' configuration of the model. Raises CheckpointError where it is unusable or of another family."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers and huggingface_hub share no type of error for a bad value
        raise CheckpointError(f"{directory / 'config.json'}: {first_line(e)}") from None
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"{directory / 'config.json'}: model_type {config.model_type!r} is not built like Llama; its layers cannot be run "
            f"one by one, those of {', '.join(FAMILIES)} can"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def check_one_model(a: Path, b: Path) -> None:
    """Raise CheckpointError where the config.json of two directories make other models of equal tensors."""
    if a.resolve() == b.resolve():
        return
    configs = read_config(a), read_config(b)
    for name in ALIKE:
        ours, theirs = (getattr(c, name, None) for c in configs)
        if ours != theirs:
            raise CheckpointError(
                f"{a} and {b} are not checkpoints of one model: {name} is {ours} in one config.json and {theirs} in the other"
            )


def build(directory: Path, config: Any, attention: str = "sdpa") -> Any:
    """transformers' model for the configuration, in float64 on the meta device. Raises CheckpointError."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=attention)
    except Exception as e:  # whatever a nonsensical size leads to inside transformers
        raise CheckpointError(f"{directory / 'config.json'}: no model can be built from it ({first_line(e)})") from None


def load(layer: nn.Module, prefix: str, dense: Dense, directory: Path, device: torch.device | None = None) -> None:
    """Fill a module's parameters, in float64, with the tensors of ``prefix``. Raises CheckpointError naming the tensor."""
    state = {}
    for name, parameter in layer.named_parameters():
        found = need(dense(prefix + name), directory, prefix + name)
        if found.shape != parameter.shape:
            raise CheckpointError(
                f"{directory}: tensor {prefix + name!r} is {list(found.shape)}, config.json asks for {list(parameter.shape)}; "
                "the two belong to different models"
            )
        state[name] = found.to(device).double()
    layer.load_state_dict(state, strict=True, assign=True)


def rotary(body: Any, config: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, float64 [1, tokens, head_dim]; transformers' own are float32."""
    module = type(body.rotary_emb)(config=config)
    frequencies = module.inv_freq.double()
    parameters = getattr(config, "rope_parameters", None) or {}
    base = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if getattr(module, "rope_type", "default") == "default" and base:
        pairs = torch.arange(len(frequencies), dtype=torch.float64)
        frequencies = float(base) ** (-pairs / len(frequencies))
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling


def widen_norms(layer: nn.Module) -> None:
    """Let RMS norms compute in float64; transformers' go through float32 whatever the model's dtype is."""
    for norm in layer.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = partial(_rms_norm, norm)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))


def need(t: Tensor | None, directory: Path, name: str) -> Tensor:
    """The tensor. Raises CheckpointError where there is none."""
    if t is None:
        raise CheckpointError(f"{directory}: tensor {name!r} is missing, so its layer cannot run")
    return t


def first_line(e: Exception) -> str:
    """The message's first line; where that only announces the next, both."""
    lines = [*map(str.strip, str(e).strip().splitlines()), type(e).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) or lines[-1]
