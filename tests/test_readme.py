"""README.md and docs/ tell the truth: tables are what the files under results/ hold, commands and files exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from bench.readme import BLOCK, PAGES, filled

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_what_the_results_hold(page: Path) -> None:
    text = page.read_text()
    assert len(BLOCK.findall(text)) >= {"README.md": 10, "log-probabilities.md": 7}.get(page.name, 0)
    assert filled(text) == text, "run python -m bench.readme"


def test_a_changed_figure_is_seen() -> None:
    table = next(m for m in BLOCK.finditer(TEXT) if "e-4 |" in m.group(0)).group(0)
    assert filled(TEXT.replace(table, table.replace("e-4 |", "e-5 |", 1))) == TEXT


def test_commands_exist() -> None:
    modules = {name for page in PAGES for name in re.findall(r"python -m ([\w.]+)", page.read_text())} - {"pytest"}
    assert {"qlab.kernels", "qlab.quantize", "bench.gpu_session"} <= modules
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec, name
        if spec.submodule_search_locations:
            assert importlib.util.find_spec(f"{name}.__main__"), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"`((?:qlab|kernels|csrc|results|bench)/[\w/.-]*)`", text):
        assert (ROOT / name).exists(), name
