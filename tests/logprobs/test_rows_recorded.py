"""Rows that vLLM's own engine recorded on an H100, judged here: the generator's class and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlab.logprobs import trace as traces
from qlab.logprobs.row_record import Recorded, check_places
from qlab.logprobs.rows import verify_by_replay
from tests.logprobs.row_cases import LAYERS, paths

FOLDER = Path(__file__).parents[2] / "results" / "h100" / "vllm" / "traces"
CANDIDATES = "awq@a100 awq@h100 awq_marlin@a100 awq_marlin@h100 awq_marlin@h200 awq_marlin@h100:vllm"
GPTQ = "gptq@h100 gptq_marlin@a100 gptq_marlin@h100 gptq_marlin@h200 gptq_marlin@h100:vllm awq@h100"


@pytest.mark.parametrize("folder", sorted(p.name for p in FOLDER.iterdir()) if FOLDER.is_dir() else [])
def test_the_generator_is_named(folder: str) -> None:
    given = traces.read(FOLDER / folder)
    rows = [Recorded.of(r) for r in given.run.rows][:24]
    check_places(rows, given.run.steps)
    own = str(given.manifest.path)
    found = verify_by_replay(rows, LAYERS, paths(CANDIDATES if own.startswith("awq") else GPTQ))
    assert len(rows) == 24
    assert len(found.survivors) == 1
    assert own in found.survivors[0]
    assert set(found.survivors[0]) <= {own, own.replace("h100", "h200")}
