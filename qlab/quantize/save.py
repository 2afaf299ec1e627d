"""A quantised model into a checkpoint directory, with the original's tokenizer beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlab.checkpoint import write
from qlab.checkpoint.files import read_json
from qlab.packing.gptq import Version
from qlab.quantize.model import Quantized

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def save(
    directory: Path,
    layout: str,
    result: Quantized,
    original: Path,
    dtype: torch.dtype,
    *,
    version: Version = 1,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``result`` as ``layout`` with the configuration of ``original``, whose dtype becomes ``dtype``.

    Raises CheckpointError and PackingError as :func:`qlab.checkpoint.write` does.
    """
    config: dict[str, Any] = read_json(original, "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    extra: dict[str, bytes | Path] = {n: original / n for n in TOKENIZER_FILES if (original / n).is_file()}
    return write(
        directory,
        layout,
        result.weights,
        result.others,
        config,
        version=version,
        extra_files=extra | dict(extra_files or {}),
        overwrite=overwrite,
    )
