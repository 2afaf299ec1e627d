"""The log-probability experiment as Markdown tables: ``python -m qlab.report.logprob_markdown RESULT.json``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from qlab.command import one_sentence
from qlab.logprobs.statistics import Figure
from qlab.logprobs.tables import Entry, ExperimentResult, Matrix, Tables
from qlab.report.logprob_cells import count, figure, prompts, short_reason, times
from qlab.report.logprobs import SPREAD_UNKNOWN, auc_interval, names, spread, title
from qlab.report.markdown import table
from qlab.report.terminal import share


def noise_floor_table(t: Tables) -> str:
    """Every path against itself."""
    return table(["path", "prefill", "decode"], [[f"`{r.path}`", _entry(r.prefill), _entry(r.decode)] for r in t.noise_floor])


def matrix_table(m: Matrix) -> str:
    """Rows generate, columns re-execute."""
    labels = [f"`{name}`" for name in names(m)]
    rows = [[label, *map(_entry, row)] for label, row in zip(labels, m.cells, strict=True)]
    return table([f"{title(m)}", *labels], rows)


def across_table(t: Tables) -> str:
    """Signal, noise and SNR of each pair of methods."""
    rows = []
    for r in t.across:
        pair = f"`{r.methods[0]}` vs `{r.methods[1]}`, {' and '.join(g.upper() for g in r.gpus)}"
        if r.signal and r.noise and r.snr:
            rows.append([pair, figure(r.signal), figure(r.noise), _times(r.snr)])
        else:
            rows.append([pair, r.reason, "-", "-"])
    return table(["pair", "Signal", "Noise", "SNR"], rows)


def batch_table(t: Tables) -> str:
    """The same tokens in other batches."""
    rows = []
    for r in t.batches:
        shares = ["-" if f is None else _share(f) for f in (r.differing, r.flips)]
        rows.append([f"`{r.path}`, {r.schedule}", _entry(r.distance), *shares])
    return table(["same tokens in another batch", "L2", "rows that differ", "argmax flips"], rows)


def detection_table(t: Tables) -> str:
    """AUC, and tokens for 99% power at 1% false positives."""
    rows = []
    for d in t.detection:
        blind = d.auc.value == d.auc.low == d.auc.high == 0.5
        auc = f"{d.auc.value:.3f} {auc_interval(d.auc)}"
        tokens = SPREAD_UNKNOWN if math.isnan(d.tokens.value) else count(d.tokens.value)
        tokens = f"at most {tokens}" if d.one_prompt else tokens
        tokens += "" if math.isnan(d.tokens.low) or d.one_prompt else f" [{count(d.tokens.low)}, {count(d.tokens.high)}]"
        rows.append([f"`{d.claimed}`", f"`{d.other}`", f"`{d.verifier}`", auc, "cannot be told" if blind else tokens])
    return table(["claimed", "in truth", "verifier", "AUC", "tokens for 99% power at 1% false positives"], rows)


def caption(r: ExperimentResult) -> str:
    """One line: what ran, on what, with which versions and inputs."""
    e, p = r.environment, r.prompts
    where = f"{e.gpu}, driver {e.driver}" if e.gpu else e.cpu
    return (
        f"{', '.join(r.models)}; {prompts(p.count)}, {p.tokens} tokens, {p.new_tokens} generated each, top-{r.top_k}; "
        f"{r.engine} on {where}; torch {e.torch}; prompts {p.digest[:16]}; mean L2 [95% bootstrap interval over prompts]"
    )


def document(r: ExperimentResult) -> str:
    """Caption and every table that the result holds."""
    t = r.tables
    parts = [caption(r), "Noise floor:", noise_floor_table(t)]
    for m in t.within:
        parts += [matrix_table(m), *([f"{spread(m.off_diagonal)}".capitalize() + "."] if m.off_diagonal else [])]
    parts += [across_table(t)] if t.across else []
    parts += [batch_table(t)] if t.batches else []
    parts += [detection_table(t)] if t.detection else []
    return "\n\n".join(parts)


def _entry(e: Entry) -> str:
    if e.figure is None:
        return short_reason(e.reason)
    if e.identical:
        return "0"
    if e.figure.infinite:
        split = f"inf ({e.figure.infinite} of {e.figure.prompts} split"
        return f"{split})" if e.together is None else f"{split}, else {figure(e.together)})"
    return figure(e.figure)


def _times(f: Figure) -> str:
    if f.value == f.low == f.high:
        return times(f.value)
    return f"{times(f.value)} " + ("one prompt" if math.isnan(f.low) else f"[{times(f.low)}, {times(f.high)}]")


def _share(f: Figure) -> str:
    if f.value == f.low == f.high:
        return share(f.value)
    return f"{share(f.value)} " + ("one prompt" if math.isnan(f.low) else f"[{100 * f.low:.3g}, {100 * f.high:.3g}]%")


@one_sentence("qlab.report.logprob_markdown")
def main(
    result: Annotated[Path, typer.Argument(help="JSON that python -m qlab.logprobs experiment --json wrote")],
) -> None:
    """Print a result's tables as Markdown."""
    print(document(ExperimentResult.read(result)))


if __name__ == "__main__":
    typer.run(main)
