"""Engines for an experiment's paths: each made once, each path's checkpoint by its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as Directory
from typing import Any

from qlab import data
from qlab.command import torch_device
from qlab.engine.flip import Flip
from qlab.engine.path import Path
from qlab.engine.schedule import Batching
from qlab.errors import CheckpointError, QlabError
from qlab.logprobs.cells import Bench
from qlab.logprobs.engines import Choice
from qlab.logprobs.manifest import Model
from qlab.logprobs.model import identify


def family(paths: Sequence[Path]) -> str:
    """The checkpoint's family for paths that take either: that of all the others where these have one, else ``gptq``."""
    named = {path.source for path in paths} - {""}
    return named.pop() if len(named) == 1 else "gptq"


@dataclass
class Maker:
    """Makes and keeps engines. A context: leaving it ends those that run in processes of their own."""

    directories: Mapping[str, Directory | None]
    """Checkpoint per family, ``awq`` and ``gptq``; None for the shipped one."""
    engine: str = "builtin"
    device: str | None = None
    dtype: str = "float16"
    batching: Batching = field(default_factory=Batching)
    either: str = "gptq"
    """Family whose checkpoint a path runs that takes either."""
    models: dict[str, Model] = field(default_factory=dict)
    """The checkpoints that were used, by family."""
    _made: dict[tuple[Path, float, int], Bench] = field(default_factory=dict)

    def directory(self, path: Path) -> Directory:
        """The checkpoint that a path runs."""
        family = path.source or self.either
        return self.directories.get(family) or data.model_directory("awq" if family == "awq" else "gptq")

    def bench(self, path: Path, flip: Flip | None = None) -> Bench:
        """The path's engine. Raises QlabError where it cannot be made, naming option or file."""
        key = (path, flip.share if flip else 0.0, flip.seed if flip else 0)
        if key not in self._made:
            model = self.model(path)
            self._made[key] = Bench(self._engine(path, flip), model.digest, "" if flip is None else f"flip {flip}")
        return self._made[key]

    def vocabulary(self, paths: Sequence[Path]) -> int:
        """Token ids of the model that the paths run. Raises CheckpointError where they run more than one model."""
        return [self.model(path).vocabulary for path in paths][-1]

    def model(self, path: Path) -> Model:
        """The identity of a path's checkpoint. Raises CheckpointError where it is of another model than those before."""
        family = path.source or self.either
        if family not in self.models:
            self.models[family] = identify(self.directory(path))
            sizes = {m.vocabulary for m in self.models.values()}
            if len(sizes) > 1:
                named = " and ".join(f"{m.name} ({m.vocabulary} token ids)" for m in self.models.values())
                raise CheckpointError(f"{named} are not checkpoints of one model; name two of one with --awq and --gptq")
        return self.models[family]

    def _engine(self, path: Path, flip: Flip | None) -> Any:
        if flip is None:
            return Choice(self.directory(path), path, torch_device(self.device), self.engine, self.dtype).make(self.batching)
        if self.engine != "builtin":
            raise QlabError("attention's outputs can be flipped in the built-in engine alone; leave --engine out")
        return self.bench(path).engine.moved(flip)  # type: ignore[attr-defined]

    def __enter__(self) -> Maker:
        return self

    def __exit__(self, *_: object) -> None:
        for bench in self._made.values():
            close = getattr(bench.engine, "close", None)
            if close is not None:
                close()
