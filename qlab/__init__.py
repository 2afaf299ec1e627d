"""qlab says why two INT4 inference paths give different numbers."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

__version__ = "0.1.0"


def _map_triton_kernels() -> None:
    """Make ``qlab.triton_kernels`` importable from a bare checkout and an editable install.

    The Triton kernels live in ``kernels/`` at the repository's root. That folder has no ``__init__.py``: a regular package
    named ``kernels`` in the working directory would shadow Hugging Face's, which transformers imports. A wheel holds the
    files as ``qlab/triton_kernels``; anywhere else this builds the package from the folder beside ours.
    """
    name, here = "qlab.triton_kernels", Path(__file__).resolve().parent
    folder = here.parent / "kernels"
    if (here / "triton_kernels").is_dir() or name in sys.modules or not folder.is_dir():
        return
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    globals()["triton_kernels"] = module


_map_triton_kernels()
