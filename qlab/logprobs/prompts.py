"""Prompts as token ids: from a text file, a JSON file, or the held-out text of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlab import data
from qlab.errors import QlabError
from qlab.quantize.llama import tokenizer
from qlab.quantize.text import token_rows

Prompts = tuple[tuple[int, ...], ...]
COUNT, LENGTH = 12, 100
"""Prompts that are cut from the held-out text, and tokens of each."""
LARGEST = 64 * 2**20
"""Bytes of the longest file of prompts."""


def heldout(directory: Path, count: int = COUNT, length: int = LENGTH) -> Prompts:
    """``count`` prompts of ``length`` tokens, spread evenly over the held-out text, the same every time; no special tokens.

    Raises QlabError where the model in ``directory`` has no tokenizer of its own or the text is too short.
    """
    if count < 1 or length < 2:
        raise QlabError(f"{count} prompts of {length} tokens: ask for 1 or more of 2 or more tokens")
    rows = token_rows(tokenizer(directory), data.heldout_text(), length, count)
    if len(rows) < count:
        raise QlabError(f"the held-out text has {len(rows)} prompts of {length} tokens, not {count}; ask for fewer or shorter")
    return tuple(tuple(row) for row in rows.tolist())


def from_file(file: Path, directory: Path, tokens: int | None = None) -> Prompts:
    """Prompts of a UTF-8 text (one a line, blank lines skipped) or a ``.json`` list of strings or of lists of token ids.

    Text goes through the tokenizer in ``directory``, special tokens included; ``tokens`` cuts longer prompts. Raises QlabError
    naming the file and the prompt.
    """
    if tokens is not None and tokens < 1:
        raise QlabError(f"prompts of {tokens} tokens: ask for 1 or more")
    listed = _json(file) if file.suffix.lower() == ".json" else _lines(file)
    if not listed:
        raise QlabError(f"{file} holds no prompt; write one a line")
    made = {}
    texts = {place: p for place, p in listed.items() if isinstance(p, str)}
    encode: Any = tokenizer(directory) if texts else None
    for place, prompt in listed.items():
        ids = encode(prompt, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt
        if not ids:
            raise QlabError(f"{file}: {place} has no token; remove it")
        made[place] = tuple(ids[:tokens])
    return tuple(made.values())


def _lines(file: Path) -> dict[str, Any]:
    return {f"line {n}": line for n, line in enumerate(_text(file).splitlines(), 1) if line.strip()}


def _json(file: Path) -> dict[str, Any]:
    try:
        plain = json.loads(_text(file))
    except (ValueError, RecursionError) as e:
        raise QlabError(f"{file} is not JSON: {e}") from None
    if not isinstance(plain, list):
        raise QlabError(f"{file} holds no list; write a list of strings or of lists of token ids")
    for n, prompt in enumerate(plain, 1):
        ids = isinstance(prompt, list) and all(type(t) is int and t >= 0 for t in prompt)
        if not (isinstance(prompt, str) or ids):
            raise QlabError(f"{file}: prompt {n} is neither a string nor a list of token ids")
    return {f"prompt {n}": prompt for n, prompt in enumerate(plain, 1)}


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > LARGEST:
            raise QlabError(f"{file} has more than {LARGEST} bytes; name a file of prompts")
        return file.read_text("utf-8")
    except OSError as e:
        raise QlabError(f"cannot read the prompts {file}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise QlabError(f"{file} is not UTF-8 text") from None
