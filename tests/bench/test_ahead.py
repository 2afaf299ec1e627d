"""Engines that run at the same time give the cells that one after another gives, and a broken one costs its own alone."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from bench import vllm_experiment
from bench.ahead import Ahead, compute_ahead
from qlab.engine.path import Path
from qlab.errors import QlabError
from qlab.logprobs.cells import Bench, Store
from qlab.logprobs.experiment import Plan, compute
from tests.logprobs.fake_engine import FakeEngine

PATHS = (Path("awq", "h100"), Path("awq_marlin", "h100"), Path("gptq_marlin", "h100"))
PLAN = Plan(PATHS, ((5, 6, 7, 9), (8, 1, 3)), new_tokens=3)


class Counted(FakeEngine):
    """Shifted by its path, so that paths differ; counts its runs and notes its threads."""

    def __init__(self, path, broken=False):
        super().__init__(path, shift=PATHS.index(path) / 16)
        self.runs, self.threads, self.broken = 0, set(), broken

    def run(self, request, advance=lambda tokens: None):
        self.runs += 1
        self.threads.add(threading.current_thread().name)
        if self.broken:
            raise QlabError("the engine's process ended with status -9")
        return super().run(request, advance)


def benches(broken=()):
    return {p: Bench(Counted(p, p in broken), "model") for p in PATHS}


def flat(cells):
    for table in vars(cells).values():
        for found in table.values():
            yield from [found] if isinstance(found, str) else [t for s in found for t in (s.tokens, s.ids, s.logprobs)]


def test_the_cells_are_those_of_compute_and_each_run_is_made_once(tmp_path):
    one, all_at_once = benches(), benches()
    expected = compute(PLAN, one.__getitem__, Store())
    found = compute_ahead(PLAN, all_at_once.__getitem__, Ahead(tmp_path), lambda text: None)
    assert [list(t) for t in vars(found).values()] == [list(t) for t in vars(expected).values()]
    assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(expected), strict=True))
    assert [b.engine.runs for b in all_at_once.values()] == [b.engine.runs for b in one.values()]
    used = [b.engine.threads for b in all_at_once.values()]
    assert all(threading.main_thread().name not in names for names in used)
    again = benches()
    compute_ahead(PLAN, again.__getitem__, Ahead(tmp_path), lambda text: None)
    assert [b.engine.runs for b in again.values()] == [0, 0, 0]


def test_a_broken_engine_costs_its_own_cells_alone():
    made, told = benches({PATHS[1]}), []
    cells = compute_ahead(PLAN, made.__getitem__, Ahead(), told.append)
    assert cells.recordings[PATHS[1]] == "the engine's process ended with status -9"
    assert made[PATHS[1]].engine.runs == 1
    assert any("status -9" in line for line in told)
    good = [PATHS[0], PATHS[2]]
    assert all(not isinstance(cells.prefill[g, r], str) for g in good for r in good)
    assert all(isinstance(cells.prefill[g, PATHS[1]], str) for g in good)


def test_a_stand_in_for_a_second_gpu_has_signal_and_noise():
    class Kind:
        def __init__(self, shift):
            self.made = {}
            for p in PATHS[:2]:
                engine = Counted(p)
                engine.shift += shift
                self.made[p] = Bench(engine, "model", str(shift))

        def bench(self, path):
            return self.made[path]

    plan = replace(PLAN, paths=PATHS[:2])
    (same,) = vllm_experiment.stand_in(plan, (Kind(0.0), Kind(0.0)), ("a", "b"), Ahead())
    (apart,) = vllm_experiment.stand_in(plan, (Kind(0.0), Kind(0.25)), ("a", "b"), Ahead())
    assert same.methods == ("awq", "awq_marlin")
    assert same.noise.value == 0
    assert same.signal.value > 0
    assert same.snr.value == float("inf")
    assert apart.noise.value > same.signal.value / 2
    assert apart.snr.value == pytest.approx(apart.signal.value / apart.noise.value)


def test_options_are_read():
    paths = vllm_experiment.parse_paths("awq, gptq_marlin:vllm", "h200")
    assert [str(p) for p in paths] == ["awq@h200", "gptq_marlin@h200:vllm"]
    assert vllm_experiment.other_kind("attention=TRITON_ATTN") == {"attention_backend": "TRITON_ATTN"}
    assert vllm_experiment.other_kind("gpus=2") == {"tensor_parallel": 2}
    for text in ("gpus=two", "attention=", "batch=3"):
        with pytest.raises(QlabError, match="--against"):
            vllm_experiment.other_kind(text)
