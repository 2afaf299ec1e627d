"""``python -m qlab.kernels``: every INT4 kernel on identical inputs, compared bit by bit and with float64."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qlab.command import one_sentence

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
@one_sentence("qlab.kernels")
def main(
    hw: Annotated[str, typer.Option(help="GPU whose kernels and dispatch are asked for: h100, h200, a100, ...")] = "h100",
    against: Annotated[
        str | None, typer.Option(help="GPU to compare --hw with, by replay: a100 by default (h100 for a100), or none")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="[b]same[/]: one weight and input for all kernels; [b]own[/]: each checkpoint its own")
    ] = "same",
    model: Annotated[Path | None, typer.Option(help="checkpoint (or unquantised model) for mode same")] = None,
    awq: Annotated[Path | None, typer.Option(help="AWQ checkpoint, for mode own")] = None,
    gptq: Annotated[Path | None, typer.Option(help="GPTQ checkpoint, for mode own")] = None,
    original: Annotated[Path | None, typer.Option(help="unquantised model that the activations come from")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="M,K,N of a random layer, in place of a model; repeatable")] = None,
    group: Annotated[int | None, typer.Option(help="group size with --shape, 128 by default; -1 for whole columns")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    tokens: Annotated[int | None, typer.Option(help="rows of activations; 16 by default")] = None,
    text: Annotated[Path | None, typer.Option(help="text that the activations come from; a held-out one by default")] = None,
    layers: Annotated[str, typer.Option(help="glob over layer names, e.g. '*.0.*'")] = "*",
    kernels: Annotated[str | None, typer.Option(help="comma-separated globs over kernel names, or vLLM labels")] = None,
    runs: Annotated[int, typer.Option(help="runs per kernel, for the noise floor", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="seed of --shape", min=0, max=2**31 - 1)] = 0,
    probe: Annotated[bool, typer.Option("--probe", help="one-hot probe: each kernel's decoded weight, bit for bit")] = False,
    trusted: Annotated[Path | None, typer.Option(help="checkpoint that --probe compares --model with")] = None,
    pin_marlin: Annotated[bool, typer.Option("--pin-marlin", help="show dispatch with Machete disabled")] = False,
    every_layer: Annotated[bool, typer.Option("--every-layer", help="print each layer's pairwise matrix too")] = False,
    json: Annotated[Path | None, typer.Option(help="write the whole result here")] = None,
    plot: Annotated[Path | None, typer.Option(help="write heat maps here (.png, .svg, .pdf)")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU where there is one")] = None,
) -> None:
    """Run AWQ and GPTQ INT4 kernels side by side and say how far their results lie apart."""
    typed = {name: value for name, value in locals().items() if name != "every_layer"}
    _run(typed, every_layer)


def _run(typed: dict[str, Any], every_layer: bool) -> None:
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from qlab import environment
    from qlab.kernels.options import Options, work
    from qlab.lab import run
    from qlab.report import terminal
    from qlab.report.figures import heat_maps
    from qlab.serial import write_json

    todo = work(Options(**typed))
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading the model", total=todo.count * len(run.columns(todo.plan)))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        result = run.run(todo.plan, todo.layers, environment.collect(), advance)
    try:
        if typed["json"]:
            write_json(typed["json"], result)
    finally:  # a full disk shall not cost the answer as well
        terminal.show(result, Console(), every_layer=every_layer)
    if typed["plot"]:
        heat_maps(result, typed["plot"])


if __name__ == "__main__":
    app(prog_name="python -m qlab.kernels")
