"""``python -m qlab.logprobs replay``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlab.command import bar, check_output, one_sentence
from qlab.errors import QlabError
from qlab.logprobs.commands import options as o


@one_sentence("qlab.logprobs replay")
def main(
    trace: Annotated[Path, typer.Argument(help="directory of the trace whose tokens are imposed")],
    method: o.Method,
    hw: o.Hardware,
    model: o.ModelOption = None,
    mode: Annotated[
        str, typer.Option(help="[b]decode[/]: generated tokens one by one, as they were made; [b]prefill[/]: all as a prompt")
    ] = "decode",
    chunk: Annotated[int | None, typer.Option(help="tokens of a step at most; the trace's own by default", min=1)] = None,
    together: Annotated[
        int | None, typer.Option(help="sequences in the batch at once; the trace's own by default", min=1)
    ] = None,
    dispatch: o.Dispatch = "pinned",
    engine: o.Engine = "builtin",
    seed: Annotated[
        int | None, typer.Option(help="of atomics' order; the trace's own by default", min=0, max=2**31 - 1)
    ] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="accept another checkpoint than the trace's")] = False,
    device: o.Device = None,
    dtype: Annotated[str | None, typer.Option(help="float16 or bfloat16; the trace's own by default")] = None,
    out: o.Out = None,
    overwrite: o.Overwrite = False,
    json: o.Json = None,
) -> None:
    """Re-execute a trace's tokens on another path, and say how far that lies from the generator."""
    check_output("--json", json)
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab.engine.schedule import Batching
    from qlab.logprobs import trace as traces
    from qlab.logprobs.commands.printing import print_comparison
    from qlab.logprobs.comparing import compare_traces
    from qlab.logprobs.model import check_same
    from qlab.logprobs.record import fed, imposed, re_execute
    from qlab.serial import write_json

    if out is not None:
        traces.check_target(out, overwrite)
    path = o.parse_path(method, hw, dispatch)
    generated = traces.read(trace)
    asked = imposed(generated, mode)  # type: ignore[arg-type]
    choice, identity = o.choose(path, model, engine, device, dtype or generated.manifest.dtype)
    check_same(generated.manifest.model, identity, any_model=any_model)
    batching = Batching(chunk or asked.batching.budget, together or asked.batching.together)
    if batching.together > batching.budget:
        raise QlabError(
            f"--chunk {batching.budget}: such steps cannot serve {batching.together} sequences at once; see --together"
        )
    with bar(f"{mode} on {path}", fed(asked)) as advance, choice.running(batching) as ready:
        made = re_execute(
            generated,
            ready,
            mode,  # type: ignore[arg-type]
            model=identity,
            any_model=any_model,
            batching=batching,
            seed=seed,
            advance=advance,
        )
    found = compare_traces(generated, made)
    try:
        if out is not None:
            traces.write(made, out, overwrite=overwrite)
        if json is not None:
            write_json(json, found)
    finally:  # a full disk shall not cost the answer as well
        print_comparison(found, Console())
