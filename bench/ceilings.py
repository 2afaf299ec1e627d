"""What a device reaches at its best: memory by a copy and by a sum, matrix products by a large square one."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from bench import timing
from bench.layer_results import Ceilings

SIDE = {"cuda": 8192, "cpu": 256}
TIMES = 15


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Medians on random data, on the current stream."""
    copy = timing.copy_ceiling(device)
    size = 1 << (29 if device.type == "cuda" else 22)
    read = 4 * size / _median(torch.zeros(size, dtype=torch.float32, device=device).sum, device)
    side = SIDE[device.type]
    a, b = (torch.randn((side, side), device=device).to(dtype) for _ in range(2))
    return Ceilings(copy=copy, read=read, matmul=2 * side**3 / _median(lambda: a @ b, device))


def _median(run: Callable[[], object], device: torch.device) -> float:
    watch = timing.stopwatch(device)
    calls: list[Callable[[], None]] = [lambda: (run(), None)[1]] * TIMES
    watch(calls[: timing.WARM_UP])
    return statistics.median(watch(calls))
