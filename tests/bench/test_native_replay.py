"""Rows of a trace against their replay: the engine's own agree, a changed one is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import native_replay
from bench.vllm_experiment import Engines
from qlab import data
from qlab.engine.builtin import Builtin
from qlab.engine.path import Path
from qlab.engine.run import Request, Tap
from qlab.engine.schedule import Batching
from qlab.logprobs.experiment import Plan
from qlab.logprobs.record import record

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["awq_marlin", "gptq"])
def test_tapped_rows_are_replayed(method):
    path = Path(method, "h100")
    directory = data.model_directory(path.source)
    engine = Builtin(directory, path, CPU)
    engine.directory = directory
    taps = frozenset(Tap("model.layers.0.self_attn.qkv_proj", 0, p) for p in (0, 3, 5))
    made = record(engine, Request(((5, 6, 7, 8, 9),), 2, batching=Batching(3), taps=taps))
    (found,) = native_replay.compare_trace(made, "t", directory, CPU)
    if method == "gptq":
        assert found.reason == "atomics: no one answer"
        return
    assert (found.kernel, found.M, found.rows, found.outputs, found.differing) == ("vllm.marlin.awq", (1, 2, 3), 3, 3072, 0)
    rows = made.run.rows
    broken = rows[1].y.clone()
    broken.view(torch.int16)[[4, 700]] ^= 1
    changed = replace(made, run=replace(made.run, rows=(rows[0], replace(rows[1], y=broken))))
    (off,) = native_replay.compare_trace(changed, "t", directory, CPU)
    assert off.differing == 2


def test_paths_are_compared_by_digests():
    plan = Plan((Path("awq", "h100"),), ((5, 6, 7),), 2)
    both = Engines({}, "builtin", batching=Batching(50)), Engines({}, "replay", batching=Batching(50))
    found = native_replay.compare_path(plan, plan.paths[0], *both)
    assert (found.rows, found.differing, found.first, found.logprobs_differing) == (12 * 4, 0, "", 0)
    assert found.reason == "the first run was not native"

    class Other:
        def bench(self, path):
            return both[1].bench(Path("awq_marlin", "h100"))

    apart = native_replay.compare_path(plan, plan.paths[0], both[0], Other())
    assert 0 < apart.differing <= apart.rows
    assert apart.first == "model.layers.0.self_attn.qkv_proj, sequence 0, position 0"
