"""Options of the subcommands that run several paths. Nothing heavy is imported, so that --help answers at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qlab.errors import QlabError

PromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text, a prompt a line, or .json: strings or lists of token ids; cut from a held-out text if absent"
    ),
]
Tokens = Annotated[int | None, typer.Option(help="cut longer prompts; without --prompts tokens of each, 100", min=1)]
Count = Annotated[int | None, typer.Option(help="prompts without --prompts, 12", min=1)]
Awq = Annotated[Path | None, typer.Option(help="AWQ checkpoint; the shipped one by default")]
Gptq = Annotated[Path | None, typer.Option(help="GPTQ checkpoint; the shipped one by default")]
Out = Annotated[Path | None, typer.Option(help="folder that keeps finished runs, result.json and figures; run again to go on")]


def names(option: str, text: str) -> list[str]:
    """The parts of a comma-separated option. Raises QlabError where one is empty or named twice."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise QlabError(f"{option} {text!r}: name one or more, separated by commas")
    for part in parts:
        if parts.count(part) > 1:
            raise QlabError(f"{option} {text!r} names {part} twice; name each once")
    return parts


def check_top_k(top_k: int, vocabulary: int) -> None:
    """Raise QlabError where rows have fewer log-probabilities than ``--top-k`` asks for."""
    if top_k > vocabulary:
        raise QlabError(f"--top-k {top_k}: the model has {vocabulary} token ids; name {vocabulary} or fewer")


def given_prompts(file: Path | None, directory: Path, tokens: int | None, count: int | None) -> tuple[tuple[int, ...], ...]:
    """Token ids of ``--prompts``, or of the held-out text. Raises QlabError naming the option or file."""
    from qlab.logprobs import prompts

    if file is None:
        return prompts.heldout(directory, count or prompts.COUNT, tokens or prompts.LENGTH)
    if count is not None:
        raise QlabError("--count belongs to the held-out text; leave it out with --prompts")
    return prompts.from_file(file, directory, tokens)


def runs_folder(out: Path | None) -> Path | None:
    """``--out``'s folder of finished runs, made where it is missing. Raises QlabError where it cannot be."""
    if out is None:
        return None
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise QlabError(f"--out {out}: {e.strerror}; name a folder that can be made and written") from None
    for folder in (out, out / "runs"):
        if not os.access(folder, os.W_OK):
            raise QlabError(f"--out {out}: the folder {folder} cannot be written; name another")
    return out / "runs"
