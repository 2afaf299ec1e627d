"""Options that several subcommands share. Nothing heavy is imported, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlab.errors import QlabError

if TYPE_CHECKING:
    from qlab.engine.path import Path as EnginePath
    from qlab.logprobs.engines import Choice
    from qlab.logprobs.manifest import Model

CHUNK = 50
"""Tokens of a step at most: what keeps gptq off cuBLAS (awq needs 255), and the same for every method."""

Method = Annotated[str, typer.Option(help="vLLM's label (awq, awq_marlin, gptq, gptq_marlin) or a kernel's registry name")]
Hardware = Annotated[
    str, typer.Option(help="GPU whose kernels compute, replayed where this machine has another: h100, a100, ...")
]
ModelOption = Annotated[Path | None, typer.Option(help="checkpoint directory; the shipped one of the method by default")]
Dispatch = Annotated[str, typer.Option(help="[b]pinned[/]: Marlin on every GPU; [b]vllm[/]: vLLM's own choice")]
Engine = Annotated[str, typer.Option(help="[b]builtin[/], or [b]vllm[/]: vLLM's own LLM, which needs the GPU and the extra")]
Dtype = Annotated[str, typer.Option(help="float16 or bfloat16")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; the GPU where there is one")]
Out = Annotated[Path | None, typer.Option(help="directory of the trace to write")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a trace that is there")]
Json = Annotated[Path | None, typer.Option(help="write what is printed here, as JSON")]


def parse_path(method: str, hw: str, dispatch: str) -> EnginePath:
    """The path of --method, --hw and --dispatch. Raises QlabError."""
    from qlab.engine.path import Path as EnginePath

    return EnginePath(method, hw.lower(), dispatch)  # type: ignore[arg-type]


def parse_top_k(text: str) -> int:
    """``--top-k``: a number, 0 for ``all``. Raises QlabError."""
    if text == "all":
        return 0
    if not text.isdecimal():
        raise QlabError(f"--top-k {text!r} is neither a number nor all")
    return int(text)


def choose(path: EnginePath, model: Path | None, engine: str, device: str | None, dtype: str) -> tuple[Choice, Model]:
    """The engine to make and its checkpoint's identity. Raises QlabError naming the option or file."""
    from qlab.command import torch_device
    from qlab.logprobs.engines import Choice, default_directory
    from qlab.logprobs.model import identify

    choice = Choice(model or default_directory(path), path, torch_device(device), engine, dtype)
    return choice, identify(choice.directory)
