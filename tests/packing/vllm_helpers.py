"""vLLM's own packing helpers, loaded without vLLM's dependencies: three source files and torch are enough.

The files come from ``QLAB_VLLM_SOURCE`` (a wheel, or a folder that holds or is the ``vllm`` package) or from an installed
vLLM, whose package is never imported: that would take its compiled extension and half a minute.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

UTILS = "vllm.model_executor.layers.quantization.utils"


class Helpers(NamedTuple):
    version: str
    quant: Any
    """vLLM's quant_utils."""
    marlin: Any
    """Its marlin_utils."""
    marlin_test: Any
    """Its marlin_utils_test."""


def find() -> Path | None:
    """Where vLLM's sources are, or None. Raises FileNotFoundError when the variable names nothing."""
    named = os.environ.get("QLAB_VLLM_SOURCE")
    if named:
        path = Path(named)
        if not path.exists():
            raise FileNotFoundError(f"QLAB_VLLM_SOURCE={named} does not exist; set it to vLLM's wheel or source folder")
        return path
    spec = importlib.util.find_spec("vllm")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def load(source: Path) -> Helpers:
    """The helpers of the wheel or folder ``source``."""
    read = _reader(source)
    found = re.search(r"__version__ = .*?['\"]([^'\"]+)['\"]", read("_version.py"))
    with _stand_ins():
        _execute("vllm.scalar_type", read)
        quant, marlin, test = (_execute(f"{UTILS}.{m}", read) for m in ("quant_utils", "marlin_utils", "marlin_utils_test"))
    return Helpers(found[1] if found else "unknown", quant, marlin, test)


def _reader(source: Path) -> Callable[[str], str]:
    """Reads a file of the package by its path below ``vllm/``."""
    if source.is_file():
        return lambda path: zipfile.ZipFile(source).read(f"vllm/{path}").decode()
    root = source / "vllm" if (source / "vllm").is_dir() else source
    return lambda path: (root / path).read_text(encoding="utf-8")


def _execute(name: str, read: Callable[[str], str]) -> ModuleType:
    path = name.removeprefix("vllm.").replace(".", "/") + ".py"
    module = sys.modules[name] = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    exec(compile(read(path), f"vllm/{path}", "exec"), module.__dict__)
    return module


@contextmanager
def _stand_ins() -> Iterator[None]:
    """What the helpers import but packing never calls, in place of vLLM's modules while the helpers are loaded."""
    platform = SimpleNamespace(fp8_dtype=lambda: torch.float8_e4m3fn, is_fp8_fnuz=lambda: False)
    names: dict[str, dict[str, Any]] = {
        "vllm": {"_custom_ops": SimpleNamespace()},
        "vllm.envs": {},
        "vllm.logger": {"init_logger": lambda name: None},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {"LinearBase": object},
        "vllm.model_executor.layers.quantization": {},
        "vllm.model_executor.layers.quantization.input_quant_fp8": {"QuantFP8": object},
        UTILS: {},
        f"{UTILS}.int8_utils": {"per_token_quant_int8": None},
        "vllm.platforms": {"current_platform": platform},
        "vllm.utils": {},
        "vllm.utils.platform_utils": {"num_compute_units": None},
    }
    before = {n: m for n, m in sys.modules.items() if n == "vllm" or n.startswith("vllm.")}
    for name in before:
        del sys.modules[name]
    try:
        for name, attributes in names.items():
            module = sys.modules[name] = ModuleType(name)
            module.__path__ = []
            module.__dict__.update(attributes)
        sys.modules["vllm"].__dict__["envs"] = sys.modules["vllm.envs"]
        yield
    finally:
        for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
            del sys.modules[name]
        sys.modules.update(before)
