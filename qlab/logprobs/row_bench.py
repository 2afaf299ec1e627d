"""What paths give for single rows of a linear: by replay, or by this machine's own kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path as Directory

import torch
from torch import Tensor

from qlab import hardware
from qlab.backends import registry
from qlab.backends.registry import Problem
from qlab.backends.vllm_marlin import Marlin
from qlab.checkpoint.llama import shard_names
from qlab.engine.linear import Linear
from qlab.engine.path import Path
from qlab.errors import QlabError, UnsupportedError
from qlab.lab.model_files import ModelFiles
from qlab.lab.outputs import opaque_reason, recipe_of
from qlab.logprobs.row_record import Place
from qlab.recipe import Recipe
from qlab.replay import Decoded, Prepared
from qlab.replay.rows import at_rows, outside
from qlab.weights import Int4Weight, round_once, tensor_bytes


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear of one checkpoint."""

    weight: Int4Weight
    bias: Tensor | None = None
    """[N] in the weight's dtype, added as vLLM adds it: inside of Marlin, after any other kernel."""


Layers = Callable[[Path, str], Layer]
"""The weight that a path runs for a linear's name."""


class Checkpoints:
    """:data:`Layers` from a directory per family, ``awq`` and ``gptq``; the last linear of each is kept."""

    def __init__(self, directories: Mapping[str, Directory], dtype: torch.dtype) -> None:
        self._files = {source: ModelFiles(d, dtype) for source, d in directories.items()}
        self._layer = lru_cache(maxsize=2)(self._read)

    def __call__(self, path: Path, linear: str) -> Layer:
        """Raises QlabError where the path's family has no directory, CheckpointError where the linear is not in it."""
        source = path.source or "gptq"
        if source not in self._files:
            raise QlabError(f"{path} runs on a checkpoint of {source}, and none was named")
        return self._layer(source, linear)

    def _read(self, source: str, linear: str) -> Layer:
        files = self._files[source]
        weight = files.weight(linear)
        parts = [files.dense(f"{shard}.bias") for shard in shard_names(linear)]
        found = [p for p in parts if p is not None]
        return Layer(weight, round_once(torch.cat(found).double(), weight.dtype) if found else None)


class RowBench:
    """One layer under any path that runs it. The weight is decoded once per decoding rule."""

    def __init__(self, layer: Layer, device: torch.device | str = "cpu") -> None:
        self.weight, self.bias, self.device = layer.weight, layer.bias, torch.device(device)
        self.problem = Problem.of(layer.weight, 0)
        self._decoded: list[Decoded] = []
        self._recipes: dict[tuple[Path, int], Recipe | str] = {}
        self._rows: dict[tuple[str, int], tuple[str, bool]] = {}
        self._linears: dict[Path, Linear] = {}

    @cached_property
    def digest(self) -> str:
        """Of the weight and its bias."""
        return self.weight.digest()[:16] + (
            "" if self.bias is None else hashlib.sha256(tensor_bytes(self.bias)).hexdigest()[:16]
        )

    def recipe(self, path: Path, m: int) -> Recipe:
        """Of ``m`` tokens. Raises UnsupportedError with the reason; ``opaque: cuBLAS ...`` where cuBLAS does the sum."""
        key = (path, m)
        if key not in self._recipes:
            self._recipes[key] = self._recipe(path, m)
        made = self._recipes[key]
        if isinstance(made, str):
            raise UnsupportedError(made)
        return made

    def function(self, path: Path, place: Place) -> str:
        """Name of what a path computes for one row of M: equal names, equal bits for any x on this weight.

        Where the path cannot be replayed the name is its own. Raises QlabError for a place that is none.
        """
        row, m = place
        try:
            made = self.recipe(path, m)
        except UnsupportedError as e:
            return f"{path}: {e}"
        return self._alone(made, row)[0] + (" and bias" if self._after(path, m) is not None else "")

    def ordered(self, path: Path, place: Place) -> bool:
        """Whether the bits are determined: no sum of the row is left to atomics. Raises UnsupportedError."""
        return self._alone(self.recipe(path, place[1]), place[0])[1]

    def _alone(self, recipe: Recipe, row: int) -> tuple[str, bool]:
        key = (recipe.hash, row)
        if key not in self._rows:
            made = at_rows(recipe, [row])
            self._rows[key] = made.hash, made.ordered
        return self._rows[key]

    def replay(self, path: Path, places: Sequence[Place], x: Tensor, seed: int = 0) -> Tensor:
        """y [n, N]: row i of x [n, K] as ``path`` computes it at ``places[i]``; ``seed`` chooses an order of atomics.

        Raises UnsupportedError where the path cannot be replayed.
        """
        y = torch.empty((len(places), self.weight.N), dtype=self.weight.dtype)
        for m in sorted({m for _, m in places}):
            mine = [i for i, (_, n) in enumerate(places) if n == m]
            made = at_rows(self.recipe(path, m), [places[i][0] for i in mine])
            after = self._after(path, m)
            found = Prepared(made, self._decode(path, m, made)).run(x[mine].to(self.device), seed).cpu()
            y[mine] = found if after is None else found + after.cpu()
        return y

    def unreachable(self, path: Path, places: Sequence[Place], x: Tensor, y: Tensor) -> dict[int, tuple[int, float, float]]:
        """By row: (element, least, most) of an output that no order of the path's atomics gives.

        Raises UnsupportedError where the path cannot be replayed, or adds a bias after its atomics.
        """
        found: dict[int, tuple[int, float, float]] = {}
        for m in sorted({m for _, m in places}):
            mine = [i for i, (_, n) in enumerate(places) if n == m]
            made = at_rows(self.recipe(path, m), [places[i][0] for i in mine])
            if self._after(path, m) is not None:
                raise UnsupportedError(f"{path}: atomics under a bias are not examined")
            out = outside(made, x[mine].to(self.device), self.weight.to(self.device), y[mine], self._decode(path, m, made))
            found |= {mine[row]: (o.column, o.low, o.high) for row, o in out.items()}
        return found

    def native(self, path: Path, places: Sequence[Place], x: Tensor) -> Tensor:
        """The same rows by the kernels themselves, each alone in a call of its M rows, the others zeros.

        Raises UnsupportedError where this machine is not the path's GPU or has not the kernel.
        """
        here = hardware.detect() if self.device.type == "cuda" else None
        if here is None or not here.same_arithmetic(hardware.gpu(path.gpu)):
            raise UnsupportedError(f"{path}: its kernels do not run natively here")
        if path not in self._linears:
            self._linears[path] = Linear(self.weight, path, self.device, native=True, bias=self.bias)
        y = torch.empty((len(places), self.weight.N), dtype=self.weight.dtype)
        for i, (row, m) in enumerate(places):
            whole = torch.zeros((m, self.weight.K), dtype=x.dtype, device=self.device)
            whole[row] = x[i].to(self.device)
            y[i] = self._linears[path].run(whole)[row].cpu()
        return y

    def _recipe(self, path: Path, m: int) -> Recipe | str:
        try:
            kernel = registry.kernel(path.kernel(replace(self.problem, M=m)))
            made = recipe_of(kernel, replace(self.problem, M=m, bias=self._inside(kernel)), hardware.gpu(path.gpu))
        except UnsupportedError as e:
            return str(e)
        if isinstance(made, Recipe) and made.opaque:
            return opaque_reason(made, hardware.gpu(path.gpu))
        return made

    def _inside(self, kernel: registry.Kernel) -> bool:
        return self.bias is not None and isinstance(kernel, Marlin)

    def _after(self, path: Path, m: int) -> Tensor | None:
        """The bias that is added behind the kernel."""
        kernel = registry.kernel(path.kernel(replace(self.problem, M=m)))
        return None if self._inside(kernel) else self.bias

    def _decode(self, path: Path, m: int, recipe: Recipe) -> Decoded:
        bias = self.bias if self._after(path, m) is None else None
        for d in self._decoded:
            if d.serves(recipe) and d.bias is bias:
                return d
        self._decoded.append(Decoded(recipe, self.weight.to(self.device), bias, device=self.device))
        return self._decoded[-1]
