"""``python -m qlab.reveal``: what a kernel sums in which order and arithmetic, found from outside with activations alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlab.command import FIGURES, answer, check_output, one_sentence, parse_shape
from qlab.errors import QlabError

if TYPE_CHECKING:
    import torch

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
@one_sentence("qlab.reveal")
def main(
    kernel: Annotated[
        str, typer.Argument(help="registry name, short form (marlin_gptq, awq_gemm), vLLM label, or torch.matmul")
    ],
    shape: Annotated[str, typer.Option(help="M,K,N of the layer")],
    hw: Annotated[str | None, typer.Option(help="GPU whose kernel is asked for; this machine's, or h100 without one")] = None,
    group: Annotated[int, typer.Option(help="group size; -1 for whole columns")] = 128,
    dtype: Annotated[str, typer.Option(help="fp16 or bf16 (fp32 for torch.matmul)")] = "fp16",
    row: Annotated[int, typer.Option(help="row of the output element")] = 0,
    column: Annotated[int, typer.Option(help="column of the output element")] = 0,
    replay: Annotated[bool, typer.Option("--replay", help="ask the replay of the recipe, even where the kernel runs")] = False,
    json: Annotated[Path | None, typer.Option(help="write the whole result here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the tree here (.png, .svg, .pdf)")] = None,
) -> None:
    """Reveal the order of summation of one output element, where it rounds, and where the group scale is applied."""
    check_output("--json", json)
    check_output("--plot", plot, FIGURES)
    m, k, n = parse_shape(shape, -1)
    if k < 4:
        raise QlabError(f"--shape {shape}: a sum of {k} has no order to reveal; K must be at least 4")
    if kernel != "torch.matmul":
        parse_shape(shape, group)
    if not (0 <= row < m and 0 <= column < n):
        raise QlabError(f"--row {row} --column {column} is not an element of the {m} x {n} output")
    # Heavy imports come after the options are read, so that --help answers at once.
    from qlab.reveal.figure import draw
    from qlab.reveal.run import reveal
    from qlab.reveal.subject import MATMUL, Asked
    from qlab.reveal.text import revealed_text

    size = k if group == -1 or kernel == MATMUL else group
    found = reveal(Asked(kernel, m, k, n, size, _dtype(dtype, kernel == MATMUL), row, column, hw, replay))
    answer(found, json, lambda: print(revealed_text(found)))
    if plot is not None:
        draw(found, plot)


def _dtype(name: str, wide: bool) -> torch.dtype:
    import torch

    from qlab.weights import DTYPES

    known = DTYPES | ({"fp32": torch.float32, "float32": torch.float32} if wide else {})
    if name not in known:
        raise QlabError(f"--dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


if __name__ == "__main__":
    app(prog_name="python -m qlab.reveal")
