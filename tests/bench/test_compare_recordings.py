"""Two recordings are compared output by output, and only when they are of the same problems."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bench.compare_recordings import compare
from qlab.errors import QlabError

RESULTS = Path(__file__).parent.parent.parent / "results"


def recording(digests: list[str], repeatable: list[bool]) -> dict:
    records = [
        {"kernel": "k", "problem": i, "digest": d, "repeatable": r}
        for i, (d, r) in enumerate(zip(digests, repeatable, strict=True))
    ]
    return {
        "problems": [{"input_digest": f"x{i}"} for i in range(len(digests))],
        "cases": [{"weight_digest": "w"}],
        "extension": {"sha256": "e"},
        "environment": {"gpu": "G", "driver": "1"},
        "records": [*records, {"kernel": "k", "problem": 0, "reason": "refused"}],
    }


def test_counts() -> None:
    a = recording(["1", "2", "3", "4"], [True, True, True, False])
    b = recording(["1", "2", "9", "8"], [True, False, True, True])
    (k,) = compare(a, b).kernels
    assert (k.problems, k.repeatable, k.equal) == (4, 2, 1)


@pytest.mark.parametrize(
    ("part", "what"), [("problems", "inputs"), ("cases", "weights"), ("extension", "builds of vLLM")], ids=str
)
def test_recordings_of_other_problems_are_refused(part: str, what: str) -> None:
    a = recording(["1"], [True])
    b = copy.deepcopy(a)
    entry = b[part] if part == "extension" else b[part][0]
    entry[next(iter(entry))] = "other"
    with pytest.raises(QlabError, match=f"different {what}"):
        compare(a, b)


def test_h100_and_h200_are_one_function_where_the_order_is_fixed() -> None:
    """The claim of README.md, from the recordings themselves: only cuBLAS differs."""
    a, b = (json.loads((RESULTS / gpu / "silicon.json").read_text()) for gpu in ("h100", "h200"))
    found = {k.name: k for k in compare(a, b).kernels}
    assert len(found) == 12
    assert {name for name, k in found.items() if k.equal != k.repeatable} == {"vllm.awq_dequantize"}
