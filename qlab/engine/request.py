"""Refuses a request that a model cannot serve, before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlab.engine import sampling
from qlab.engine.run import Request
from qlab.errors import QlabError


def check(request: Request, vocabulary: int, longest: int, linears: Sequence[str]) -> None:
    """Raise QlabError unless a model of ``vocabulary`` ids, ``longest`` positions and these linears can serve the request."""
    sampling.check(request.sampling)
    count, new = len(request.prompts), request.new_tokens
    if not count:
        raise QlabError("there is no prompt; name one")
    if new < 1:
        raise QlabError(f"new_tokens must be 1 or more, not {new}")
    if request.top_k < 0:
        raise QlabError(f"top_k must be 0 (all) or more, not {request.top_k}")
    if request.seed < 0:
        raise QlabError(f"the seed of an order of atomics must be 0 or more, not {request.seed}")
    for i, prompt in enumerate(request.prompts):
        if not prompt:
            raise QlabError(f"prompt {i} is empty; it needs one token")
        if len(prompt) + new - 1 > longest:
            raise QlabError(
                f"prompt {i} has {len(prompt)} tokens, {len(prompt) + new - 1} with those to generate, and the model "
                f"takes {longest}; shorten it or new_tokens"
            )
        _ids(f"prompt {i}", prompt, vocabulary)
    if request.forced is not None:
        lengths = [len(f) for f in request.forced]
        if lengths != [new] * count:
            raise QlabError(f"forced must name {new} tokens for each of {count} prompts, not {lengths}")
        for i, forced in enumerate(request.forced):
            _ids(f"the tokens forced after prompt {i}", forced, vocabulary)
    _wanted(request, vocabulary)
    for tap in request.taps:
        if tap.linear not in linears:
            raise QlabError(f"there is no linear {tap.linear!r} to tap; the first is {linears[0]!r}")
        if not 0 <= tap.sequence < count or not 0 <= tap.position < len(request.prompts[tap.sequence]) + new - 1:
            raise QlabError(f"{tap.linear} cannot be tapped at position {tap.position} of sequence {tap.sequence}: none is fed")


def _wanted(request: Request, vocabulary: int) -> None:
    if request.wanted is None:
        return
    if len(request.wanted) != len(request.prompts):
        raise QlabError(f"wanted has ids for {len(request.wanted)} sequences, and there are {len(request.prompts)}")
    for i, ids in enumerate(request.wanted):
        rows = len(request.prompts[i]) + request.new_tokens - 1
        if ids.ndim != 2 or ids.shape[0] != rows or ids.dtype != torch.int64:
            raise QlabError(f"wanted ids of sequence {i} must be int64 [{rows}, w], not {ids.dtype} {list(ids.shape)}")
        if ids.numel():
            _ids(f"the wanted ids of sequence {i}", (int(ids.min()), int(ids.max())), vocabulary)


def _ids(what: str, ids: Sequence[int], vocabulary: int) -> None:
    bad = next((t for t in ids if not 0 <= t < vocabulary), None)
    if bad is not None:
        raise QlabError(f"{what}: token {bad} is not in the vocabulary of {vocabulary} ids; the two belong to different models")
