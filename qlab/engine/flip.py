"""Noise of a known size: some elements of attention's outputs moved by one unit in the last place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.errors import QlabError

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Flip:
    """Stands in for another attention kernel: ``share`` of the elements of each ``o_proj`` input, after it was rounded, become
    the next number up or down. A hash of seed, layer, sequence, position and element chooses, so batching changes nothing.

    Raises QlabError for a share outside 0 to 1.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise QlabError(f"the share of flipped elements must be 0 to 1, not {self.share}")

    def apply(self, x: Tensor, layer: int, places: Sequence[tuple[int, int]]) -> Tensor:
        """x [rows, K] in fp16 or bf16 with its elements moved; ``places`` holds each row's sequence and position."""
        words = _words(self.seed, layer, places, x.shape[1])
        chosen = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.share
        step = np.where(words & np.uint64(1), 1, -1).astype(np.int16) * chosen
        return _moved(x, torch.from_numpy(step).to(x.device))


def _words(seed: int, layer: int, places: Sequence[tuple[int, int]], width: int) -> Words:
    """uint64 [rows, width]: splitmix64's finalizer over a row's own number and the element."""
    rows = [hashlib.sha256(f"{seed}:{layer}:{sequence}:{position}".encode()).digest()[:8] for sequence, position in places]
    z = np.array([int.from_bytes(r, "little") for r in rows], np.uint64)[:, None]
    z = z + np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _moved(x: Tensor, step: Tensor) -> Tensor:
    """x with each element moved by -1, 0 or 1 units; what is not finite, or would not be, stays."""
    bits = x.view(torch.int16).int()
    ascending = torch.where(bits < 0, -(bits & 0x7FFF), bits)  # numbers in order; both zeros are 0
    moved = ascending + step
    most = int(torch.tensor(torch.finfo(x.dtype).max, dtype=x.dtype).view(torch.int16))
    back = torch.where(moved < 0, -moved | 0x8000, moved)
    keep = (step == 0) | (moved.abs() > most) | (ascending.abs() > most)
    return torch.where(keep, bits, back).to(torch.int16).view(x.dtype)
