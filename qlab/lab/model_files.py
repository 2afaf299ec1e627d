"""One view of a model directory, quantised or not: fused INT4 weights out of it, and parameters to run it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qlab import checkpoint
from qlab.checkpoint.files import TensorFiles, read_json
from qlab.checkpoint.llama import fused_weight, shard_names
from qlab.checkpoint.read import SCALES_FILE
from qlab.errors import CheckpointError
from qlab.quantize import rtn
from qlab.weights import Int4Weight

GROUP = 128
"""Group size for an unquantised model, which is rounded to nearest, symmetric, so that every kernel can hold it."""


class ModelFiles:
    """A Hugging Face directory, its scales as stored or rounded to ``dtype`` (fp16, bf16) as vLLM's loader rounds them.

    Raises CheckpointError naming file and tensor when something is missing or damaged.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        self.directory = directory
        self._dtype = dtype
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; name one that holds config.json and safetensors files")
        self.config = read_json(directory, "config.json")
        quantised = checkpoint.quantised(directory, self.config)
        self._checkpoint = checkpoint.read(directory, dtype=dtype) if quantised else None
        self._files = TensorFiles(directory) if not quantised else None
        self._known = set(self._checkpoint.names()) if self._checkpoint else set()
        self._others = set(self._checkpoint.others()) if self._checkpoint else set()

    @property
    def method(self) -> str:
        """``awq``, ``gptq``, ``compressed-tensors``, or ``unquantised``."""
        return self._checkpoint.method if self._checkpoint else "unquantised"

    @property
    def keeps_input_scales(self) -> bool:
        """True when AWQ's input scales stand beside the weights, so that x' follows from x."""
        return self._checkpoint is not None and (self._checkpoint.directory / SCALES_FILE).exists()

    def describe(self) -> str:
        """Directory, method and what its zero points were found to be."""
        if self._checkpoint is None:
            return f"{self.directory.resolve().name}: unquantised, rounded to nearest here (symmetric, group {GROUP})"
        return f"{self.directory.resolve().name} ({self.method}): {self._checkpoint.zero_points}"

    def weight(self, name: str) -> Int4Weight:
        """The linear ``name`` as vLLM runs it, its shards fused; rounded to nearest when the model is not quantised."""
        if self._checkpoint:
            return fused_weight(self._checkpoint, name)
        dense = torch.cat([self._need(f"{shard}.weight").float().t() for shard in shard_names(name)], 1)
        group = GROUP if dense.shape[0] % GROUP == 0 else dense.shape[0]
        return rtn.quantize(dense, group, symmetric=True, dtype=self._dtype or torch.float16, name=name)

    def shards(self, name: str) -> tuple[tuple[str, int], ...]:
        """The checkpoint's modules that the linear ``name`` is joined from, each with its columns."""
        if self._checkpoint and name in self._known:
            return ((name, self._checkpoint.weight(name).N),)
        return tuple((shard, self._need(f"{shard}.weight").shape[0]) for shard in shard_names(name))

    def dense(self, name: str) -> Tensor | None:
        """A parameter in a float dtype, quantised ones dequantised to float32 [N, K]; None where there is none."""
        if self._checkpoint:
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and module in self._known:
                return self._checkpoint.weight(module).dequantize(torch.float32).t().contiguous()
            return self._checkpoint.tensor(name) if name in self._others else None
        assert self._files is not None
        return self._files.tensor(name) if name in self._files else None

    def _need(self, name: str) -> Tensor:
        t = self.dense(name)
        if t is None:
            raise CheckpointError(f"{self.directory}: tensor {name!r} is missing; is this a Llama-like model?")
        return t
