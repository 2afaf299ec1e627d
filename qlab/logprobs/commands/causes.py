"""``python -m qlab.logprobs causes``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qlab.command import FIGURES, bar, check_output, one_sentence, recorded
from qlab.errors import QlabError
from qlab.logprobs.commands import options as o
from qlab.logprobs.commands import study


@one_sentence("qlab.logprobs causes")
def main(
    generator: Annotated[str, typer.Option(help="GPU on which tokens are generated")] = "a100",
    verifier: Annotated[str, typer.Option(help="GPU on which they are re-executed")] = "h100",
    methods: Annotated[str, typer.Option(help="the two methods to tell apart, comma-separated")] = "awq,awq_marlin",
    shares: Annotated[
        str, typer.Option(help="shares of attention's outputs to move by one unit in the last place, comma-separated")
    ] = "1e-6,1e-5,1e-4,1e-3,1e-2,1e-1",
    awq: study.Awq = None,
    gptq: study.Gptq = None,
    prompts: study.PromptsOption = None,
    tokens: study.Tokens = None,
    count: study.Count = None,
    new_tokens: Annotated[int, typer.Option(help="tokens generated after each prompt", min=1)] = 32,
    top_k: Annotated[int, typer.Option(help="log-probabilities compared per row", min=1)] = 5,
    chunk: Annotated[int, typer.Option(help="tokens of a step at most", min=1)] = o.CHUNK,
    seed: Annotated[int, typer.Option(help="of moved outputs and of atomics' order", min=0, max=2**31 - 1)] = 0,
    device: o.Device = None,
    dtype: o.Dtype = "float16",
    out: study.Out = None,
    json: o.Json = None,
    plot: Annotated[Path | None, typer.Option(help="write the curves here (.png, .svg, .pdf)")] = None,
) -> None:
    """Where hardware noise comes from: the linear layers' kernels, vLLM's dispatch, or the rest of the model."""
    check_output("--json", json)
    check_output("--plot", plot, FIGURES)
    arguments = recorded(locals())
    pair = study.names("--methods", methods)
    if len(pair) != 2:
        raise QlabError(f"--methods {methods}: name two methods, separated by a comma")
    moved = _shares(shares)
    paths = [o.parse_path(m, gpu, "pinned") for gpu in (generator, verifier) for m in pair]
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab import environment
    from qlab.engine.schedule import Batching
    from qlab.logprobs import causes as c
    from qlab.logprobs.cells import Store
    from qlab.logprobs.experiment import Plan
    from qlab.logprobs.maker import Maker, family
    from qlab.report import causes as report
    from qlab.serial import write_json

    maker = Maker({"awq": awq, "gptq": gptq}, "builtin", device, dtype, Batching(chunk), family(paths))
    study.check_top_k(top_k, maker.vocabulary(paths))
    given = study.given_prompts(prompts, maker.directory(paths[0]), tokens, count)
    plan = Plan((), given, new_tokens, top_k, Batching(chunk), seed=seed)
    started, store = time.perf_counter(), Store(study.runs_folder(out))
    with maker, bar("causes", plan.fed * c.Study.cells(moved)) as advance:
        work = c.Study(plan, (pair[0], pair[1]), generator.lower(), verifier.lower(), maker.bench, store, advance)
        settings = work.settings(moved)
    result = c.Causes(
        c.SCHEMA,
        arguments,
        environment.collect(details=False),
        tuple(f"{m.name} ({m.method}, {m.digest[:16]})" for m in maker.models.values()),
        tuple(pair),
        generator.lower(),
        verifier.lower(),
        len(given),
        plan.fed,
        settings,
        round(time.perf_counter() - started, 1),
    )
    try:
        for target in (json, out and out / "causes.json"):
            if target is not None:
                write_json(target, result)
    finally:  # a full disk shall not cost the answer as well
        report.show(result, Console())
    for target in (plot, out / "causes.png" if out and report.drawable(result) else None):
        if target is not None:
            report.plot(result, target)


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise QlabError(f"--shares {text!r}: name numbers between 0 and 1, separated by commas") from None
    if not found or not all(0 < share <= 1 for share in found):
        raise QlabError(f"--shares {text}: name numbers above 0 and up to 1, separated by commas")
    return tuple(sorted(set(found)))
