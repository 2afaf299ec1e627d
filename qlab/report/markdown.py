"""The lab's result as Markdown tables, for a README or an issue: ``python -m qlab.report.markdown RESULT.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qlab.command import one_sentence
from qlab.errors import QlabError
from qlab.lab.results import TOTAL, LabResult
from qlab.report.terminal import class_letters, layer_names, number, share, short_kernel


def kernel_table(r: LabResult) -> str:
    """Every kernel that ran: error against float64, repeatability, bitwise class."""
    letters = class_letters(r)
    rows = []
    for key in r.ran():
        c = r.cell(TOTAL, key)
        if c.error is None:
            continue
        same = "-" if c.repeatable is None else "yes" if c.repeatable else f"no ({number(c.noise_floor or 0.0)})"
        off = "" if c.origin != "native" else "-" if c.replay_bits is None else str(c.replay_bits)
        rows.append(
            [f"`{key}`", c.origin, number(c.error.relative_l2), f"{c.error.ulp_median:.2f}", same, off, letters.get(key, "")]
        )
    header = [
        "kernel",
        "by",
        "relative L2 error",
        "median ULP",
        "repeats (noise floor)",
        "bits off its replay",
        "bitwise class",
    ]
    return table(header, rows)


def pair_table(r: LabResult, keys: Sequence[str] = ()) -> str:
    """Pairwise over all layers: relative L2 distance below the diagonal, share of differing outputs above it.

    ``keys`` chooses kernels; all that ran by default. Raises QlabError for one that did not run.
    """
    total = next((p for p in r.pairs if p.layer == TOTAL), None)
    ran = total.keys if total else ()
    chosen = tuple(keys) or ran
    if missing := [k for k in chosen if k not in ran]:
        raise QlabError(f"kernel {missing[0]!r} did not run on every layer; those that did: {', '.join(ran)}")
    assert total is not None
    at = [ran.index(k) for k in chosen]
    rows = []
    for i, a in enumerate(at):
        entries = [
            "" if i == j else number(total.relative_l2[a][b]) if j < i else share(total.differing[a][b])
            for j, b in enumerate(at)
        ]
        rows.append([f"`{chosen[i]}`", *entries])
    return table(["", *(f"`{k}`" for k in chosen)], rows)


def against_table(r: LabResult) -> str:
    """The asked GPU beside another: outputs and bits that differ, per kernel and per vLLM label."""
    if r.against is None:
        raise QlabError("the result was made with --against none: it holds no other GPU")
    asked, other = r.hardware.asked, r.against.gpu
    layers = [name for name in r.layers() if name != TOTAL]
    rows = []
    for row in r.against.rows:
        if row.reason:
            continue
        here, there = (short_kernel(k) for k in (row.kernel, row.other_kernel))
        order = f"{here} on {asked}, {there} on {other}" if here != there else layer_names(row.other_order, layers)
        rows.append([f"`{row.key}`", share(row.differing / row.outputs), str(row.bits), number(row.relative_l2), order])
    for reason in dict.fromkeys(row.reason for row in r.against.rows if row.reason):
        rows.append([", ".join(f"`{row.key}`" for row in r.against.rows if row.reason == reason), "-", "-", "-", reason])
    return table(["kernel or label", "outputs that differ", "bits", "relative L2", "other order of summation on"], rows)


def caption(r: LabResult) -> str:
    """One line: what ran, on what, with which versions and inputs."""
    e = r.environment
    where = f"{e.gpu}, driver {e.driver}" if e.gpu else e.cpu
    versions = ", ".join(dict.fromkeys(c.version.split(",")[0] for c in r.columns if c.version.startswith("vLLM 0")))
    rows = sorted({i.M for i in r.inputs})
    tokens = f"M = {', '.join(map(str, rows))}"
    return (
        f"{r.model}; {r.dtype}, {tokens}; {where}; torch {e.torch}, triton {e.triton}"
        f"{f', {versions}' if versions else ''}; inputs {r.digest[:16]}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns behind the first are right-aligned."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@one_sentence("qlab.report.markdown")
def main(
    result: Annotated[Path, typer.Argument(help="JSON that python -m qlab.kernels --json wrote")],
    pairs: Annotated[str, typer.Option(help="comma-separated kernels for the pairwise table; all by default")] = "",
) -> None:
    """Print a result's tables as Markdown."""
    r = LabResult.read(result)
    keys = [k.strip() for k in pairs.split(",") if k.strip()]
    print(f"{caption(r)}\n\n{kernel_table(r)}\n\n{pair_table(r, keys)}")
    if r.against:
        print(f"\n{against_table(r)}")


if __name__ == "__main__":
    typer.run(main)
