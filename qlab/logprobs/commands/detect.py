"""``python -m qlab.logprobs detect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlab.command import answer, bar, check_output, one_sentence
from qlab.errors import QlabError, UnsupportedError
from qlab.logprobs.commands import options as o
from qlab.logprobs.commands import study


@one_sentence("qlab.logprobs detect")
def main(
    trace: Annotated[Path, typer.Argument(help="directory of the trace to judge")],
    candidates: Annotated[
        str, typer.Option(help="paths that may have made it, comma-separated: awq@a100,awq_marlin@h100:vllm,...")
    ],
    mode: Annotated[
        str, typer.Option(help="[b]decode[/]: the trace's own steps; [b]prefill[/]: all as a prompt, faster and less exact")
    ] = "decode",
    alpha: Annotated[float, typer.Option(help="largest probability of rejecting the true candidate")] = 0.01,
    top_k: Annotated[int | None, typer.Option(help="use so many log-probabilities per row, as an API gives", min=1)] = None,
    decimals: Annotated[
        int | None, typer.Option(help="round to so many decimals first, as an API does (4)", min=0, max=12)
    ] = None,
    awq: study.Awq = None,
    gptq: study.Gptq = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="accept another checkpoint than the trace's")] = False,
    device: o.Device = None,
    out: Annotated[Path | None, typer.Option(help="folder that keeps finished runs; run again to go on")] = None,
    json: o.Json = None,
) -> None:
    """Which candidate made a trace, from its log-probabilities alone: a verdict with its error rate, or `undecided`."""
    check_output("--json", json)
    if not 0 < alpha < 1:
        raise QlabError(f"--alpha {alpha:g}: name an error rate between 0 and 1")
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab.engine.path import Path as EnginePath
    from qlab.logprobs import trace as traces
    from qlab.logprobs.cells import Store
    from qlab.logprobs.detection import detect
    from qlab.logprobs.maker import Maker, family
    from qlab.logprobs.model import check_same
    from qlab.logprobs.record import fed, imposed
    from qlab.report import logprob_verdict as report

    named = [str(EnginePath.parse(text)) for text in study.names("--candidates", candidates)]
    paths = [EnginePath.parse(text) for text in study.names("--candidates", ",".join(named))]
    given = traces.read(trace)
    request = imposed(given, mode)  # type: ignore[arg-type]
    columns = given.manifest.columns
    if top_k is not None and top_k > columns:
        raise QlabError(f"--top-k {top_k}: the trace lists {columns} log-probabilities per row; name {columns} or fewer")
    either = family([given.manifest.path])  # a kernel that runs any checkpoint runs the trace's
    maker = Maker({"awq": awq, "gptq": gptq}, "builtin", device, given.manifest.dtype, request.batching, either)
    store, found = Store(study.runs_folder(out)), {}
    with maker, bar("re-executing", len(paths) * fed(request)) as advance:
        for path in paths:
            bench = maker.bench(path)
            check_same(given.manifest.model, maker.model(path), any_model=any_model)
            try:
                found[str(path)] = store.run(bench, request, advance)
            except UnsupportedError as e:
                raise QlabError(f"candidate {path} cannot be computed here ({e}); leave it out, or run on its GPU") from None
    verdict = detect(given.sequences, found, alpha=alpha, top_k=top_k or columns, decimals=decimals)
    answer(verdict, json, lambda: Console().print(report.verdict(verdict)))
