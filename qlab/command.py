"""What the commands share: bad input is answered with one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from qlab.errors import QlabError

P = ParamSpec("P")


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
