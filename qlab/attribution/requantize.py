"""Quantising the original again, with other settings: the checkpoint of each hybrid between two quantisations.

It is what ``python -m qlab.quantize`` writes with these settings. A checkpoint is made once and kept in a folder of the user's
(``QLAB_CACHE``, or ``qlab`` in ``XDG_CACHE_HOME`` or ``~/.cache``) under a digest of everything that decides its bytes but the
machine's own sums in float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import qlab
from qlab.attribution.settings import LAYOUTS, Settings
from qlab.errors import QlabError

CACHE_VARIABLE = "QLAB_CACHE"
RECORD = "qlab/requantized.json"
"""Inside a made checkpoint: which settings, text and code it is of."""
Done = Callable[[str], None]
"""Hears of each unit that is quantised, e.g. ``AWQ, asymmetric, groups of 128: model.layers.0.qkv``."""


@dataclass(frozen=True)
class Calibration:
    """The text whose activations AWQ and GPTQ see; the defaults are those of ``python -m qlab.quantize``."""

    text: str = field(repr=False)
    samples: int = 128
    """Rows of tokens at most."""
    length: int = 512
    """Tokens per row."""

    @classmethod
    def shipped(cls) -> Calibration:
        """What the checkpoints of the package were calibrated with."""
        from qlab.data import calibration_text

        return cls(calibration_text())


def folder() -> Path:
    """Where made checkpoints are kept; it need not exist yet."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named) / "requantized"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlab" / "requantized"


def place(original: Path, settings: Settings, calibration: Calibration) -> Path:
    """Where the checkpoint of these settings is, once made. Reads every byte of the original's weights."""
    record = _record(original, settings, calibration)
    return folder() / hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def requantize(original: Path, settings: Settings, calibration: Calibration, done: Done = lambda unit: None) -> Path:
    """The directory of ``original`` quantised with ``settings``: found, or made, which takes a minute for the shipped model.

    Two processes may make the same one: each writes beside the place and renames, and whoever comes second takes the first's.
    Raises QlabError where the original is no Llama that can be quantised, or the folder cannot be written.
    """
    target = place(original, settings, calibration)
    if (target / "config.json").is_file():
        return target
    from qlab.quantize.llama import load, tokenizer
    from qlab.quantize.model import quantize_model
    from qlab.quantize.save import save
    from qlab.quantize.text import token_rows

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".making.", dir=target.parent))
    except OSError as e:
        raise QlabError(f"cannot write into {target.parent}: {e.strerror}; name another folder in {CACHE_VARIABLE}") from None
    try:
        model = load(original)
        rows = token_rows(tokenizer(original), calibration.text, calibration.length, calibration.samples)
        options = settings.options()
        batches = () if settings.algorithm == "rtn" else rows.split(8)
        result = quantize_model(model, batches, options, lambda unit: done(f"{settings}: {unit}"))
        record = json.dumps(_record(original, settings, calibration), indent=1).encode() + b"\n"
        made = save(
            beside / "checkpoint",
            LAYOUTS[settings.algorithm],
            result,
            original,
            options.dtype,
            extra_files={RECORD: record},
        )
        try:
            made.rename(target)
        except OSError as e:
            if not (target / "config.json").is_file():  # else another process was first
                raise QlabError(f"cannot move a checkpoint to {target}: {e.strerror}; look at that folder") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _record(original: Path, settings: Settings, calibration: Calibration) -> dict[str, object]:
    if not (original / "config.json").is_file():
        raise QlabError(f"{original} holds no config.json; give the directory of the full-precision model")
    calibrated = settings.algorithm != "rtn"
    return {
        "qlab": qlab.__version__,
        "code": _digest(sorted((Path(qlab.__file__).parent / "quantize").glob("*.py"))),
        "original": _digest(sorted(p for p in original.iterdir() if p.suffix in (".json", ".safetensors", ".model"))),
        "settings": asdict(settings),
        "text": hashlib.sha256(calibration.text.encode()).hexdigest() if calibrated else None,
        "samples": calibration.samples if calibrated else None,
        "length": calibration.length if calibrated else None,
    }


def _digest(files: list[Path]) -> str:
    """sha256 over names, sizes and contents."""
    h = hashlib.sha256()
    for path in files:
        h.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as f:
            while part := f.read(1 << 22):
                h.update(part)
    return h.hexdigest()
