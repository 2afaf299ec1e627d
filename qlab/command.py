"""What the commands share: bad input is answered with one sentence, before any work is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from qlab.errors import QlabError

if TYPE_CHECKING:
    import torch

    from qlab.engine.run import Advance

P = ParamSpec("P")
MOST = 2**31
"""Elements of a shape's largest matrix; float64 takes 16 GiB for them."""
FIGURES = (".png", ".svg", ".pdf")


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...] = ()) -> None:
    """Raise QlabError where a result could not be written to ``path`` in the end, before any work is done."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise QlabError(f"{option} {path}: the folder {folder} does not exist; make it first")
    if path.is_dir():
        raise QlabError(f"{option} {path} is a folder; name a file")
    if path.exists() and not path.is_file():  # a rename over /dev/null would put a file in the place of the device
        raise QlabError(f"{option} {path} is a device or a pipe; name a file")
    if not os.access(folder, os.W_OK):
        raise QlabError(f"{option} {path}: the folder {folder} cannot be written; name another")
    if suffixes and path.suffix.lower() not in suffixes:
        raise QlabError(f"{option} {path}: name a {', '.join(suffixes[:-1])} or {suffixes[-1]} file")


def named(context: typer.Context) -> set[str]:
    """The options that the caller named, whatever their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    # By its name: Typer has come to bring a click of its own, whose enumeration is not click's.
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def refuse(given: Iterable[str], names: Iterable[str], why: str) -> None:
    """Refuse options that would change nothing, by name. Raises QlabError."""
    for name in names:
        if name in given:
            raise QlabError(f"--{name.replace('_', '-')} {why}")


def parse_shape(text: str, group: int) -> tuple[int, int, int]:
    """M, K, N of ``--shape`` with groups of ``group`` rows, -1 for whole columns. Raises QlabError naming the option."""
    try:
        m, k, n = (int(part) for part in text.split(","))
    except ValueError:
        raise QlabError(f"--shape {text!r} is not M,K,N, for example 16,4096,4096") from None
    if min(m, k, n) < 1:
        raise QlabError(f"--shape {text}: M, K and N must be positive")
    if max(m * k, k * n, m * n) > MOST:
        raise QlabError(f"--shape {text}: a matrix would have more than {MOST} elements; name a smaller shape")
    if group != -1 and (group < 1 or k % group):
        raise QlabError(f"--group {group} does not divide K={k} of --shape {text}; use -1 for whole columns")
    return m, k, n


def torch_device(name: str | None) -> torch.device:
    """The device of ``--device``; without one the GPU where there is one. Raises QlabError naming the option."""
    import torch

    available = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if available else "cpu")
    if name not in ("cuda", "cpu"):
        raise QlabError(f"--device {name!r} is neither cuda nor cpu")
    if name == "cuda" and not available:
        raise QlabError("--device cuda: PyTorch finds no CUDA GPU here; leave the option out to run on the CPU")
    return torch.device(name)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of ``--dtype``. Raises QlabError naming the option."""
    from qlab.weights import DTYPES

    if name not in DTYPES:
        raise QlabError(f"--dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def recorded(options: Mapping[str, Any]) -> dict[str, str]:
    """Options that were set, as text for a result's record: paths by their last part alone, several values in turn."""
    out = {}
    for name, v in options.items():
        if v is not None and v is not False:
            out[name] = v.name if isinstance(v, Path) else " ".join(v) if isinstance(v, list | tuple) else str(v)
    return out


@contextmanager
def bar(what: str, total: int, unit: str = "tokens") -> Iterator[Advance]:
    """A progress bar over tokens, or another unit, on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.update(task, advance=count)


def answer(result: Any, json: Path | None, show: Callable[[], None]) -> None:
    """Write a result as JSON where a file is named, then show it: a full disk shall not cost the answer as well."""
    from qlab.serial import write_json

    try:
        if json is not None:
            write_json(json, result)
    finally:
        show()


def one_sentence(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A command that answers a QlabError with its sentence behind ``name`` on standard error and exit status 2."""

    def guard(run: Callable[P, None]) -> Callable[P, None]:
        @wraps(run)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                run(*args, **kwargs)
            except QlabError as e:
                print(f"{name}: {e}", file=sys.stderr)
                raise typer.Exit(2) from None

        return guarded

    return guard
