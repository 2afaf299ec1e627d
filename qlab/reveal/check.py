"""Whether a revealed sum is the whole truth: random activations, the target's bits beside those of its replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlab.reveal.target import Model, Replayed, Target
from qlab.weights import Int4Weight

ROWS = 16
"""Rows like normal activations, and as many of many magnitudes."""
WINDOWS, PASSES = (64, 256, 1024), 4
"""k of the windows that are laid over K one after the other, and how often."""
BIG, SMALL = 2.0**6, 2.0**-11
"""Sums of some of the big ones lose bits of the small ones in fp32, and stay below fp16's largest number."""


def random_rows(members: Sequence[int], k: int, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Activations [R, k], zero but at ``members``: like normal ones, of many magnitudes, and windows of cancelling ones.

    A window has a large number in eight, and for each its negative; everything else is zero. So its sum is small, and what was
    rounded on the way shows in every bit. Windows of three sizes, and one as large as K, cover every k.
    """
    g = torch.Generator().manual_seed(seed)
    n = len(members)
    wide = torch.pow(2.0, torch.randint(-10, 4, (ROWS, n), generator=g).double())
    wide *= (torch.randint(0, 2048, (ROWS, n), generator=g).double() - 1024) / 1024
    found = [_bell(ROWS, n, g), wide]
    for size in (*(w for w in WINDOWS if w < n), n):
        for _ in range(PASSES):
            windows = torch.zeros((-(-n // size), n), dtype=torch.float64)
            for i, row in enumerate(windows):
                part = row[i * size : (i + 1) * size]
                part[:] = _cancelling(len(part), g)
            found.append(windows)
    rows = torch.zeros((sum(map(len, found)), k), dtype=dtype)
    rows[:, list(members)] = torch.cat(found).to(dtype)
    return rows


def _bell(rows: int, n: int, g: torch.Generator) -> Tensor:
    return (torch.randint(0, 65536, (12, rows, n), generator=g).double().sum(0) - 6 * 65535) / 65536


def _cancelling(n: int, g: torch.Generator) -> Tensor:
    row = _bell(1, n, g)[0] * SMALL
    pairs = max(n // 16, 1) if n > 1 else 0
    where = torch.randperm(n, generator=g)[: 2 * pairs]
    big = BIG * (1 + torch.randint(0, 64, (pairs,), generator=g).double() / 64)
    row[where[:pairs]], row[where[pairs:]] = big, -big
    return row


def differing(target: Target, model: Model, weight: Int4Weight, rows: Tensor, column: int = 0) -> int:
    """On how many of ``rows`` the target's bits are not those of the model."""
    said = Replayed(model, weight, column).ask(rows)
    found = target.ask(rows)
    return int((said.view("int64") != found.view("int64")).sum())
