"""From the command's options to a plan and its layers; every refusal names the option."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from qlab import data, hardware
from qlab.backends.registry import Kernel
from qlab.command import FIGURES, check_output, parse_shape, recorded, torch_device, torch_dtype
from qlab.errors import QlabError
from qlab.lab import sources
from qlab.lab.model_files import ModelFiles
from qlab.lab.run import SAME, Layer, Plan
from qlab.weights import DTYPES

TOKENS = 16
GROUP = 128
"""Group size of ``--shape``."""
SHIPPED = "shipped model (8M-parameter Llama"


@dataclass(frozen=True)
class Options:
    """The command's options, as typed."""

    hw: str
    against: str | None
    weights: str
    model: Path | None
    awq: Path | None
    gptq: Path | None
    original: Path | None
    shape: list[str] | None
    group: int | None
    dtype: str
    tokens: int | None
    text: Path | None
    layers: str
    kernels: str | None
    runs: int
    seed: int
    probe: bool
    trusted: Path | None
    pin_marlin: bool
    json: Path | None
    plot: Path | None
    device: str | None

    def given(self) -> dict[str, str]:
        """Options that were set, for the record; paths by their last part alone."""
        return recorded({f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Work:
    """A plan, the layers it runs over, and how many there are."""

    plan: Plan
    layers: Iterator[Layer]
    count: int


class _Layers(NamedTuple):
    layers: Iterator[Layer]
    visits: int
    model: str
    directories: tuple[Path, ...]


def work(o: Options) -> Work:
    """Check every option and say what to run. Raises QlabError naming the option and the mend."""
    asked = hardware.gpu(o.hw)
    device = torch_device(o.device)
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported, which is below
    if o.weights not in (SAME, "own"):
        raise QlabError(f"--weights {o.weights!r} is neither same nor own")
    dtype = torch_dtype(o.dtype)
    if o.tokens is not None and o.tokens < 1:
        raise QlabError(f"--tokens {o.tokens} must be at least 1")
    check_output("--json", o.json)
    check_output("--plot", o.plot, FIGURES)
    tokens = o.tokens or TOKENS
    layers, count, model, directories = _layers(o, tokens)
    plan = Plan(
        kernels=_kernels(o.kernels, machete=asked.capability == (9, 0) and not o.pin_marlin),
        asked=asked,
        device=device,
        mode=o.weights,
        model=model,
        checkpoints=[ModelFiles(d).describe() for d in directories],
        dtype=dtype,
        seed=o.seed,
        runs=o.runs,
        probe=o.probe,
        pin_marlin=o.pin_marlin,
        against=_against(o),
        arguments=o.given(),
    )
    return Work(plan, layers, count)


def _against(o: Options) -> hardware.Gpu | None:
    """The GPU to compare with: A100 unless it is asked for itself."""
    if o.against == "none":
        return None
    if o.against is not None:
        if hardware.gpu(o.against) == hardware.gpu(o.hw):
            raise QlabError(f"--against {o.against} is the GPU of --hw itself; name another, or none")
        return hardware.gpu(o.against)
    return hardware.gpu("h100" if o.hw.lower() == "a100" else "a100")


def _layers(o: Options, tokens: int) -> _Layers:
    if o.shape:
        for option in ("model", "awq", "gptq", "original", "trusted", "text"):
            if getattr(o, option) is not None:
                raise QlabError(f"--shape and --{option} exclude each other")
        if o.layers != "*":
            raise QlabError("--shape and --layers exclude each other; a shape is one layer")
        return _shape_layers(o)
    if o.group is not None:
        raise QlabError("--group belongs to --shape; a model's checkpoint has its own group size")
    text = _text(o.text)
    request = sources.Request(DTYPES[o.dtype], tokens, text, o.layers)
    if o.weights == SAME:
        if o.awq or o.gptq:
            raise QlabError("--awq and --gptq belong to --weights own; in mode same name one checkpoint with --model")
        shipped = o.model is None
        directory = o.model or data.model_directory("gptq")
        original = o.original or (data.model_directory("fp16") if shipped else None)
        if o.trusted and not o.probe:
            raise QlabError("--trusted is what --probe compares with; add --probe")
        name = f"{SHIPPED}, GPTQ codes)" if shipped else directory.resolve().name
        layers = sources.same_weights(directory, request, original=original, trusted=o.trusted)
        return _Layers(layers, _count(directory, request), name, (directory,))
    if o.model or o.trusted:
        raise QlabError("--model and --trusted belong to --weights same; in mode own name --awq and --gptq")
    if (o.awq is None) != (o.gptq is None):
        raise QlabError("mode own needs both --awq and --gptq, or neither for the shipped model")
    awq, gptq = o.awq or data.model_directory("awq"), o.gptq or data.model_directory("gptq")
    original = o.original or (data.model_directory("fp16") if o.awq is None else None)
    name = f"{SHIPPED})" if o.awq is None else f"{awq.resolve().name} and {gptq.resolve().name}"
    layers = sources.own_weights(awq, gptq, request, original=original)
    return _Layers(layers, _count(gptq, request), name, (awq, gptq))


def _count(directory: Path, request: sources.Request) -> int:
    count = sources.layer_count(directory, request)
    if not count:
        raise QlabError(
            f"--layers {request.layers!r} matches no layer; names are like model.layers.0.self_attn.qkv_proj, so '*.0.*' or "
            "'*down_proj' would"
        )
    return count


def _shape_layers(o: Options) -> _Layers:
    group = GROUP if o.group is None else o.group
    shapes = [parse_shape(text, group) for text in o.shape or ()]
    if len(set(shapes)) < len(shapes):
        raise QlabError("--shape names the same M,K,N twice; name each once")
    if o.tokens is not None:
        raise QlabError("--tokens belongs to a model; with --shape M,K,N the tokens are M")
    layers = (layer for shape in shapes for layer in sources.from_shape(shape, group, DTYPES[o.dtype], o.seed, o.weights))
    return _Layers(layers, len(shapes), f"random weights, group {group}", ())


def _text(path: Path | None) -> str:
    if path is None:
        return data.heldout_text()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise QlabError(f"--text {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise QlabError(f"--text {path} is not UTF-8 text") from None


def _kernels(patterns: str | None, *, machete: bool) -> Sequence[Kernel]:
    """Kernels by name, glob or vLLM label; a label means Machete too only where vLLM would take it."""
    from qlab.backends import dispatch, registry

    everything = registry.kernels()
    if patterns is None:
        return everything
    chosen = []
    for pattern in (p.strip() for p in patterns.split(",")):
        names = [name for name in dispatch.KERNELS.get(pattern, ()) if machete or not name.startswith("vllm.machete.")]
        found = [k for k in everything if k.name in names or fnmatch.fnmatch(k.name, pattern)]
        if not found:
            known = ", ".join((*dispatch.KERNELS, *(k.name for k in everything)))
            raise QlabError(f"--kernels {pattern!r} matches nothing; known: {known}")
        chosen += [k for k in found if k not in chosen]
    return tuple(chosen)
