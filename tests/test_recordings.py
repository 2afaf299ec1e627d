"""Recordings of real kernels under ``results/``: any machine re-creates their inputs, and their samples fit float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.record_silicon import DTYPES, Case, make_activations, make_weight, sample_positions
from qlab.compare import digest

RESULTS = Path(__file__).parent.parent / "results"
RECORDINGS = sorted(RESULTS.glob("*/silicon.json"))
SMALL = 48 * 1024
"""Weights of at most so many elements, so that the test stays quick."""


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda p: p.parent.name)
def recording(request: pytest.FixtureRequest) -> tuple[dict[str, Any], np.ndarray]:
    path: Path = request.param
    return json.loads(path.read_text()), np.load(path.with_suffix(".npz"))["bits"]


def test_there_is_a_recording() -> None:
    assert RECORDINGS, "results/*/silicon.json is missing; record one with bench/record_silicon.py on a GPU"


def case_of(entry: dict[str, Any]) -> Case:
    plain = {name: entry[name] for name in Case.__dataclass_fields__}
    return Case(**{**plain, "tokens": tuple(plain["tokens"])})


def test_inputs_are_made_again_bit_for_bit(recording: tuple[dict[str, Any], np.ndarray]) -> None:
    result, _ = recording
    weights = [c for c in result["cases"] if c["K"] * c["N"] <= SMALL]
    assert len(weights) > 20
    for c in weights:
        assert make_weight(case_of(c)).digest() == c["weight_digest"]
    small = [p for p in result["problems"] if result["cases"][p["case"]]["K"] * p["M"] <= SMALL // 4]
    assert len(small) > 50
    for p in small:
        c = result["cases"][p["case"]]
        assert digest(make_activations(c["values"], p["M"], c["K"], c["dtype"], p["seed"])) == p["input_digest"]


def test_samples_lie_as_far_from_float64_as_the_whole_output(recording: tuple[dict[str, Any], np.ndarray]) -> None:
    """The sample of a record with a known error: relative L2 within a factor of the recorded one, for every kernel."""
    result, bits = recording
    kernels = set()
    for record in result["records"]:
        problem = result["problems"][record["problem"]]
        c = result["cases"][problem["case"]]
        if "digest" not in record or c["K"] * c["N"] > SMALL or problem["M"] * c["N"] < 512:
            continue
        kernels.add(record["kernel"])
        w = make_weight(case_of(c))
        x = make_activations(c["values"], problem["M"], c["K"], c["dtype"], problem["seed"])
        exact = (x.double() @ w.dequantize(torch.float64)).flatten()
        taken = exact[torch.from_numpy(sample_positions(exact.numel()))]
        start, count = record["sample"]
        y = torch.from_numpy(bits[start : start + count].view(np.int16).copy()).view(DTYPES[c["dtype"]]).double()
        error = float((y - taken).norm() / taken.norm()) if float(taken.norm()) else float((y - taken).norm())
        assert error <= 3 * record["error"] + 1e-12, (record["kernel"], c, problem["M"])
    assert {"vllm.awq_gemm", "vllm.marlin.awq", "vllm.marlin.gptq", "vllm.machete.awq", "vllm.gptq_gemm"} <= kernels


def test_every_probe_found_the_packed_weight(recording: tuple[dict[str, Any], np.ndarray]) -> None:
    result, _ = recording
    found = [p["result"]["mismatches"] for p in result["probes"] if "result" in p]
    assert len(found) > 1000
    assert set(found) == {0}
