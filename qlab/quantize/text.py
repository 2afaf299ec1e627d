"""What the commands share: text into rows of tokens, the same rows every time, and errors into one sentence."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import torch
import typer
from torch import Tensor

from qlab.errors import QlabError

P = ParamSpec("P")


def command(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A command that answers bad input with one sentence behind its ``name`` on standard error and exit status 2."""

    def guard(run: Callable[P, None]) -> Callable[P, None]:
        @wraps(run)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                run(*args, **kwargs)
            except QlabError as e:
                typer.echo(f"{name}: {e}", err=True)
                raise typer.Exit(2) from None

        return guarded

    return guard


def read_text(file: Path) -> str:
    """A UTF-8 text file. Raises QlabError naming the file when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise QlabError(f"cannot read the text {file}: {e}; give a UTF-8 text file") from None


def token_rows(tokenizer: Any, text: str, length: int, limit: int | None = None) -> Tensor:
    """int64 [rows, length]: the text's tokens without special ones, cut into rows, the rest dropped.

    With ``limit``, at most that many rows, spread evenly over the text. Raises QlabError when not one row is full.
    """
    if length < 2:
        raise QlabError(f"rows of {length} tokens predict nothing; take 2 or more")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    count = len(tokens) // length
    if count == 0:
        raise QlabError(
            f"the text has {len(tokens)} tokens, fewer than one row of {length}; give a longer text or shorter rows"
        )
    rows = tokens[: count * length].reshape(count, length)
    if limit is None or limit >= count:
        return rows
    return rows[torch.arange(limit) * count // limit]
