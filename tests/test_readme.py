"""README.md tells the truth: its tables are what the files under results/ hold, its commands and files exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from bench.readme import BLOCK, filled

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_tables_are_what_the_results_hold() -> None:
    assert len(BLOCK.findall(TEXT)) >= 4
    assert filled(TEXT) == TEXT, "run python -m bench.readme"


def test_a_changed_figure_is_seen() -> None:
    table = next(m for m in BLOCK.finditer(TEXT) if "e-4 |" in m.group(0)).group(0)
    assert filled(TEXT.replace(table, table.replace("e-4 |", "e-5 |", 1))) == TEXT


def test_commands_exist() -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT)) - {"pytest"}
    assert {"qlab.kernels", "qlab.quantize", "bench.gpu_session"} <= modules
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec, name
        if spec.submodule_search_locations:
            assert importlib.util.find_spec(f"{name}.__main__"), name


def test_files_exist() -> None:
    for name in re.findall(r"\]\(([^)#:]+)\)", TEXT) + re.findall(r"`((?:qlab|kernels|csrc|results|bench)/[\w/.]*)`", TEXT):
        assert (ROOT / name).exists(), name
