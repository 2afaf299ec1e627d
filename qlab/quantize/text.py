"""Text into rows of tokens, the same rows every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError


def read_text(file: Path) -> str:
    """A UTF-8 text file. Raises QlabError naming the file when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise QlabError(f"cannot read the text {file}: {e}; give a UTF-8 text file") from None


def token_rows(tokenizer: Any, text: str, length: int, limit: int | None = None) -> Tensor:
    """int64 [rows, length]: the text's tokens without special ones, cut into rows, the rest dropped.

    With ``limit``, at most that many rows, spread evenly over the text. Raises QlabError when not one row is full.
    """
    if length < 2:
        raise QlabError(f"rows of {length} tokens predict nothing; take 2 or more")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    count = len(tokens) // length
    if count == 0:
        raise QlabError(
            f"the text has {len(tokens)} tokens, fewer than one row of {length}; give a longer text or shorter rows"
        )
    rows = tokens[: count * length].reshape(count, length)
    if limit is None or limit >= count:
        return rows
    return rows[torch.arange(limit) * count // limit]
