"""Two paths of one model: their checkpoints, in pieces, and what differs between them beside the linears."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path as Directory

import torch

from qlab import data
from qlab.engine.blocks import Blocks
from qlab.engine.builtin import check_family, runs_natively
from qlab.engine.path import Path
from qlab.errors import QlabError
from qlab.lab.model_files import ModelFiles
from qlab.lab.transformer import check_one_model
from qlab.logprobs.maker import family

A, B = 0, 1


@dataclass(frozen=True, eq=False)
class Side:
    """A checkpoint on a path."""

    path: Path
    blocks: Blocks
    native: bool | None
    """What its linears are told: None runs kernels natively where this machine has them, False replays, True insists."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The two sides, A first. With one checkpoint both share what is not a linear."""

    a: Side
    b: Side
    device: torch.device
    dtype: torch.dtype
    """Of every linear's input and output."""

    @property
    def sides(self) -> tuple[Side, Side]:
        """A and B."""
        return self.a, self.b

    @property
    def one_checkpoint(self) -> bool:
        """Whether both read the same directory."""
        return self.a.blocks is self.b.blocks

    @property
    def other_embedding(self) -> bool:
        """Whether B's embedding is another than A's."""
        return not self.one_checkpoint and not torch.equal(self.a.blocks.embedding, self.b.blocks.embedding)

    @property
    def other_head(self) -> bool:
        """Whether B's final norm or head is another than A's."""
        a, b = self.a.blocks, self.b.blocks
        return a is not b and not (torch.equal(a.norm.weight, b.norm.weight) and torch.equal(a.head, b.head))


def directories(a: Path, b: Path, model: Directory | None, model_b: Directory | None) -> tuple[Directory, Directory]:
    """Each side's checkpoint: ``model`` for both unless ``model_b`` names B's, else the shipped one of the path's family.

    A path that takes either family gets that of the other path. Raises QlabError for a ``model_b`` alone.
    """
    if model is None and model_b is not None:
        raise QlabError("--model-b names B's checkpoint beside A's; name A's with --model")
    if model is not None:
        return model, model_b or model
    either = family([a, b])
    shipped = [data.model_directory("awq" if (p.source or either) == "awq" else "gptq") for p in (a, b)]
    return shipped[A], shipped[B]


def open_pair(
    a: Path,
    b: Path,
    directory_a: Directory,
    directory_b: Directory,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float16,
    native: bool | None = None,
) -> Pair:
    """Raises CheckpointError for directories that do not hold one model as the paths run it, UnsupportedError where ``native``
    cannot be had.
    """
    made: list[Side] = []
    for path, directory in ((a, directory_a), (b, directory_b)):
        wish = native if runs_natively(path, device, native) else False
        files = ModelFiles(directory, dtype)
        check_family(files, path)
        again = bool(made) and directory.resolve() == directory_a.resolve()
        made.append(Side(path, made[A].blocks if again else Blocks(files, device), wish))
    check_one_model(directory_a, directory_b)
    return Pair(made[A], made[B], device, dtype)
