"""Real activations: what a model's linear layers receive on real text.

The model runs in float64, decoder layer by decoder layer, with one layer's weights in memory at a time. Libraries and CPUs
differ in the last bits of float32; in float64 they do as well, but rounding once to fp16 or bf16 then gives the same input on
every machine, except where a value lies within some 1e-15 of a rounding border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import CheckpointError

TAPS: Mapping[str, str] = {
    "self_attn.qkv_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""Linear layers as vLLM fuses them, and the module whose input is theirs."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose layers, run one by one, are known to add up to transformers' own forward pass. Relatives with the same
module names scale embeddings, turn q and k otherwise or normalise by ``1 + weight``, and would quietly give another x."""


def tokenize(directory: Path, text: str, tokens: int) -> Tensor:
    """The first ``tokens`` token ids of ``text``: int64 [tokens]. Raises CheckpointError when the text is shorter."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # a damaged file fails in the tokenizers library, whose errors have no type of their own
        raise CheckpointError(
            f"{directory}: no usable tokenizer ({_first_line(e)}); copy the model's tokenizer files there"
        ) from None
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens).input_ids[0]
    if len(ids) < tokens:
        raise CheckpointError(f"the text has only {len(ids)} tokens; give a longer --text or --tokens {len(ids)}")
    return ids[:tokens]


Dense = Callable[[str], Tensor | None]
"""Parameter by name, in any float dtype (quantised ones dequantised); None where the checkpoint has none."""


def layer_inputs(directory: Path, dense: Dense, ids: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """For each decoder layer its index and the inputs of its linears, float64 [tokens, K], keyed as in :data:`TAPS`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers and huggingface_hub share no type of error for a bad value
        raise CheckpointError(f"{directory / 'config.json'}: {_first_line(e)}") from None
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"{directory / 'config.json'}: model_type {config.model_type!r} is not built like Llama; its layers cannot be run "
            f"one by one, those of {', '.join(FAMILIES)} can"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and len(ids) > window:
        raise CheckpointError(f"{directory}: {len(ids)} tokens exceed the sliding window; give --tokens {window} or fewer")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    except Exception as e:  # whatever a nonsensical size leads to inside transformers
        raise CheckpointError(f"{directory / 'config.json'}: no model can be built from it ({_first_line(e)})") from None
    body = model.model
    with torch.no_grad():
        embedding = _need(dense("model.embed_tokens.weight"), directory, "model.embed_tokens.weight")
        if int(ids.max()) >= len(embedding):
            raise CheckpointError(
                f"{directory}: the tokenizer gives token {int(ids.max())}, the embedding has {len(embedding)} rows; "
                "the two belong to different models"
            )
        hidden = embedding[ids].double()[None]
        positions = torch.arange(len(ids))[None]
        cosine_sine = _rotary(type(body.rotary_emb)(config=config), config, len(ids))
        for index, layer in enumerate(body.layers):
            _load(layer, f"model.layers.{index}.", dense, directory)
            _widen_norms(layer)
            seen: dict[str, Tensor] = {}
            hooks = [layer.get_submodule(tap).register_forward_pre_hook(_keep(seen, name)) for name, tap in TAPS.items()]
            out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=cosine_sine)
            hidden = out[0] if isinstance(out, tuple) else out
            for h in hooks:
                h.remove()
            yield index, seen
            layer.to(device="meta")


def _load(layer: nn.Module, prefix: str, dense: Dense, directory: Path) -> None:
    state = {}
    for name, parameter in layer.named_parameters():
        found = _need(dense(prefix + name), directory, prefix + name)
        if found.shape != parameter.shape:
            raise CheckpointError(
                f"{directory}: tensor {prefix + name!r} is {list(found.shape)}, config.json asks for {list(parameter.shape)}; "
                "the two belong to different models"
            )
        state[name] = found.double()
    layer.load_state_dict(state, strict=True, assign=True)


def _rotary(module: Any, config: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, float64 [1, tokens, head_dim]; transformers' own are float32."""
    frequencies = module.inv_freq.double()
    parameters = getattr(config, "rope_parameters", None) or {}
    base = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    if getattr(module, "rope_type", "default") == "default" and base:
        pairs = torch.arange(len(frequencies), dtype=torch.float64)
        frequencies = float(base) ** (-pairs / len(frequencies))
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos() * module.attention_scaling, angles.sin() * module.attention_scaling


def _widen_norms(layer: nn.Module) -> None:
    """Let RMS norms compute in float64; transformers' go through float32 whatever the model's dtype is."""
    for norm in layer.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = partial(_rms_norm, norm)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        seen[name] = args[0].reshape(-1, args[0].shape[-1])

    return hook


def _need(t: Tensor | None, directory: Path, name: str) -> Tensor:
    if t is None:
        raise CheckpointError(f"{directory}: tensor {name!r} is missing, so its layer cannot run")
    return t


def _first_line(e: Exception) -> str:
    """The message's first line; where that only announces the next, both."""
    lines = [*map(str.strip, str(e).strip().splitlines()), type(e).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) or lines[-1]
