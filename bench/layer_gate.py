"""No speed without a right answer: outputs against float64 on part of a large matrix, and every output written.

The exact sum is taken for random rows over all columns and for random columns over all rows, so that a tile of wrong outputs
anywhere lies in both. Outputs are NaN before a pass that is checked: what a kernel leaves out is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.gemm import FP16_SUMS, error_bound
from qlab.errors import UnsupportedError

ROWS, COLUMNS = 256, 1024
"""Rows and columns that are summed exactly; a smaller matrix wholly."""
WORST = 8.0
"""One output may lie this many bounds off, in root mean squares of the exact outputs: errors are spread like a normal variate,
whose largest of 10^8 is 6 deviations. A single output that is wrong altogether is off by one root mean square."""
CHUNK = 1 << 28
"""Elements of the weight in float64 at a time: 2 GiB."""


class Exact:
    """``x @ w`` in float64 for some rows and columns of one x [M, K] and one dequantised weight w [K, N]."""

    def __init__(self, x: Tensor, w: Tensor, seed: int = 0) -> None:
        m, (k, n) = len(x), w.shape
        g = torch.Generator().manual_seed(seed)
        self.shape, self.dtype = (m, n), x.dtype
        rows = torch.randperm(m, generator=g)[:ROWS].sort().values.to(x.device)
        self.rows = rows
        self.columns = torch.randperm(n, generator=g)[:COLUMNS].sort().values.to(x.device)
        some, step = x[rows].double(), max(1, CHUNK // k)
        self.by_rows = torch.cat([some @ w[:, i : i + step].double() for i in range(0, n, step)], 1)
        self.by_columns = x.double() @ w[:, self.columns].double() if m > ROWS else None
        self.scale = self.by_rows.square().mean().sqrt()

    def errors(self, y: Tensor) -> Tensor:
        """float64 [2] on y's device: relative L2 distance and the largest distance in root mean squares; NaN where not finite.

        Raises UnsupportedError for another shape or dtype.
        """
        if tuple(y.shape) != self.shape or y.dtype != self.dtype:
            raise UnsupportedError(f"output is {y.dtype} {list(y.shape)}, not {self.dtype} {list(self.shape)}")
        parts = [(y[self.rows] if len(y) > ROWS else y, self.by_rows)]
        if self.by_columns is not None:
            parts.append((y[:, self.columns], self.by_columns))
        relative, worst = [], []
        for got, exact in parts:
            off = got.double() - exact
            relative.append(off.square().sum().sqrt() / exact.square().sum().sqrt())
            worst.append(off.abs().amax() / self.scale)
        spoiled = torch.where(torch.isfinite(y).all(), 0.0, math.nan)
        return torch.stack((torch.stack(relative).amax(), torch.stack(worst).amax())) + spoiled


def bound(kernel: str, k: int, dtype: torch.dtype) -> float:
    """Relative L2 error that a sound kernel stays within (see bench.gemm); a swept kernel has that of the kernel it sweeps."""
    return error_bound(kernel.removesuffix(".best"), k, dtype)


def verdict(exact: Sequence[Exact], outputs: Sequence[Tensor], most: Callable[[int], float]) -> tuple[float, float, str]:
    """Largest relative L2 and largest single error of ``outputs`` (output i against ``exact[i]``), and why they are wrong.

    ``most(i)`` is the bound of output i. The reason is empty where every output is within its bound.
    """
    found = torch.stack([e.errors(y) for e, y in zip(exact, outputs, strict=True)]).tolist()
    for i, (relative, worst) in enumerate(found):
        limit = most(i)
        if not relative <= limit:  # a NaN is within no bound
            return relative, worst, f"wrong: relative L2 {relative:.2e} from float64 exceeds {limit:.2e}{_at(i, found)}"
        if not worst <= WORST * limit:
            off = f"an output is off by {worst:.2e} root mean squares, more than {WORST * limit:.2e}"
            return relative, worst, f"wrong: {off}{_at(i, found)}"
    return max(r for r, _ in found), max(w for _, w in found), ""


def _at(i: int, found: Sequence[object]) -> str:
    return f" (call {i + 1} of {len(found)})" if len(found) > 1 else ""


__all__ = ["FP16_SUMS", "WORST", "Exact", "bound", "verdict"]
