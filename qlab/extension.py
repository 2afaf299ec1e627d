"""The compiled CUDA module, or the reason why it is not there: a missing one is shown to the user and never an ImportError."""

from __future__ import annotations

import importlib
from typing import Any

BUILD = "`QLAB_BUILD_CUDA=1 pip install -e .`"


def cuda_module(function: str, what: str) -> tuple[Any, str]:
    """qlab._cuda and an empty string, or why what needs its ``function`` cannot run: one sentence that names ``what``.

    The module is None where it was not built; where it is older than the function it comes with the reason.
    """
    try:
        module = importlib.import_module("qlab._cuda")
    except ImportError as error:
        return None, f"qlab's CUDA module is not there ({error}); {BUILD} builds it where nvcc is"
    if not hasattr(module, function):
        return module, f"qlab's CUDA module was built before it had {what}; build it again: {BUILD}"
    return module, ""
