"""Where a part runs: the device, its kernels, the engines that replay, and how much time is left."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlab.backends import failure, registry
from qlab.backends.registry import Kernel, Packed
from qlab.hardware import Gpu
from qlab.replay import Engine


@dataclass(frozen=True)
class Place:
    device: torch.device
    gpu: Gpu
    seconds: float = 150.0
    problems: int = 600
    """Of a part, at most."""
    kernel: Callable[[str], Kernel] = registry.kernel
    engine: Engine = "cuda"
    """That replays."""
    began: float = field(default_factory=time.monotonic)

    def over(self, share: float = 1.0) -> bool:
        """Whether a share of the time has passed."""
        return time.monotonic() - self.began > share * self.seconds

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - (time.monotonic() - self.began))

    def run(self, kernel: Kernel, x: Tensor, packed: Packed) -> Tensor:
        """The kernel's y, from memory that was NaN before, after the GPU has finished."""
        with poisoned():
            y = kernel.run(x, packed)
        failure.wait(self.device)
        return y


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN (the largest integer for counts): outputs and workspaces that are read before they are written
    show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def poisons(device: torch.device) -> bool:
    """Whether fresh memory is NaN inside :func:`poisoned` on this PyTorch."""
    with poisoned():
        return bool(torch.isnan(torch.empty(1000, dtype=torch.float16, device=device)).all())
