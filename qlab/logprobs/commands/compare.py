"""``python -m qlab.logprobs compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlab.command import check_output, one_sentence
from qlab.logprobs.commands import options as o


@one_sentence("qlab.logprobs compare")
def main(
    generator: Annotated[Path, typer.Argument(help="trace whose top-k ids are compared")],
    other: Annotated[Path, typer.Argument(help="another trace of the same tokens")],
    top_k: Annotated[str | None, typer.Option(help="log-probabilities compared per row; all that the generator kept")] = None,
    decimals: Annotated[int | None, typer.Option(help="round both first, as an API does", min=0, max=12)] = None,
    json: o.Json = None,
) -> None:
    """Distance of two traces of the same tokens, per prompt; infinite where generated tokens split apart."""
    check_output("--json", json)
    kept = None if top_k is None else o.parse_top_k(top_k)
    from rich.console import Console

    from qlab.logprobs.commands.printing import print_comparison
    from qlab.logprobs.comparing import compare_traces
    from qlab.logprobs.trace import read
    from qlab.serial import write_json

    found = compare_traces(read(generator), read(other), top_k=kept, decimals=decimals)
    print_comparison(found, Console())
    if json is not None:
        write_json(json, found)
