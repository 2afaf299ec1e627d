"""The safetensors files of one directory as one table of tensors. Nothing is executed, nothing outside is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlab.errors import CheckpointError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Header(NamedTuple):
    """What a safetensors header says of one tensor: the format's dtype name (``I32``, ``F16``, ``BF16``) and the shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def inside(directory: Path, name: str, source: Path) -> Path:
    """The file ``name`` of ``directory``. Raises CheckpointError, blaming ``source``, when the path leaves the directory.

    A snapshot of the Hugging Face cache is made of links to its sibling ``blobs`` folder; that one way out is allowed.
    """
    windows = PureWindowsPath(name)  # its notion of a root and of separators includes POSIX's
    if not name or "\0" in name or windows.drive or windows.root or ".." in windows.parts:
        raise CheckpointError(f"{source}: path {name!r} leaves the checkpoint directory; name a file inside it")
    path = directory / name
    try:
        home, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError) as e:
        raise CheckpointError(f"{path}: the path cannot be resolved ({e}); replace the link by the file") from None
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{source}: path {name!r} leaves the checkpoint directory by a link to {target}; copy the file into the directory"
        )
    return path


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of ``directory``. Raises CheckpointError when it is missing, damaged or no object."""
    path = inside(directory, name, directory)
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; is {directory} a Hugging Face checkpoint?") from None
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror}); check the file and its permissions") from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({e}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}; fetch the file again")
    return value


class TensorFiles(Mapping[str, Path]):
    """Maps each tensor's name to its file; reads headers and tensors through memory maps.

    Takes the files that ``model.safetensors.index.json`` names, or else every ``*.safetensors`` of the directory itself, or
    the one file ``only``. Raises CheckpointError for pickles, damaged files, and an index that does not fit its shards.
    """

    def __init__(self, directory: Path, *, only: str = "") -> None:
        self.directory = directory
        self._open: dict[Path, Any] = {}
        if only:
            path = inside(directory, only, directory)
            self._where = dict.fromkeys(self._names(path), path)
        elif (directory / INDEX).exists():
            self._where = self._from_index()
        else:
            self._where = self._from_folder()

    def __getitem__(self, name: str) -> Path:
        return self._where[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def header(self, name: str) -> Header:
        """Dtype and shape of a tensor, from the file's header alone."""
        path = self._where[name]
        try:
            entry = self._open[path].get_slice(name)
            return Header(str(entry.get_dtype()), tuple(int(n) for n in entry.get_shape()))
        except Exception as e:  # the reader's error types are not part of its interface
            raise _damaged(path, e, name) from None

    def tensor(self, name: str, rows: int | None = None, columns: int | None = None) -> Tensor:
        """A tensor, or the corner of its first ``rows`` and ``columns``. It may be a private map of the file: copy to keep.

        Raises CheckpointError when no file has it.
        """
        if name not in self._where:
            raise CheckpointError(f"{self.directory}: tensor {name!r} is in no file of the checkpoint; check the name")
        path = self._where[name]
        try:
            if rows is None and columns is None:
                return self._open[path].get_tensor(name)
            return self._open[path].get_slice(name)[:rows, :columns]
        except Exception as e:
            raise _damaged(path, e, name) from None

    def _from_index(self) -> dict[str, Path]:
        source = self.directory / INDEX
        table = read_json(self.directory, INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise CheckpointError(f"{source}: weight_map must map tensor names to file names; fetch the index again")
        where = {}
        for name, file in table.items():
            path = inside(self.directory, file, source)
            if path.suffix != ".safetensors":
                raise _refused(path)
            if not path.is_file():
                raise CheckpointError(f"{source}: tensor {name!r} is in {file!r}, which is missing; fetch that shard")
            where[name] = path
        held = {path: set(self._names(path)) for path in dict.fromkeys(where.values())}
        for name, path in where.items():
            if name not in held[path]:
                raise CheckpointError(
                    f"{path}: tensor {name!r} is missing, though {INDEX} puts it there; fetch that shard again"
                )
        return where

    def _from_folder(self) -> dict[str, Path]:
        paths = sorted(p for p in self.directory.iterdir() if p.suffix == ".safetensors")
        if not paths:
            for path in sorted(self.directory.iterdir()):
                if path.suffix in PICKLES:
                    raise _refused(path)
            raise CheckpointError(f"{self.directory}: no *.safetensors file; is this a Hugging Face checkpoint?")
        where: dict[str, Path] = {}
        for path in paths:
            for name in self._names(inside(self.directory, path.name, self.directory)):
                if name in where:
                    raise CheckpointError(f"{path}: tensor {name!r} is also in {where[name].name}; remove one of the two files")
                where[name] = path
        return where

    def _names(self, path: Path) -> list[str]:
        try:
            self._open[path] = safe_open(str(path), framework="pt", device="cpu")
            return list(self._open[path].keys())
        except Exception as e:
            raise _damaged(path, e) from None


def _damaged(path: Path, error: Exception, name: str = "") -> CheckpointError:
    what = f"tensor {name!r} cannot be read" if name else "not a whole safetensors file"
    detail = str(error) if isinstance(error, (SafetensorError, OSError)) else f"{type(error).__name__}: {error}"
    return CheckpointError(f"{path}: {what} ({detail}); fetch the file again")


def _refused(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: only safetensors are read, since a pickle can run code; convert the checkpoint to safetensors"
    )
