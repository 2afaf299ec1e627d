"""A directory of files written whole or not at all, and read back one plain file at a time."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from qlab.errors import QlabError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
"""A file's name in a trace: no separator, no drive, nothing hidden."""


def check_target(directory: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise QlabError where a directory cannot be written to ``directory``.

    What is there already may be replaced only on request and only where ``is_ours`` says that it is of the same kind.
    """
    folder = directory.absolute().parent
    if not folder.is_dir():
        raise QlabError(f"{directory}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise QlabError(f"{directory}: the folder {folder} cannot be written; name another")
    if not os.path.lexists(directory):
        return
    if directory.is_symlink() or not directory.is_dir() or not is_ours(directory):
        raise QlabError(f"{directory} exists and is no trace, so it is not replaced; name another directory")
    if not overwrite:
        raise QlabError(f"{directory} exists already; name another directory or ask to overwrite it")


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Files into a temporary directory beside ``directory``, flushed, renamed; a directory that was there is then removed.

    Raises QlabError naming the directory; then nothing was changed.
    """
    made: list[Path] = []
    try:
        new = Path(tempfile.mkdtemp(dir=directory.absolute().parent, prefix=f".{directory.name}."))
        made.append(new)
        for name, data in files.items():
            with (new / name).open("xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        new.chmod(0o755)
        _flush(new)
        if directory.is_dir():
            made.append(_exchange(directory, new))
        else:
            os.rename(new, directory)
        with suppress(OSError):  # it is written; only a power cut could still undo it
            _flush(directory.absolute().parent)
    except OSError as e:
        raise QlabError(f"cannot write {directory}: {e.strerror}; name a directory that can be written") from None
    finally:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)


def _exchange(directory: Path, new: Path) -> Path:
    """Put ``new`` in ``directory``'s place; returns where the old one is now."""
    old = Path(tempfile.mkdtemp(dir=directory.absolute().parent, prefix=f".{directory.name}."))
    try:
        os.rename(directory, old)  # over the empty one
        try:
            os.rename(new, directory)
        except BaseException:
            os.rename(old, directory)
            raise
    except BaseException:
        with suppress(OSError):
            old.rmdir()  # where it is still empty
        raise
    return old


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path, size: int | None = None, most: int | None = None) -> bytes:
    """A plain file's bytes, ``size`` of them where it is named, at most ``most``. Raises QlabError naming the file."""
    try:
        if path.is_symlink():
            raise QlabError(f"{path} is a link; a trace holds plain files, so copy the file itself there")
        # Without blocking: a pipe in a file's place would wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise QlabError(f"{path} is missing; copy the trace again, whole") from None
    except OSError as e:
        raise QlabError(f"cannot read {path}: {e.strerror}") from None
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise QlabError(f"{path} is no plain file; copy the trace again")
        if size is not None and about.st_size != size:
            raise QlabError(f"{path} has {about.st_size} bytes, not {size}: it was damaged or edited; copy the trace again")
        if most is not None and about.st_size > most:
            raise QlabError(f"{path} has {about.st_size} bytes, more than the {most} that a trace's has at most")
        with os.fdopen(handle, "rb", closefd=False) as f:
            return f.read(about.st_size + 1)
    except OSError as e:
        raise QlabError(f"cannot read {path}: {e.strerror}") from None
    finally:
        os.close(handle)


def names(directory: Path) -> set[str]:
    """Names in a directory. Raises QlabError naming it where it is none."""
    try:
        return set(os.listdir(directory))
    except OSError as e:
        raise QlabError(f"cannot read the trace {directory}: {e.strerror}; name a trace's directory") from None
