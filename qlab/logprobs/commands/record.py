"""``python -m qlab.logprobs record``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlab.command import bar, check_output, one_sentence
from qlab.errors import QlabError
from qlab.logprobs.commands import options as o


@one_sentence("qlab.logprobs record")
def main(
    out: Annotated[Path, typer.Option(help="directory of the trace to write")],
    method: o.Method = "awq_marlin",
    hw: o.Hardware = "h100",
    model: o.ModelOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text, a prompt a line, or .json: strings or lists of token ids; cut from a held-out text if absent"
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="cut longer prompts; without --prompts tokens of each, 100", min=1)] = None,
    count: Annotated[int | None, typer.Option(help="prompts without --prompts, 12", min=1)] = None,
    new_tokens: Annotated[int, typer.Option(help="tokens generated after each prompt", min=1)] = 32,
    top_k: Annotated[str, typer.Option(help="log-probabilities kept per row; 0 or all keeps the whole vocabulary")] = "5",
    chunk: Annotated[
        int,
        typer.Option(help="tokens of a step at most, the same for every method: 50 keeps gptq off cuBLAS (awq: 255)", min=1),
    ] = o.CHUNK,
    together: Annotated[int, typer.Option(help="sequences in the batch at once", min=1)] = 1,
    dispatch: o.Dispatch = "pinned",
    engine: o.Engine = "builtin",
    temperature: Annotated[float, typer.Option(help="0 generates greedily", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="of sampling, atomics' order and the choice of --rows", min=0, max=2**31 - 1)] = 0,
    rows: Annotated[
        str | None, typer.Option(help="linears' rows kept whole: how many per sequence, or a glob over linears, e.g. '*.0.*'")
    ] = None,
    digests: Annotated[bool, typer.Option("--digests", help="keep a digest of every row of every linear's output")] = False,
    device: o.Device = None,
    dtype: o.Dtype = "float16",
    overwrite: o.Overwrite = False,
    json: o.Json = None,
) -> None:
    """Record a trace: log-probabilities of the prompts' tokens and of generated ones, and all it takes to run them again."""
    check_output("--json", json)
    kept = o.parse_top_k(top_k)
    if together > chunk:
        raise QlabError(f"--together {together}: steps of --chunk {chunk} tokens cannot serve as many sequences at once")
    if prompts is not None and count is not None:
        raise QlabError("--count belongs to the held-out text; leave it out with --prompts")
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab.engine.run import Request, Sampling
    from qlab.engine.schedule import Batching
    from qlab.logprobs import prompts as sources
    from qlab.logprobs import taps, trace
    from qlab.logprobs.commands.printing import print_summary
    from qlab.logprobs.record import fed, record
    from qlab.logprobs.summary import summarise
    from qlab.serial import write_json

    trace.check_target(out, overwrite)
    choice, identity = o.choose(o.parse_path(method, hw, dispatch), model, engine, device, dtype)
    if prompts is None:
        given = sources.heldout(choice.directory, count or sources.COUNT, tokens or sources.LENGTH)
    else:
        given = sources.from_file(prompts, choice.directory, tokens)
    lengths = [len(p) + new_tokens - 1 for p in given]
    request = Request(
        given,
        new_tokens,
        batching=Batching(chunk, together),
        sampling=Sampling(temperature, seed),
        top_k=kept,
        taps=frozenset() if rows is None else taps.choose(rows, taps.linear_names(choice.directory), lengths, seed),
        digests=digests,
        seed=seed,
    )
    with bar(f"recording {choice.path}", fed(request)) as advance, choice.running(request.batching) as ready:
        made = trace.write(record(ready, request, model=identity, advance=advance), out, overwrite=overwrite)
    summary = summarise(made)
    print_summary(summary, Console())
    if json is not None:
        write_json(json, summary)
