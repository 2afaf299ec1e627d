"""Finds and loads vLLM's compiled kernels without importing vLLM.

Importing vLLM changes the process (logging, inductor, environment) and needs its many dependencies; its operators need only
``_C.abi3.so``. It is looked for in the process, at ``QLAB_VLLM_EXTENSION`` and in an installed vLLM, in this order, and loaded
on first use. Nothing here raises: what is missing is a reason, which the kernels' ``supports`` hands on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qlab.errors import UnsupportedError

EXTENSION_VARIABLE = "QLAB_VLLM_EXTENSION"
SOURCE_VARIABLE = "QLAB_VLLM_SOURCE"
NEEDED = ("awq_gemm", "awq_dequantize", "gptq_gemm", "gptq_shuffle", "marlin_gemm", "gptq_marlin_repack")
UINT4 = 0x4000000000400
"""vLLM's ScalarType id of unsigned 4-bit codes with a zero point."""
UINT4B8 = 0x4000000100400
"""The same for 4-bit codes with the fixed zero point 8."""

_KNOWN = {
    "5040983da99a2c6a36721ecc80ca44997c66b62a8364b8eaf76f0b53c06cd1bf": "0.20.2",
    "e4ac8726ada44acddf35bb08585b45c967cdd0e7a2dd4b60fd0fed91b1b2f7cc": "0.20.2 (sm_90 and compute_80 code only)",
}
"""Builds known by content: the wheel on PyPI, and the same with the machine code of other GPUs zeroed."""


@dataclass(frozen=True)
class Extension:
    """The loaded file: where it lies, its sha256 and the vLLM version it belongs to."""

    path: Path
    sha256: str
    version: str

    def __str__(self) -> str:
        return f"vLLM {self.version}, sha256 {self.sha256[:16]}"


@dataclass(frozen=True)
class Missing:
    """Why there is no extension: one sentence with the mend."""

    reason: str


@lru_cache(maxsize=1)
def extension() -> Extension | Missing:
    """The loaded extension or the reason why it is missing; looked for once in a process."""
    if not torch.cuda.is_available():
        return Missing("needs a CUDA GPU")
    path = find()
    if isinstance(path, Missing):
        return path
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return Missing(_why_not_loaded(path, error))
    lacking = [name for name in NEEDED if not hasattr(torch.ops._C, name)]
    if lacking:
        return Missing(f"{path} is not vLLM's extension: it has no operator {lacking[0]}")
    sha256 = _sha256(path)
    return Extension(path, sha256, _version(path, sha256))


def operators() -> Any:
    """``torch.ops._C`` with vLLM's operators in it. Raises UnsupportedError with the reason when there are none."""
    found = extension()
    if isinstance(found, Missing):
        raise UnsupportedError(f"vLLM's kernels: {found.reason}")
    return torch.ops._C


def find() -> Path | Missing:
    """The extension's file, not loaded. A copy that this process has loaded already wins: a second one cannot register."""
    loaded = sys.modules.get("vllm._C")
    if loaded is not None and getattr(loaded, "__file__", None):
        return Path(str(loaded.__file__))
    named = os.environ.get(EXTENSION_VARIABLE)
    if named:
        if not Path(named).is_file():
            return Missing(f"{EXTENSION_VARIABLE}={named} is not a file; give the path of vLLM's _C.abi3.so")
        return Path(named)
    root = installed_root()
    if root is None:
        return Missing(f"vLLM's extension not found: install the extra vllm or set {EXTENSION_VARIABLE}")
    path = root / "_C.abi3.so"
    if not path.is_file():
        return Missing(f"{path} is missing: the installed vLLM has no CUDA kernels; install a CUDA build")
    return path


def installed_root() -> Path | None:
    """The package folder of an installed vLLM, found without importing it."""
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):  # ValueError: a stand-in module without a spec
        return None
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def source(relative: str) -> Path | Missing:
    """A Python file of vLLM, e.g. ``model_executor/layers/quantization/awq_triton.py``.

    Looked for at ``QLAB_VLLM_SOURCE`` (the file, the folder that holds it, or the package folder ``vllm``), beside the
    extension and in an installed vLLM.
    """
    name = Path(relative).name
    named = os.environ.get(SOURCE_VARIABLE)
    if named:
        base = Path(named)
        for path in (base, base / relative, base / "vllm" / relative, base / name):
            if path.is_file():
                return path
        return Missing(f"{SOURCE_VARIABLE}={named} does not hold vLLM's {name}")
    extension_file = os.environ.get(EXTENSION_VARIABLE)
    folders = [Path(extension_file).parent / name] if extension_file else []
    root = installed_root()
    if root is not None:
        folders.append(root / relative)
    for path in folders:
        if path.is_file():
            return path
    return Missing(f"vLLM's {name} not found: install the extra vllm or set {SOURCE_VARIABLE}")


def _why_not_loaded(path: Path, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "undefined symbol" in first or "cannot open shared object" in first:
        return (
            f"{path} does not load under torch {torch.__version__} ({first}); "
            "install the torch that this vLLM was built for, with the same CUDA version"
        )
    return f"{path} does not load ({first}); check that it is vLLM's _C.abi3.so for this machine"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _version(path: Path, sha256: str) -> str:
    """By content where the file is a known one, then by the installed distribution it belongs to."""
    if sha256 in _KNOWN:
        return _KNOWN[sha256]
    if path.parent == installed_root():
        try:
            return importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"unknown (sha256 {sha256[:16]})"
