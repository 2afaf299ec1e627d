"""Reading a Hugging Face checkpoint directory: headers and configuration at once, each layer when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.checkpoint.config import QuantConfig, parse
from qlab.checkpoint.files import TensorFiles, read_json
from qlab.checkpoint.layouts import LAYOUTS, check, load, modules
from qlab.checkpoint.llama import forward_order
from qlab.checkpoint.zeros import ZeroPoints, detect
from qlab.errors import CheckpointError
from qlab.weights import ACTIVATION_DTYPES, Int4Weight

SCALES_FILE = Path("qlab") / "input_scales.safetensors"
"""AWQ's input scales, in a folder of their own so that loaders which take every ``*.safetensors`` do not meet them."""
SCALE_KEY = "input_scale"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An INT4 checkpoint, opened. Layers are read from memory maps one at a time, so a model larger than memory is fine."""

    directory: Path
    config: QuantConfig
    """What the checkpoint declares."""
    hf_config: Mapping[str, Any] = field(repr=False)
    """``config.json`` whole."""
    zero_points: ZeroPoints
    """The zero-point convention found in the tensors; ``str()`` of it is the report."""
    dtype: torch.dtype | None
    """Scales are rounded to it; None keeps each as stored."""
    _names: tuple[str, ...] = field(repr=False)
    _files: TensorFiles = field(repr=False)
    _scales: TensorFiles | None = field(repr=False)

    @property
    def method(self) -> str:
        """``awq``, ``gptq`` or ``compressed-tensors``."""
        return self.config.method

    def names(self) -> tuple[str, ...]:
        """The quantised modules, in the order of the forward pass."""
        return self._names

    def __contains__(self, tensor: str) -> bool:
        """Whether some file holds a tensor of that full name."""
        return tensor in self._files

    def weight(self, name: str) -> Int4Weight:
        """One quantised linear by its module name, with its AWQ input scale where the checkpoint carries one.

        Raises CheckpointError naming file and tensor for NaN, infinite or zero scales and group indices out of range.
        """
        if name not in self._names:
            raise CheckpointError(f"{self.directory}: module {name!r} is not quantised here; first of them: {self._names[0]!r}")
        version = self.zero_points.version
        return load(self._files, name, self.config, version=version, dtype=self.dtype, input_scale=self._input_scale(name))

    @property
    def weights(self) -> Mapping[str, Int4Weight]:
        """All quantised linears by module name; each access reads the layer anew."""
        return _Weights(self)

    def others(self) -> tuple[str, ...]:
        """Names of the tensors that belong to no quantised linear: embeddings, norms, biases."""
        layout = LAYOUTS[self.method]
        return tuple(n for n in self._files if n.rpartition(".")[2] not in layout)

    def tensor(self, name: str) -> Tensor:
        """Any stored tensor by its full name, as it is; a private map of the file, so copy it to change or keep it."""
        return self._files.tensor(name)

    def where(self, module: str) -> Path:
        """The file that holds a module's packed codes."""
        return self._files[f"{module}.{next(iter(LAYOUTS[self.method]))}"]

    def _input_scale(self, module: str) -> Tensor | None:
        name = f"{module}.{SCALE_KEY}"
        if self._scales is None or name not in self._scales:
            return None
        scale = self._scales.tensor(name).clone()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CheckpointError(
                f"{self._scales[name]}: tensor {name!r} must be finite and positive; quantise the layer again"
            )
        return scale


class _Weights(Mapping[str, Int4Weight]):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Int4Weight:
        if name not in self._checkpoint.names():
            raise KeyError(name)
        return self._checkpoint.weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names())

    def __len__(self) -> int:
        return len(self._checkpoint.names())


def read(directory: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Checkpoint:
    """Open an AWQ, GPTQ or compressed-tensors (pack-quantized) 4-bit checkpoint, sharded or not.

    ``dtype`` (fp16 or bf16) rounds scales to nearest, which float32 scales need. Names, dtypes and shapes of every tensor are
    checked now; values when a layer is read. Raises CheckpointError: one sentence with file, tensor and the mend.
    """
    home = Path(directory)
    if dtype is not None and dtype not in ACTIVATION_DTYPES:
        raise CheckpointError(f"dtype must be torch.float16 or torch.bfloat16, not {dtype}")
    if not home.exists():
        raise CheckpointError(f"{home}: no such directory; name a Hugging Face checkpoint")
    if not home.is_dir():
        raise CheckpointError(f"{home}: not a directory; name the folder that holds config.json")
    hf_config = read_json(home, "config.json")
    config = parse(home, hf_config)
    files = TensorFiles(home)
    names = tuple(sorted(modules(files, config.method), key=forward_order))
    if not names:
        first = next(iter(LAYOUTS[config.method]))
        raise CheckpointError(f"{home}: no tensor '*.{first}', which {config.method} linears have; check quant_method")
    sizes = {name: check(files, name, config) for name in names}
    scales = _input_scales(home, {name: size.K for name, size in sizes.items()})
    return Checkpoint(home, config, hf_config, detect(files, names, config), dtype, names, files, scales)


def _input_scales(home: Path, rows: Mapping[str, int]) -> TensorFiles | None:
    if not (home / SCALES_FILE).exists():
        return None
    scales = TensorFiles(home, only=SCALES_FILE.as_posix())
    for name, path in scales.items():
        module, _, key = name.rpartition(".")
        if key != SCALE_KEY or module not in rows:
            raise CheckpointError(f"{path}: tensor {name!r} belongs to no quantised module; remove it")
        header = scales.header(name)
        if header.dtype != "F32" or header.shape != (rows[module],):
            raise CheckpointError(f"{path}: tensor {name!r} must be F32 {[rows[module]]}, not {header}; write the file again")
    return scales
