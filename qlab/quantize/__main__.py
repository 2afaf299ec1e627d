"""``python -m qlab.quantize``: a full-precision model directory and a text to an INT4 checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from qlab.command import one_sentence
from qlab.errors import QlabError
from qlab.quantize.llama import load, tokenizer
from qlab.quantize.model import Options, quantize_model, steps
from qlab.quantize.save import save
from qlab.quantize.text import read_text, token_rows


class Method(str, Enum):
    awq = "awq"
    gptq = "gptq"
    rtn = "rtn"


class Format(str, Enum):
    awq = "awq"
    gptq = "gptq"
    compressed_tensors = "compressed-tensors"


class Dtype(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"


_FORMAT = {Method.awq: Format.awq, Method.gptq: Format.gptq, Method.rtn: Format.compressed_tensors}


@one_sentence("qlab.quantize")
def main(
    method: Annotated[Method, typer.Option(help="How codes are chosen.")],
    model: Annotated[Path, typer.Option(help="Full-precision Llama directory, with its tokenizer.")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    text: Annotated[Path | None, typer.Option(help="Calibration text, UTF-8; rtn needs none.")] = None,
    group: Annotated[int, typer.Option(help="Rows per scale; -1 for whole columns.")] = 128,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Zero point 8, or fitted; awq: fitted, others: 8.")
    ] = None,
    act_order: Annotated[bool, typer.Option("--act-order", help="gptq: most active input channels first.")] = False,
    static_groups: Annotated[bool, typer.Option("--static-groups", help="gptq: fit every scale to the first weight.")] = False,
    damping: Annotated[
        float | None, typer.Option(help="gptq: part of the mean Hessian diagonal added to it; 0.01 by default.")
    ] = None,
    no_clip: Annotated[bool, typer.Option("--no-clip", help="awq: keep every range, search for no smaller one.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of scales and unquantised tensors.")] = Dtype.float16,
    format: Annotated[Format | None, typer.Option(help="Checkpoint layout; the method's own if left out.")] = None,
    version: Annotated[
        int | None, typer.Option(help="gptq layout: 1 stores zero points less one (default), 2 as they are.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Rows of calibration tokens at most; 128 by default.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row; 512 by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Quantise every projection of a Llama model to INT4, layer by layer, and write a checkpoint."""
    if version not in (None, 1, 2):
        raise QlabError(f"--version is 1 or 2, not {version}")
    layout = format or _FORMAT[method]
    only = {"--act-order": act_order, "--static-groups": static_groups, "--damping": damping is not None}
    _refuse(only, method is Method.gptq, f"--method gptq, not to {method.value}")
    _refuse({"--no-clip": no_clip}, method is Method.awq, f"--method awq, not to {method.value}")
    calibration = {"--text": text, "--samples": samples, "--length": length}
    _refuse({option: v is not None for option, v in calibration.items()}, method is not Method.rtn, "methods that calibrate")
    _refuse({"--version": version is not None}, layout is Format.gptq, f"the gptq layout, not to {layout.value}")
    options = Options(
        method=method.value,
        group_size=group,
        symmetric=method is not Method.awq if symmetric is None else symmetric,
        act_order=act_order,
        static_groups=static_groups,
        damping=0.01 if damping is None else damping,
        clip=not no_clip,
        dtype=getattr(torch, dtype.value),
    )
    if out.exists() and not overwrite:
        raise QlabError(f"{out} exists already; choose another --out or pass --overwrite")
    network = load(model)
    batches = _calibration(model, text, length or 512, 128 if samples is None else samples) if method is not Method.rtn else ()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(method.value, total=steps(network))
        result = quantize_model(network, batches, options, lambda name: bar.update(task, advance=1, description=name))
    save(out, layout.value, result, model, options.dtype, version=2 if version == 2 else 1, overwrite=overwrite)
    typer.echo(f"{out}: {len(result.weights)} linears by {method.value}, group {group}, {layout.value} layout")


def _refuse(given: dict[str, bool], belongs: bool, to: str) -> None:
    """Refuse options that would change nothing."""
    if not belongs and (unused := [option for option, was in given.items() if was]):
        raise QlabError(f"{unused[0]} belongs to {to}; leave it out")


def _calibration(model: Path, text: Path | None, length: int, samples: int) -> tuple[torch.Tensor, ...]:
    if text is None:
        raise QlabError("awq and gptq need --text FILE, the calibration text")
    if samples < 1:
        raise QlabError(f"--samples must be 1 or more, not {samples}")
    return token_rows(tokenizer(model), read_text(text), length, samples).split(8)


if __name__ == "__main__":
    typer.run(main)
