"""The lab's result as Markdown tables, for a README or an issue: ``python -m qlab.report.markdown RESULT.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qlab.command import one_sentence
from qlab.errors import QlabError
from qlab.lab.results import TOTAL, LabResult
from qlab.report.terminal import class_letters, number, share


def kernel_table(r: LabResult) -> str:
    """Every kernel that ran: error against float64, repeatability, bitwise class."""
    letters = class_letters(r)
    rows = []
    for key in r.ran():
        c = r.cell(TOTAL, key)
        if c.error is None:
            continue
        same = "-" if c.repeatable is None else "yes" if c.repeatable else f"no ({number(c.noise_floor or 0.0)})"
        rows.append([f"`{key}`", number(c.error.relative_l2), f"{c.error.ulp_median:.2f}", same, letters.get(key, "")])
    return table(["kernel", "relative L2 error", "median ULP", "repeats (noise floor)", "bitwise class"], rows)


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


if __name__ == "__main__":
    typer.run(main)
