"""Real activations: what a model's linear layers receive on real text.

The model runs in float64, decoder layer by decoder layer, with one layer's weights in memory at a time. Libraries and CPUs
differ in the last bits of float32; in float64 they do as well, but rounding once to fp16 or bf16 then gives the same input on
every machine, except where a value lies within some 1e-15 of a rounding border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import CheckpointError
from qlab.lab.transformer import Dense, build, first_line, load, need, read_config, rotary, widen_norms

TAPS: Mapping[str, str] = {
    "self_attn.qkv_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""Linear layers as vLLM fuses them, and the module whose input is theirs."""


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer. Raises CheckpointError where it has no usable one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # a damaged file fails in the tokenizers library, whose errors have no type of their own
        raise CheckpointError(
            f"{directory}: no usable tokenizer ({first_line(e)}); copy the model's tokenizer files there"
        ) from None


def tokenize(directory: Path, text: str, tokens: int, tokenizer: Any = None) -> Tensor:
    """The first ``tokens`` token ids of ``text``: int64 [tokens], by the model's tokenizer, loaded unless it is given.

    Raises CheckpointError when the text is shorter.
    """
    tokenizer = load_tokenizer(directory) if tokenizer is None else tokenizer
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens).input_ids[0]
    if len(ids) < tokens:
        raise CheckpointError(f"the text has only {len(ids)} tokens; give a longer --text or --tokens {len(ids)}")
    return ids[:tokens]


@torch.no_grad()  # not as a with around the yield, which would turn gradients off for whoever reads from the generator
def layer_inputs(directory: Path, dense: Dense, ids: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """For each decoder layer its index and the inputs of its linears, float64 [tokens, K], keyed as in :data:`TAPS`."""
    config = read_config(directory)
    window = getattr(config, "sliding_window", None)
    if window is not None and len(ids) > window:
        raise CheckpointError(f"{directory}: {len(ids)} tokens exceed the sliding window; give --tokens {window} or fewer")
    body = build(directory, config).model
    embedding = need(dense("model.embed_tokens.weight"), directory, "model.embed_tokens.weight")
    if int(ids.max()) >= len(embedding):
        raise CheckpointError(
            f"{directory}: the tokenizer gives token {int(ids.max())}, the embedding has {len(embedding)} rows; "
            "the two belong to different models"
        )
    hidden = embedding[ids].double()[None]
    positions = torch.arange(len(ids))[None]
    cosine_sine = rotary(body, config, len(ids))
    for index, layer in enumerate(body.layers):
        load(layer, f"model.layers.{index}.", dense, directory)
        widen_norms(layer)
        seen: dict[str, Tensor] = {}
        hooks = [layer.get_submodule(tap).register_forward_pre_hook(_keep(seen, name)) for name, tap in TAPS.items()]
        out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=cosine_sine)
        hidden = out[0] if isinstance(out, tuple) else out
        for h in hooks:
            h.remove()
        yield index, seen
        layer.to(device="meta")


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        seen[name] = args[0].reshape(-1, args[0].shape[-1])

    return hook
