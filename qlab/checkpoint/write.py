"""Writing a checkpoint directory that vLLM and transformers load: beside its place first, then renamed whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlab.checkpoint.declare import declare, survey
from qlab.checkpoint.files import INDEX, inside
from qlab.checkpoint.layouts import LAYOUTS, pack
from qlab.checkpoint.read import SCALE_KEY, SCALES_FILE
from qlab.errors import CheckpointError
from qlab.packing.gptq import Version
from qlab.weights import Int4Weight

_METADATA = {"format": "pt"}  # transformers refuses safetensors without it


def write(
    directory: str | os.PathLike[str],
    method: str,
    weights: Mapping[str, Int4Weight],
    others: Mapping[str, Tensor],
    hf_config: Mapping[str, Any],
    *,
    version: Version = 1,
    shard_bytes: int = 5 * 2**30,
    extra_files: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``weights`` (by Hugging Face module name) as ``method`` and every other tensor as it is; returns the directory.

    ``version`` is GPTQ's. Tensors fill shards of at most ``shard_bytes`` each (one tensor may be larger); one shard is
    ``model.safetensors``. ``weights`` may read its layers lazily: it is walked twice and held one shard at a time. AWQ input
    scales go to ``qlab/input_scales.safetensors``. ``extra_files`` (tokenizer, licence) maps names to bytes or a file to copy.

    Raises CheckpointError when the directory exists (unless ``overwrite`` and it is a checkpoint) or the weights cannot be
    one checkpoint, PackingError when the layout cannot hold a weight; nothing is left behind then.
    """
    target = Path(directory)
    facts = survey(method, weights, others, version)
    extra = dict(extra_files or {})
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        names = {"config.json", INDEX, SCALES_FILE.as_posix()}
        for name, content in extra.items():
            if name in names or name.endswith(".safetensors"):
                raise CheckpointError(f"{target}: extra file {name!r} is one that the checkpoint writes itself; leave it out")
            path = inside(beside, name, target)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
        config = {**hf_config, "quantization_config": declare(facts)}
        if not {"dtype", "torch_dtype"} & config.keys():
            config["torch_dtype"] = str(facts.dtype).removeprefix("torch.")
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        tensors = _tensors(method, weights, others, version, facts.symmetric, facts.act_order)
        _write_shards(beside, tensors, shard_bytes)
        _write_input_scales(beside, weights)
        _share(beside)
        _move(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{target}: exists already; choose another directory or pass overwrite=True")
    if not (target / "config.json").is_file():
        raise CheckpointError(f"{target}: holds no config.json, so it is no checkpoint to overwrite; choose another directory")


def _share(directory: Path) -> None:
    """Give everything the mode of a plainly opened file: mkdtemp makes 0700 and safetensors may make 0600."""
    plain = (directory / "config.json").stat().st_mode & 0o666
    for path in (directory, *directory.rglob("*")):
        path.chmod(plain | (0o100 | plain >> 2 & 0o011 if path.is_dir() else 0))


def _move(beside: Path, target: Path) -> None:
    if not target.exists():
        beside.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    beside.rename(target)
    shutil.rmtree(old)


def _tensors(
    method: str,
    weights: Mapping[str, Int4Weight],
    others: Mapping[str, Tensor],
    version: Version,
    symmetric: bool,
    act_order: bool,
) -> Iterator[tuple[str, Tensor]]:
    for module, weight in weights.items():
        found = pack(weight, method, version=version, symmetric=symmetric, act_order=act_order)
        for part in LAYOUTS[method]:
            if part in found:
                yield f"{module}.{part}", found[part]
    yield from others.items()


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Fill shards in order, named by number once their count is known."""
    written: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total = 0

    def flush() -> None:
        nonlocal held, held_bytes
        path = directory / f"shard-{len(written) + 1}"
        save_file(held, path, metadata=_METADATA)
        written.append((path, list(held)))
        held, held_bytes = {}, 0

    for name, tensor in tensors:
        # A copy, because safetensors refuses tensors that share memory, as tied embeddings do.
        own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if held and held_bytes + own.nbytes > shard_bytes:
            flush()
        held[name] = own
        held_bytes += own.nbytes
        total += own.nbytes
    flush()
    if len(written) == 1:
        written[0][0].rename(directory / "model.safetensors")
        return
    table = {}
    for i, (path, names) in enumerate(written, 1):
        final = f"model-{i:05d}-of-{len(written):05d}.safetensors"
        path.rename(directory / final)
        table.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_input_scales(directory: Path, weights: Mapping[str, Int4Weight]) -> None:
    scales = {}
    for module, weight in weights.items():
        if weight.input_scale is not None:
            scales[f"{module}.{SCALE_KEY}"] = weight.input_scale.detach().cpu().clone()
    if scales:
        path = directory / SCALES_FILE
        path.parent.mkdir(exist_ok=True)
        save_file(scales, path, metadata=_METADATA)
