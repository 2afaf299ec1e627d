"""``python -m qlab.logprobs experiment``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qlab.command import FIGURES, bar, check_output, one_sentence, recorded
from qlab.logprobs.commands import options as o
from qlab.logprobs.commands import study


@one_sentence("qlab.logprobs experiment")
def main(
    hw: Annotated[str, typer.Option(help="GPUs, comma-separated")] = "a100,h100",
    methods: Annotated[str, typer.Option(help="methods, comma-separated")] = "awq,awq_marlin,gptq,gptq_marlin",
    awq: study.Awq = None,
    gptq: study.Gptq = None,
    prompts: study.PromptsOption = None,
    tokens: study.Tokens = None,
    count: study.Count = None,
    new_tokens: Annotated[int, typer.Option(help="tokens generated after each prompt", min=1)] = 32,
    top_k: Annotated[int, typer.Option(help="log-probabilities compared per row", min=1)] = 5,
    chunk: Annotated[int, typer.Option(help="tokens of a step at most: 50 keeps gptq off cuBLAS, 255 awq", min=1)] = o.CHUNK,
    dispatch: o.Dispatch = "pinned",
    batches: Annotated[bool, typer.Option("--batches/--no-batches", help="the same tokens in other batches")] = True,
    temperature: Annotated[float, typer.Option(help="0 generates greedily", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="of sampling and of atomics' order", min=0, max=2**31 - 1)] = 0,
    engine: o.Engine = "builtin",
    device: o.Device = None,
    dtype: o.Dtype = "float16",
    out: study.Out = None,
    json: o.Json = None,
    plot: Annotated[Path | None, typer.Option(help="write the heat map of all paths here (.png, .svg, .pdf)")] = None,
) -> None:
    """Every method on every GPU generates, and re-executes what every other generated: noise floor, matrices, SNR."""
    check_output("--json", json)
    check_output("--plot", plot, FIGURES)
    arguments = recorded(locals())
    gpus, labels = study.names("--hw", hw.lower()), study.names("--methods", methods)
    paths = [o.parse_path(m, g, dispatch) for g in gpus for m in labels]
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab.engine.run import Sampling
    from qlab.engine.sampling import check
    from qlab.engine.schedule import Batching
    from qlab.logprobs.cells import Store
    from qlab.logprobs.experiment import Plan, compute, other_batches, summarise
    from qlab.logprobs.maker import Maker, family
    from qlab.report import logprob_figures as figures
    from qlab.report import logprobs as report
    from qlab.serial import write_json

    sampling = Sampling(temperature, seed)
    check(sampling)
    maker = Maker({"awq": awq, "gptq": gptq}, engine, device, dtype, Batching(chunk), family(paths))
    study.check_top_k(top_k, maker.vocabulary(paths))
    given = study.given_prompts(prompts, maker.directory(paths[0]), tokens, count)
    others = other_batches(Batching(chunk), max(map(len, given)) + new_tokens, len(given))
    plan = Plan(
        tuple(paths),
        given,
        new_tokens,
        top_k,
        Batching(chunk),
        sampling,
        seed,
        others if batches and engine == "builtin" else {},
    )
    started, store = time.perf_counter(), Store(study.runs_folder(out))
    with maker, bar("experiment", plan.tokens) as advance:
        cells = compute(plan, maker.bench, store, advance)
    result = summarise(plan, cells, store, maker, arguments, time.perf_counter() - started)
    try:
        for target in (json, out and out / "result.json"):
            if target is not None:
                write_json(target, result)
    finally:  # a full disk shall not cost the answer as well
        report.show(result, Console())
    if plot is not None:
        _drawn(figures, result, plot)
    if out is not None:
        _drawn(figures, result, out / "paths.png")
        figures.within(result, out / "within.png")
        if result.tables.detection:
            figures.roc(result.tables.detection, out / "roc.png")


def _drawn(figures, result, target: Path) -> None:  # type: ignore[no-untyped-def]
    """The matrix of all paths; with one GPU that is the matrix within it."""
    (figures.full if result.tables.full else figures.within)(result, target)
