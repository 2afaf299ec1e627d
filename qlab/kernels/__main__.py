"""``python -m qlab.kernels``: every INT4 kernel on identical inputs, compared bit by bit and with float64."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from qlab.command import answer, named, one_sentence, refuse

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
EXPLAIN = "Why two paths differ (--explain)"
MAP = "Where a recipe changes (--map)"


@app.command()
@one_sentence("qlab.kernels")
def main(
    context: typer.Context,
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
    plot: Annotated[Path | None, typer.Option(help="write the figure here (.png, .svg, .pdf)")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU where there is one")] = None,
    explain: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="split the difference of two paths, method, method@gpu or method@gpu:vllm, into named causes",
            rich_help_panel=EXPLAIN,
        ),
    ] = None,
    model_b: Annotated[Path | None, typer.Option(help="B's checkpoint; --model is A's", rich_help_panel=EXPLAIN)] = None,
    prompts: Annotated[
        int | None, typer.Option(help="prompts cut from the text, of --tokens tokens each", min=1, rich_help_panel=EXPLAIN)
    ] = None,
    decode: Annotated[
        int,
        typer.Option(help="tokens of each prompt that are fed one by one, behind the prefill", min=0, rich_help_panel=EXPLAIN),
    ] = 0,
    top_k: Annotated[
        int, typer.Option(help="log-probabilities compared per row; 0 for all", min=0, rich_help_panel=EXPLAIN)
    ] = 5,
    samples: Annotated[
        int | None, typer.Option(help="draw so many orders of swapping, in place of all", min=10, rich_help_panel=EXPLAIN)
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="split the weights into algorithm, zero points, ..., which takes minutes once",
            rich_help_panel=EXPLAIN,
        ),
    ] = False,
    map: Annotated[
        str | None,
        typer.Option(metavar="M|N|K|sms", help="for which numbers of tokens, ... a kernel sums otherwise", rich_help_panel=MAP),
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="what --map walks over, e.g. 1:512 or 1,16,64", rich_help_panel=MAP)
    ] = None,
) -> None:
    """Run AWQ and GPTQ INT4 kernels side by side and say how far their results lie apart, and why."""
    typed = {name: value for name, value in locals().items() if name != "context"}
    given = named(context)
    if explain is not None:
        from qlab.kernels import explaining

        explaining.run(typed, given)
    elif map is not None:
        from qlab.kernels import mapping

        mapping.run(typed, given)
    else:
        refuse(given, ("model_b", "prompts", "decode", "top_k", "samples", "requantize"), "belongs to --explain A B")
        refuse(given, ("values",), "belongs to --map")
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

    todo = work(Options(**{f.name: typed[f.name] for f in fields(Options)}))
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading the model", total=todo.count * len(run.columns(todo.plan)))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        result = run.run(todo.plan, todo.layers, environment.collect(), advance)
    answer(result, typed["json"], lambda: terminal.show(result, Console(), every_layer=every_layer))
    if typed["plot"]:
        heat_maps(result, typed["plot"])


if __name__ == "__main__":
    app(prog_name="python -m qlab.kernels")
