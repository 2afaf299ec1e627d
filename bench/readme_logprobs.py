"""README's tables of log-probabilities, each from a file under ``results/``.

``<!-- logprobs: FILE floor -->`` (or ``across``, ``batches``, ``GPU,MODE``), ``<!-- causes: FILE -->``,
``<!-- rows: FILE -->``, ``<!-- standin: FILE FILE,... -->`` and ``<!-- explained: VLLM BUILTIN,VLLM,BUILTIN -->``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from qlab.engine.path import Path as EnginePath
from qlab.logprobs.causes import Causes
from qlab.logprobs.row_predictions import Predictions
from qlab.logprobs.row_rates import ALL
from qlab.logprobs.tables import AcrossRow, ExperimentResult
from qlab.report import causes, logprob_markdown
from qlab.report.logprob_cells import figure, small, times
from qlab.report.markdown import table
from qlab.serial import from_plain

ROOT = Path(__file__).resolve().parent.parent


def experiment(path: Path, what: str) -> str:
    """One table of the experiment: ``floor``, ``across``, ``batches`` of the last GPU, or a matrix as ``GPU,MODE``."""
    r = ExperimentResult.read(path)
    last = r.tables.within[-1].gpu
    r = replace(r, tables=replace(r.tables, batches=tuple(b for b in r.tables.batches if b.path.partition("@")[2] == last)))
    makers = {
        "floor": logprob_markdown.noise_floor_table,
        "across": logprob_markdown.across_table,
        "batches": logprob_markdown.batch_table,
    }
    if what in makers:
        body = makers[what](r.tables)
    else:
        gpu, _, mode = what.partition(",")
        found = r.matrix(gpu, mode)
        assert found is not None, f"{path} has no matrix {what}"
        body = logprob_markdown.matrix_table(found)
    return noted(body, logprob_markdown.caption(r), path)


def cause(path: Path, _: str) -> str:
    """What differs between two GPUs, and the curve over attention's noise."""
    c = Causes.read(path)
    what = f"{c.methods[0]} against {c.methods[1]}, generated on {c.generator}, re-executed on {c.verifier}, both by replay"
    return noted(causes.markdown(c), f"{what}; {c.prompts} prompts, {c.tokens:,} rows; torch {c.environment.torch}", path)


def rows(path: Path, _: str) -> str:
    """How many rows of linears tell two paths on one checkpoint apart, all linears together, at the largest M."""
    p = Predictions.read(path)
    body, most = [], max(r.M for r in p.rates)
    for r in p.rates:
        family = {EnginePath.parse(text).source for text in (r.generator, r.candidate)}
        if r.linear == ALL and most == r.M and len(family) == 1:
            cells = [f"{r.differing / r.elements:.3%}", f"{r.passed} of {r.tried}", _count(r.needed), _count(r.needed_bound)]
            body.append([f"`{r.generator}`", f"`{r.candidate}`", *cells])
    header = ["generator", "candidate", "elements that differ", "rows that pass", "rows needed", "by the bound"]
    return noted(table(header, body), f"{p.source}, M = {most}; {p.dtype}; an error of {p.error:g}", path)


def stand_in(path: Path, others: str) -> str:
    """Signal, noise and SNR where a second kind of engine stands in for a second GPU."""
    body, note = [], ""
    files = (path, *(ROOT / other for other in others.split(",") if other))
    for file in files:
        result = json.loads(file.read_text())
        for plain in result["rows"]:
            r = from_plain(AcrossRow, plain)
            if r.signal and r.noise and r.snr:
                pair = f"`{r.methods[0]}` vs `{r.methods[1]}`"
                cells = [figure(r.signal), figure(r.noise), f"{times(r.snr.value)} [{times(r.snr.low)}, {times(r.snr.high)}]"]
                body.append([r.gpus[1], pair, *cells])
        e = result["environment"]
        note = f"vLLM {e['packages'].get('vllm', '0.20.2')} on {e['gpu']}, driver {e['driver']}; {result['prompts']} prompts"
    return noted(table(["second engine", "pair", "Signal", "Noise", "SNR"], body), note, *files)


def explained(path: Path, others: str) -> str:
    """The distances of vLLM's engine beside those of the built-in one, in which linear layers alone differ."""
    files = [path, *(ROOT / other for other in others.split(","))]
    body = []
    for vllm, builtin in zip(files[::2], files[1::2], strict=True):
        a, b = ExperimentResult.read(vllm), ExperimentResult.read(builtin)
        one, other = a.matrix("h100", "prefill"), b.matrix("h100", "prefill")
        assert one is not None
        assert other is not None
        for i, g in enumerate(one.keys):
            for j, r in enumerate(one.keys):
                if i < j and g in other.keys and r in other.keys:
                    x, y = one.cells[i][j].figure, other.cells[other.keys.index(g)][other.keys.index(r)].figure
                    if x and y and x.value < 1:
                        rows_a, rows_b = (_rows(e) for e in (a, b))
                        share = (y.value**2 / rows_b) / (x.value**2 / rows_a)
                        pair = f"`{g}` to `{r}`".replace("@h100", "")
                        body.append([_model(a), pair, small(x.value), small(y.value), f"{share:.0%}"])
    header = ["model", "pair", "vLLM", "linear layers alone", "share of the squared distance per row"]
    return noted(table(header, body), "on an H100, prefill", *files)


def _rows(r: ExperimentResult) -> float:
    """Compared rows of one prompt."""
    return r.prompts.tokens / r.prompts.count + r.prompts.new_tokens - 1


def _model(r: ExperimentResult) -> str:
    return "shipped" if r.models[0].startswith("awq (awq, 45143195") else "8B shape, random"


def _count(v: float) -> str:
    return f"{v:,.0f}" if v < 1e9 else "none"


def noted(body: str, note: str, *paths: Path) -> str:
    """A table with its caption: what was measured where, and the files that it comes from."""
    files = ", ".join(f"`{path.relative_to(ROOT)}`" for path in paths)
    return f"{body}\n\n<sub>{note}. From {files}.</sub>"


KINDS: Mapping[str, Callable[[Path, str], str]] = {
    "logprobs": experiment,
    "causes": cause,
    "rows": rows,
    "standin": stand_in,
    "explained": explained,
}
"""Opening of a block, and what fills it from its file and the word behind that."""
