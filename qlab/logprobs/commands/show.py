"""``python -m qlab.logprobs show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlab.command import check_output, one_sentence
from qlab.logprobs.commands import options as o


@one_sentence("qlab.logprobs show")
def main(trace: Annotated[Path, typer.Argument(help="directory of the trace")], json: o.Json = None) -> None:
    """Say what a trace holds, after checking every byte of it."""
    check_output("--json", json)
    from rich.console import Console

    from qlab.logprobs.commands.printing import print_summary
    from qlab.logprobs.summary import summarise
    from qlab.logprobs.trace import read
    from qlab.serial import write_json

    summary = summarise(read(trace))
    print_summary(summary, Console())
    if json is not None:
        write_json(json, summary)
