"""What travels with the package: a small trained Llama (fp16, AWQ, GPTQ) and the texts to run and to quantize it with.

``README.md`` in this folder says how they were made and under which licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from qlab.errors import CheckpointError, QlabError

ModelKind = Literal["fp16", "awq", "gptq"]

_HERE = Path(__file__).resolve().parent


def model_directory(kind: ModelKind) -> Path:
    """Hugging Face directory of the shipped model in fp16 or as its AWQ or GPTQ checkpoint, tokenizer included.

    Raises CheckpointError when ``kind`` is not one of these or when this copy of qlab lacks the files.
    """
    if kind not in get_args(ModelKind):
        raise CheckpointError(f"there is no shipped model {kind!r}; choose one of {', '.join(get_args(ModelKind))}")
    folder = _HERE / "model" / kind
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} lacks the shipped {kind} model; install qlab again or name one with --model")
    return folder


def heldout_text() -> str:
    """About 80 kB from documents that neither training nor the choice of weights has seen; for activations and perplexity."""
    return _text("heldout.txt")


def calibration_text() -> str:
    """About 200 kB from the training split, for the quantizers."""
    return _text("calibration.txt")


def _text(name: str) -> str:
    path = _HERE / "text" / name
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise QlabError(f"{path} is missing; install qlab again") from None
