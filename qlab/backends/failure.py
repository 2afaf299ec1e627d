"""What becomes of a kernel that raises: the reason of its own cell, unless it took the GPU with it."""

from __future__ import annotations

import torch

from qlab.errors import QlabError


def wait(device: torch.device) -> None:
    """Return when ``device`` has finished, so that a fault is met at the kernel that caused it, not at the next one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reason(error: Exception, name: str, device: torch.device) -> str:
    """The error of kernel ``name`` in one line: out of memory, a launch that failed, code that does not compile.

    Raises QlabError where the GPU no longer answers, as after an illegal memory access: nothing can run in this process then.
    """
    lines = str(error).strip().splitlines() or ["no message"]
    line = lines[0] if isinstance(error, QlabError) else f"{type(error).__name__}: {lines[0]}"
    try:
        wait(device)
    except RuntimeError as dead:
        raise QlabError(f"{name} stopped the GPU ({line}); run again without that kernel") from dead
    return line
