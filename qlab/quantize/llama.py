"""A transformers Llama model, taken layer by layer: inputs of a layer, statistics inside it, weights in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import QlabError
from qlab.lab.transformer import first_line
from qlab.quantize.fold import NORMS, PROJECTIONS, Unit
from qlab.quantize.statistics import Statistics
from qlab.weights import Int4Weight

PREFIX = "model.layers"
Inputs = list[tuple[Tensor, dict[str, Any]]]
"""Per batch: hidden states [B, T, K] and the other arguments of a layer."""


def load(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The full-precision LlamaForCausalLM of a local directory, in ``dtype`` on the CPU. Raises QlabError naming it."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if not (directory / "config.json").is_file():
        raise QlabError(f"{directory} holds no config.json; give the directory of a Hugging Face model")
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise QlabError(f"{directory} is quantised already; give the full-precision model it was made from")
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except QlabError:
        raise
    except Exception as e:  # transformers has no one kind of error for a damaged directory
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise QlabError(f"cannot load the model in {directory}: {reason}") from None
    finally:
        if bar:
            logging.enable_progress_bar()
    check(model)
    return model.eval()


def empty(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """An untrained LlamaForCausalLM of a ``config.json``, for :func:`install` to fill. Raises QlabError for other types."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.get("model_type") != "llama":
        raise QlabError(f"config.json is of a model of type {config.get('model_type')!r}; only llama is known here")
    own = {key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig.from_dict(own)).to(dtype)
    check(model)
    return model.eval()


def tokenizer(directory: Path) -> Any:
    """The directory's own tokenizer. Raises QlabError naming the directory."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        raise QlabError(
            f"cannot load the tokenizer in {directory}: {first_line(e)}; copy the model's tokenizer files there"
        ) from None


def check(model: nn.Module) -> None:
    """Raise QlabError unless ``model`` is a Llama without biases, the only architecture whose folding is known here."""
    if type(model).__name__ != "LlamaForCausalLM":
        raise QlabError(f"only LlamaForCausalLM can be quantised, not {type(model).__name__}")
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if biases:
        raise QlabError(f"{biases[0]} is a bias; only Llama models without biases can be quantised")


def layers(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(PREFIX).children())


def module_name(layer: int, path: str) -> str:
    """``model.layers.0.self_attn.q_proj`` for layer 0 and ``self_attn.q_proj``."""
    return f"{PREFIX}.{layer}.{path}"


class _Caught(Exception):
    """Stops a forward pass once it has shown what it was run for."""


def first_inputs(model: nn.Module, batches: Sequence[Tensor]) -> Inputs:
    """What the first layer is called with for each batch of tokens [B, T]: hidden states [B, T, K] and the other arguments."""
    caught: Inputs = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        caught.append((hidden, kwargs))
        raise _Caught

    hook = layers(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_Caught):
                model(input_ids=batch, use_cache=False)
    finally:
        hook.remove()
    return caught


def forward(layer: nn.Module, inputs: Inputs) -> Inputs:
    """The next layer's inputs. Every Llama layer takes the same other arguments."""
    outputs = []
    for hidden, kwargs in inputs:
        out = layer(hidden, **kwargs)
        outputs.append((out[0] if isinstance(out, tuple) else out, kwargs))
    return outputs


def gather(layer: nn.Module, inputs: Inputs, units: Sequence[Unit], where: str = "") -> dict[str, Statistics]:
    """Statistics of each unit's input, by the unit's name, as ``layer`` now computes it; it runs no further than they need."""
    found: dict[str, Statistics] = {}
    left: set[str] = set()
    with ExitStack() as hooks:
        for unit in units:
            linear: Any = layer.get_submodule(unit.members[0])
            found[unit.name] = statistics = Statistics(linear.weight.shape[1], f"{where}.{unit.members[0]}")

            def add(_: nn.Module, args: tuple[Tensor, ...], name: str = unit.name, statistics: Statistics = statistics) -> None:
                statistics.add(args[0])
                left.discard(name)
                if not left:
                    raise _Caught

            hooks.enter_context(linear.register_forward_pre_hook(add))
        for part in inputs:
            left.update(found)
            with suppress(_Caught):
                forward(layer, [part])
    return found


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's projections [K, N] and norms [K] in float64, by their paths inside it."""
    stored = {path: layer.get_parameter(f"{path}.weight").detach().double() for path in PROJECTIONS + NORMS}
    return {path: t.T if path in PROJECTIONS else t for path, t in stored.items()}


def install(
    model: nn.Module, weights: Mapping[str, Int4Weight], others: Mapping[str, Tensor] | None = None, *, complete: bool = False
) -> None:
    """Put dequantised weights and other tensors into the model's parameters, so that it computes what a checkpoint means.

    The weights are exact in float32 and float64. Raises QlabError naming a tensor that the model does not have, has in another
    shape, or (with ``complete``) does not get.
    """
    own = dict(model.named_parameters())
    new = {f"{name}.weight": w.dequantize(torch.float64).T for name, w in weights.items()} | dict(others or {})
    for name, tensor in new.items():
        if name not in own:
            if name.endswith(("rotary_emb.inv_freq", "lm_head.weight")):  # made from the configuration, or tied
                continue
            if name.endswith(".bias") and not bool(tensor.any()):  # AutoGPTQ gives every linear one
                continue
            raise QlabError(f"the model has no tensor {name}; weights and model must be of one architecture")
        if own[name].shape != tensor.shape:
            raise QlabError(f"{name} is {list(tensor.shape)}, in the model {list(own[name].shape)}; they must agree")
        own[name].data.copy_(tensor)
    missing = sorted(own.keys() - new.keys()) if complete else []
    if missing:
        raise QlabError(f"the checkpoint has no tensor {missing[0]}; write it again")
