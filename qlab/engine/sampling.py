"""From logits to log-probabilities, to the largest of them, to the next token."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from qlab.engine.run import Sampling
from qlab.errors import QlabError


def check(sampling: Sampling) -> None:
    """Raise QlabError for a temperature that is none."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise QlabError(f"the temperature must be 0 (greedy) or a positive number, not {sampling.temperature}")


def largest(logprobs: Tensor, k: int) -> Tensor:
    """int64 [rows, k]: ids of the k largest of float32 ``logprobs`` [rows, V], largest first, smaller id first among equals."""
    bits = (logprobs + 0.0).view(torch.int32)  # -0 + 0 is +0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    size = logprobs.shape[-1]
    key = (ascending << 32) + torch.arange(size - 1, -1, -1, device=logprobs.device)
    return key.topk(k, dim=-1).indices


def draw(logprobs: Tensor, sampling: Sampling, sequence: int, position: int) -> int:
    """The token at ``position``, drawn from float64 ``logprobs`` [V] at a temperature above 0.

    The number that decides is a hash of seed, sequence and position; ids are summed in ascending order, in float64.
    """
    scaled = logprobs.cpu() / sampling.temperature
    cumulative = torch.cumsum((scaled - scaled.max()).exp(), 0)
    target = uniform(sampling.seed, sequence, position) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, target, right=True)), len(cumulative) - 1)


def uniform(seed: int, sequence: int, position: int) -> float:
    """A number in [0, 1): 53 bits of a sha256."""
    digest = hashlib.sha256(f"qlab draw {seed} {sequence} {position}".encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53
