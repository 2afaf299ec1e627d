"""``python -m qlab.logprobs rows``: verify, rates, commit, open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlab.command import answer, bar, check_output, one_sentence, parse_shape, recorded, torch_dtype
from qlab.errors import QlabError
from qlab.logprobs.commands import options as o
from qlab.logprobs.commands import study

if TYPE_CHECKING:
    import torch

    from qlab.engine.path import Path as EnginePath
    from qlab.logprobs.row_predictions import Source
    from qlab.logprobs.row_record import Ledger, Recorded
    from qlab.logprobs.trace import Trace

app = typer.Typer(no_args_is_help=True, help="Rows of linear layers as evidence: who can have computed them.")
TraceOption = Annotated[Path, typer.Argument(help="directory of the generator's trace")]
CommitmentOption = Annotated[Path | None, typer.Option("--commitment", help="the generator's commitment to all rows")]
SeedText = Annotated[str, typer.Option("--seed", help="text drawn by the verifier after the commitment")]
SampleCount = Annotated[int, typer.Option("--count", help="rows asked for", min=1)]
RateTokens = Annotated[int, typer.Option(help="tokens of the calibration text: rows per linear", min=2)]


@app.command("verify")
@one_sentence("qlab.logprobs rows verify")
def verify(
    trace: TraceOption,
    candidates: Annotated[
        str, typer.Option(help="paths that may have made it, comma-separated: awq@a100,awq_marlin@h100:vllm")
    ],
    verifier: Annotated[
        str | None, typer.Option(help="GPU whose kernels count differing elements as well: this machine's, or replayed")
    ] = None,
    opening: Annotated[Path | None, typer.Option(help="rows that the generator opened; the trace's own without it")] = None,
    commitment: CommitmentOption = None,
    seed: SeedText = "",
    count: SampleCount = 32,
    tokens: RateTokens = 64,
    awq: study.Awq = None,
    gptq: study.Gptq = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="accept another checkpoint than the trace's")] = False,
    device: o.Device = None,
    json: o.Json = None,
) -> None:
    """Which candidates can have computed a trace's recorded rows: certain by replay, and by counts of a GPU's own kernels."""
    check_output("--json", json)
    if (opening is None) != (commitment is None):
        raise QlabError("--opening and --commitment belong together: the opened rows, and what they were committed to")
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab.command import torch_device
    from qlab.engine.path import Path as EnginePath
    from qlab.logprobs import trace as traces
    from qlab.logprobs.row_bench import Checkpoints
    from qlab.logprobs.row_counts import VERDICT, RowVerdict, calibrate, verify_by_kernels
    from qlab.logprobs.row_record import check_places
    from qlab.logprobs.rows import verify_by_replay
    from qlab.report import rows as report
    from qlab.serial import write_json
    from qlab.weights import DTYPES

    paths = [EnginePath.parse(text) for text in study.names("--candidates", candidates)]
    methods = list(dict.fromkeys(p.method for p in paths))
    if verifier is not None:
        _check_verifier(verifier, paths, methods)
    given = traces.read(trace)
    dtype, where = DTYPES[given.manifest.dtype], torch_device(device)
    recorded = _recorded(given, opening, commitment, seed, count)
    check_places(recorded, given.run.steps)
    directories = _directories(paths, awq, gptq)
    _check_models(given, directories, any_model)
    layers, console = Checkpoints(directories, dtype), Console()
    with bar("replaying", len(recorded) * len(paths), "rows") as advance:
        found = verify_by_replay(recorded, layers, paths, device=where, advance=advance)
    counted = rule = None
    report.show_replayed(found, console)
    if verifier is not None:
        m = sorted(r.M for r in recorded)[len(recorded) // 2]
        source, gpus = _source(directories, dtype, tokens), list(dict.fromkeys(p.gpu for p in paths))
        rule = calibrate(source(), methods, verifier.lower(), gpus, m, dispatch=paths[0].dispatch)
        counted = verify_by_kernels(recorded, layers, rule, device=where)
        report.show_counted(counted, rule, console)
    if json is not None:
        write_json(json, RowVerdict(VERDICT, given.manifest.digest, str(given.manifest.path), found, counted, rule))


@app.command("rates")
@one_sentence("qlab.logprobs rows rates")
def rates(
    hw: Annotated[str, typer.Option(help="GPUs, comma-separated")] = "a100,h100",
    methods: Annotated[str, typer.Option(help="methods, comma-separated")] = "awq,awq_marlin",
    m: Annotated[str, typer.Option("--m", help="numbers of tokens of a kernel call, comma-separated")] = "1,16,50",
    tokens: RateTokens = 64,
    shape: Annotated[
        str | None, typer.Option(help="random layers in place of a model's: M,K,N, several separated by spaces; M rows of each")
    ] = None,
    group: Annotated[int, typer.Option(help="group size of random layers, -1 for whole columns")] = 128,
    dispatch: o.Dispatch = "pinned",
    awq: study.Awq = None,
    gptq: study.Gptq = None,
    dtype: o.Dtype = "float16",
    every: Annotated[bool, typer.Option("--every-linear", help="a line for each kind of linear")] = False,
    json: o.Json = None,
) -> None:
    """How often two paths write other bits, and how many rows therefore tell them apart."""
    check_output("--json", json)
    arguments = recorded(locals())
    paths = [o.parse_path(method, g, dispatch) for g in study.names("--hw", hw) for method in study.names("--methods", methods)]
    calls = [_call(text) for text in study.names("--m", m)]
    shapes = [parse_shape(text, group) for text in shape.split()] if shape else []
    # Heavy imports come after the options are read, so that --help answers at once.
    from rich.console import Console

    from qlab.logprobs.row_predictions import predict
    from qlab.report import rows as report

    kind = torch_dtype(dtype)
    if shapes:
        source, described = _random(shapes, group, kind), f"random layers {shape}, groups of {group}"
    else:
        directories = _directories(paths, awq, gptq)
        source = _source(directories, kind, tokens)
        described = f"{' and '.join(d.name for d in directories.values())}, {tokens} tokens of the calibration text"
    found = predict(
        source,
        list(dict.fromkeys(p.method for p in paths)),
        list(dict.fromkeys(p.gpu for p in paths)),
        calls,
        dispatch=dispatch,  # type: ignore[arg-type]
        described=described,
        dtype=dtype,
        arguments=arguments,
    )
    answer(found, json, lambda: report.show_predictions(found, Console(), every=every))


@app.command("commit")
@one_sentence("qlab.logprobs rows commit")
def commit(
    trace: TraceOption, out: Annotated[Path, typer.Option(help="file of the commitment, which the generator publishes")]
) -> None:
    """Commit to every row of a trace that was recorded with --rows '*', before anyone says which are asked for."""
    check_output("--out", out)
    from rich.console import Console

    from qlab.logprobs import trace as traces
    from qlab.logprobs.row_sampling import cost
    from qlab.report import rows as report
    from qlab.serial import write_json

    given = traces.read(trace)
    made = _ledger(given).commitment
    write_json(out, made)
    shapes = {r.tap.linear: (len(r.x), len(r.y)) for r in given.run.rows}
    report.show_commitment(made, cost(shapes, made.fed, min(32, made.leaves)), Console())


@app.command("open")
@one_sentence("qlab.logprobs rows open")
def open_(
    trace: TraceOption,
    commitment: Annotated[Path, typer.Option(help="the commitment that was published")],
    seed: SeedText,
    out: Annotated[Path, typer.Option(help="file of the opened rows")],
    count: SampleCount = 32,
    digests: Annotated[bool, typer.Option("--digests", help="digests of the output rows in place of the rows")] = False,
) -> None:
    """Open the rows that the verifier's seed asks for, each with its proof."""
    check_output("--out", out)
    from qlab.logprobs import trace as traces
    from qlab.logprobs.row_record import Commitment
    from qlab.logprobs.row_sampling import choose_taps
    from qlab.serial import write_json

    given, published = traces.read(trace), Commitment.read(commitment)
    ledger = _ledger(given)
    if ledger.commitment != published:
        raise QlabError(f"{commitment} is not the commitment to the rows of {trace}")
    taps = choose_taps(published.root + seed, published.linears, published.fed, count)
    write_json(out, ledger.open(taps, whole=not digests))


def _recorded(
    given: Trace, opening: Path | None, commitment: Path | None, seed: str, count: int
) -> tuple[Recorded, ...] | list[Recorded]:
    """The opened rows, checked against the commitment; or the trace's own."""
    from qlab.logprobs.row_record import Commitment, Opening, Recorded, check_opening
    from qlab.logprobs.row_sampling import choose_taps

    if opening is None or commitment is None:
        if not given.run.rows:
            raise QlabError("the trace has no recorded row; record it with --rows 32, or name an --opening")
        return [Recorded.of(r) for r in given.run.rows]
    published = Commitment.read(commitment)
    fed = tuple(len(s.tokens) - 1 for s in given.sequences)
    if (published.context, published.linears, published.fed) != (_context(given), given.run.linears, fed):
        raise QlabError(f"{commitment} commits to rows of other tokens, steps or linears than the trace's")
    taps = choose_taps(published.root + seed, published.linears, published.fed, count)
    return check_opening(published, Opening.read(opening), taps)


def _ledger(given: Trace) -> Ledger:
    from qlab.logprobs.row_record import Ledger, Recorded

    fed = [len(s.tokens) - 1 for s in given.sequences]
    return Ledger([Recorded.of(r) for r in given.run.rows], given.run.linears, fed, _context(given))


def _context(given: Trace) -> str:
    from qlab.logprobs.row_record import context

    tokens = [s.tokens.tolist() for s in given.sequences]
    return context(given.manifest.model.digest, tokens, given.run.linears, given.run.steps)


def _directories(paths: list[EnginePath], awq: Path | None, gptq: Path | None) -> dict[str, Path]:
    """Checkpoint per family that a path needs; the shipped one by default. Raises CheckpointError for one of another family."""
    from qlab.engine.builtin import check_family
    from qlab.lab.model_files import ModelFiles
    from qlab.logprobs.engines import default_directory

    given = {"awq": awq, "gptq": gptq}
    found = {p.source or "gptq": given[p.source or "gptq"] or default_directory(p) for p in paths}
    files = {source: ModelFiles(directory) for source, directory in found.items()}
    for path in paths:
        check_family(files[path.source or "gptq"], path)
    return found


def _check_models(given: Trace, directories: dict[str, Path], any_model: bool) -> None:
    from qlab.logprobs.model import check_same, identify

    for directory in directories.values():
        check_same(given.manifest.model, identify(directory), any_model=any_model)


def _source(directories: dict[str, Path], dtype: torch.dtype, tokens: int) -> Source:
    """Layers with the activations of the calibration text, each family's own."""
    from qlab import data
    from qlab.lab.sources import Request, own_weights, same_weights

    request = Request(dtype, tokens, data.calibration_text())
    if len(directories) == 1:
        (directory,) = directories.values()
        return lambda: same_weights(directory, request)
    return lambda: own_weights(directories["awq"], directories["gptq"], request)


def _random(shapes: list[tuple[int, int, int]], group: int, dtype: torch.dtype) -> Source:
    from qlab.lab.run import SAME
    from qlab.lab.sources import from_shape

    return lambda: (layer for shape in shapes for layer in from_shape(shape, group, dtype, 0, SAME))


def _check_verifier(verifier: str, paths: list[EnginePath], methods: list[str]) -> None:
    from qlab import hardware

    hardware.gpu(verifier)
    if len({p.dispatch for p in paths}) > 1:
        raise QlabError("--verifier: candidates with and without :vllm cannot share one rule; name those of one dispatch")
    if len(methods) < 2:
        raise QlabError("--verifier: counts tell methods apart; name candidates of two methods or more")


def _call(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise QlabError(f"--m {text!r}: name numbers of tokens, 1 or more")
    return int(text)
