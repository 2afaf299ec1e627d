"""``python -m qlab.logprobs``: its subcommands, one per file of ``commands``."""

from __future__ import annotations

import typer

from qlab.logprobs.commands import causes, compare, detect, experiment, record, replay, rows, show

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False, no_args_is_help=True)
for command in (experiment, detect, causes, record, replay, show, compare):
    app.command(command.__name__.rpartition(".")[2])(command.main)
app.add_typer(rows.app, name="rows")


if __name__ == "__main__":
    app(prog_name="python -m qlab.logprobs")
