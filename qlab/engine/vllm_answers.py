"""From what vLLM's ``LLM`` returns to rows of log-probabilities. Nothing of vLLM is imported.

vLLM lists, for each position, the token that is there and then the k most probable ones, so a position has k or k + 1
different ids. Two forms are read: ``FlatLogprobs`` (lists over all positions, with the start and end of each) and lists of
dicts from id to an object with ``logprob``. A prompt's first position has none: nothing comes before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.engine.run import Request, Scored
from qlab.engine.sampling import largest
from qlab.errors import QlabError

SMALL = 4096
"""Vocabularies up to this size are asked for whole where ids are wanted."""
MORE = 1000
"""Log-probabilities asked for where ids are wanted of a larger vocabulary."""
MARGIN = 16
"""Asked for beyond the top k: vLLM's choice among equal ones at the edge is not the smallest id."""
BLOCK = 2**24
"""Log-probabilities that are held at once while rows are ranked."""


class Listed(NamedTuple):
    """What vLLM lists for a run of positions, all in one row of numbers."""

    counts: Tensor
    """int64 [positions]: entries of each."""
    ids: Tensor
    """int64 [entries]."""
    logprobs: Tensor
    """float32 [entries]."""


def how_many(request: Request, vocabulary: int) -> int:
    """Log-probabilities per position to ask vLLM for."""
    if not request.top_k:
        return vocabulary
    if request.wanted is None:
        return min(request.top_k + MARGIN, vocabulary)
    return vocabulary if vocabulary <= SMALL else min(max(request.top_k + MARGIN, MORE), vocabulary)


def read(listed: Any) -> Listed:
    """All positions of a ``FlatLogprobs`` or of a list of dicts; those without any have a count of 0."""
    if hasattr(listed, "start_indices"):
        counts = [b - a for a, b in zip(listed.start_indices, listed.end_indices, strict=True)]
        ids, logprobs = listed.token_ids, listed.logprobs
    else:
        counts = [len(p or ()) for p in listed]
        ids = [i for p in listed for i in p or ()]
        logprobs = [v.logprob for p in listed for v in (p or {}).values()]
    values = torch.tensor(logprobs, dtype=torch.float32)
    return Listed(torch.tensor(counts, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64), values)


def scored(request: Request, sequence: int, prompt: Any, sampled: Any, tokens: Sequence[int], vocabulary: int) -> Scored:
    """One sequence from vLLM's ``prompt_logprobs``, its ``logprobs`` and the token ids that it generated.

    Raises QlabError where tokens or positions are missing, or the forced ones were not taken.
    """
    asked, new = request.prompts[sequence], request.new_tokens
    if len(tokens) != new:
        raise QlabError(f"vLLM generated {len(tokens)} tokens for prompt {sequence}, not {new}")
    if request.forced is not None and tuple(tokens) != request.forced[sequence]:
        raise QlabError(f"vLLM did not take the tokens forced after prompt {sequence}")
    before, after = read(prompt), read(sampled)
    found = (len(before.counts), int((before.counts[1:] > 0).sum()), int((after.counts > 0).sum()))
    if found != (len(asked), len(asked) - 1, new) or int(before.counts[0]):
        raise QlabError(f"vLLM gave log-probabilities for {found[1]} and {found[2]} of {len(asked) - 1} and {new} positions")
    rows = Listed(*(torch.cat(parts) for parts in zip((before.counts[1:], *before[1:]), after, strict=True)))
    wanted = None if request.wanted is None else request.wanted[sequence]
    ids, logprobs = rank(rows, request.top_k, wanted, vocabulary)
    return Scored(torch.tensor([*asked, *tokens], dtype=torch.int64), len(asked), ids, logprobs)


def rank(rows: Listed, top_k: int, wanted: Tensor | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """int64 and float32 [rows, k (+ w)]: the largest first, the smaller id first among equals; then the wanted ids.

    ``top_k`` 0 gives all ids in order. A wanted id that a position does not list has NaN.
    """
    ids, logprobs = [], []
    ends = rows.counts.cumsum(0)
    step = max(BLOCK // vocabulary, 1)
    for first in range(0, len(ends), step):
        counts = rows.counts[first : first + step]
        entries = slice(int(ends[first] - counts[0]), int(ends[first + len(counts) - 1]))
        everywhere = torch.full((len(counts), vocabulary), float("nan"))
        everywhere[torch.arange(len(counts)).repeat_interleave(counts), rows.ids[entries]] = rows.logprobs[entries]
        found = torch.arange(vocabulary).repeat(len(counts), 1)
        if top_k:
            found = largest(everywhere.nan_to_num(nan=float("-inf")), min(top_k, vocabulary))
        if wanted is not None:
            found = torch.cat((found, wanted[first : first + step]), 1)
        ids.append(found)
        logprobs.append(everywhere.gather(1, found))
    return torch.cat(ids), torch.cat(logprobs)
