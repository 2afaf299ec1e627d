"""When Marlin's atomics take part, read from the recordings: the operator decides launch by launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RECORDINGS = sorted((Path(__file__).parents[2] / "results").glob("*/silicon.json"))


def within(m: int, n: int) -> bool:
    """The operator's bound on one launch of ``m`` rows, as qlab.backends.vllm_marlin states it."""
    return n * -(-m // 64) <= 2048


def launches(m: int) -> list[int]:
    """Rows of each launch: full tiles of 64 rows, then the rest."""
    return [rows for rows in (m // 64 * 64, m % 64) if rows]


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda p: p.parent.name)
def pairs(request: pytest.FixtureRequest) -> list[tuple[int, int, dict[str, Any], dict[str, Any]]]:
    """(M, N, record with atomics, record without) of every problem."""
    recording = json.loads(request.param.read_text())
    found = {(r["kernel"], r["problem"]): r for r in recording["records"]}
    out = []
    for (name, at), atomic in found.items():
        if name.endswith(".atomic"):
            problem = recording["problems"][at]
            n = recording["cases"][problem["case"]]["N"]
            out.append((problem["M"], n, atomic, found[name.removesuffix(".atomic"), at]))
    return out


def test_where_no_launch_is_small_enough_there_are_no_atomics(pairs) -> None:
    large = [(atomic, fp32) for m, n, atomic, fp32 in pairs if not any(within(rows, n) for rows in launches(m))]
    assert len(large) > 100
    assert all(atomic["repeatable"] and atomic["digest"] == fp32["digest"] for atomic, fp32 in large)


def test_the_last_rows_are_added_by_atomics_where_all_rows_together_would_not_be(pairs) -> None:
    mixed = [atomic for m, n, atomic, _ in pairs if not within(m, n) and any(within(rows, n) for rows in launches(m))]
    assert any(not atomic["repeatable"] for atomic in mixed)
