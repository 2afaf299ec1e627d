"""``python -m qlab.layers``: two paths through one model, and what each linear adds to their divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlab.command import FIGURES, answer, bar, check_output, one_sentence, recorded, torch_device, torch_dtype
from qlab.logprobs.commands import options as o

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
@one_sentence("qlab.layers")
def main(
    a: Annotated[str, typer.Option(help="path to start from: method@gpu or method@gpu:vllm, e.g. awq@h100")],
    b: Annotated[str, typer.Option(help="path to go to, e.g. awq_marlin@h100:vllm")],
    model: Annotated[Path | None, typer.Option(help="checkpoint; the shipped one of each path's family by default")] = None,
    model_b: Annotated[Path | None, typer.Option(help="B's checkpoint, where it is another than A's")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text that goes in; a held-out one by default")] = None,
    tokens: Annotated[int, typer.Option(help="tokens of it, in one prefill step: the M of every kernel", min=1)] = 48,
    top_k: Annotated[str, typer.Option(help="log-probabilities compared per row, at A's most probable ids; or all")] = "5",
    by: Annotated[str, typer.Option(help="swap a [b]linear[/] at a time, or a [b]layer[/], for large models")] = "linear",
    singles: Annotated[
        bool, typer.Option("--singles/--no-singles", help="swap each alone, too; about half of the work")
    ] = True,
    native: Annotated[
        bool | None, typer.Option("--native/--replay", help="insist on native kernels, or replay; native where they can be")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the order of replayed atomics", min=0, max=2**31 - 1)] = 0,
    device: o.Device = None,
    dtype: o.Dtype = "float16",
    json: o.Json = None,
    plot: Annotated[Path | None, typer.Option(help="write the heat map here (.png, .svg, .pdf)")] = None,
) -> None:
    """Where two paths part: local and inherited divergence of every linear, and its share of the log-probabilities'."""
    arguments = recorded(locals())
    check_output("--json", json)
    check_output("--plot", plot, FIGURES)
    kept = o.parse_top_k(top_k)
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab import data
    from qlab.engine.path import Path as EnginePath
    from qlab.lab.activations import load_tokenizer, tokenize
    from qlab.layers import run as layers
    from qlab.layers.pair import directories, open_pair
    from qlab.layers.walk import check_by
    from qlab.quantize.text import read_text
    from qlab.report import layer_figure
    from qlab.report import layers as report

    paths = [EnginePath.parse(path) for path in (a, b)]
    check_by(by)
    layers.check_tokens(tokens, paths)
    kind = torch_dtype(dtype)
    own, other = directories(paths[0], paths[1], model, model_b)
    pair = open_pair(paths[0], paths[1], own, other, torch_device(device), dtype=kind, native=native)
    said = data.heldout_text() if text is None else read_text(text)
    tokenizer = load_tokenizer(own)
    ids = tokenize(own, said, tokens, tokenizer).tolist()
    plan = layers.Plan(tuple(ids), by, singles, kept, seed)  # type: ignore[arg-type]
    layers.check(pair, plan)
    with bar("layers", layers.steps(pair, plan), "runs of a decoder layer") as advance:
        result = layers.run(pair, plan, words=[tokenizer.decode([t]) for t in ids], arguments=arguments, advance=advance)
    answer(result, json, lambda: report.show(result, Console()))
    if plot is not None:
        layer_figure.plot(result, plot)


if __name__ == "__main__":
    app(prog_name="python -m qlab.layers")
