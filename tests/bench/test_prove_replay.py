"""The proof's plan holds what it promises; a flipped bit, another GPU's kernel and an exception are listed by problem."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bench import proof, prove_replay
from bench.features import ACROSS, ACT_ORDER, BIAS, EXPONENTS, LAUNCHES, SPLIT, WHOLE, features
from bench.problems import Trial
from bench.proof_plan import FAMILIES, MARLIN, Task, part, plan, trials
from bench.prove_replay import Prover, prove
from qlab.backends.registry import kernel
from qlab.backends.vllm_extension import Extension
from qlab.hardware import gpu
from qlab.recipes import recipe
from qlab.serial import read_json, write_json
from tests.bench import stand_ins
from tests.bench.stand_ins import StandIn

H200 = gpu("h200")
BY_NAME = {f.name: f for f in FAMILIES}
SMALL = (
    Trial(3, 128, 128, 64, "fp16", "gptq", "plain", 1),
    Trial(20, 128, 128, 64, "fp16", "gptq", "plain", 1),
    Trial(2, 512, 64, 32, "fp16", "gptq", "wide", 2),
    Trial(2, 128, 64, -1, "bf16", "gptq", "plain", 3, bias=True),
)
PROMISED = {
    "Marlin": (ACROSS, WHOLE, LAUNCHES, ACT_ORDER, EXPONENTS, BIAS),
    "Machete": (SPLIT, ACT_ORDER, EXPONENTS),
    "awq_gemm": (EXPONENTS,),
    "ExLlama": (ACT_ORDER, EXPONENTS),
    "vLLM's Triton AWQ": (EXPONENTS,),
    "qlab's Triton kernels": (ACT_ORDER, EXPONENTS),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_plan_holds_what_it_promises(family):
    """At least 500 problems per family whose whole output is determined, at least 50 with each feature."""
    counts: Counter[str] = Counter()
    for task in plan():
        if task.family != family:
            continue
        problem = task.trial.outline()
        for name in task.kernels:
            if kernel(name).refusal(problem, H200.capability):
                continue
            said = recipe(name, problem, H200)
            if said.ordered and not said.opaque:
                counts.update({"problems": 1})
                counts.update(features(name, task.trial, said, H200))
                break
    assert counts["problems"] >= 500
    assert {n: counts[n] for n in PROMISED[family.name] if counts[n] < 50} == {}


def test_the_plan_spans_the_shapes_that_it_promises():
    every = trials()
    assert (min(t.M for t in every), min(t.K for t in every), min(t.N for t in every)) == (1, 128, 64)
    assert max(t.K for t in every) >= 14336
    assert max(t.N for t in every) == 28672
    assert len({str(t) for t in every}) == len(every)
    assert [str(t) for t in trials()] == [str(t) for t in every]
    shares = [part(plan(), i, 3) for i in range(3)]
    assert sum(map(len, shares)) == len(plan())
    assert not {t.trial.seed for t in shares[0]} & {t.trial.seed for t in shares[1]}


def run(*stand, shard=0, of=1):
    prover = Prover(H200, torch.device("cpu"), stand, "native", stand_ins.call)
    tasks = [Task(t, f) for t in SMALL for f in (FAMILIES if not t.bias else (MARLIN,))]
    tasks = part(tasks, shard, of)
    prove(prover, tasks, 60.0, lambda passed: None)
    return prover.result(shard, of, len(tasks), 1, 1.0)


def counts(found, name):
    return next(f for f in found.families if f.name == name)


def test_a_kernel_equal_to_its_replay_fails_nowhere():
    found = run(*(StandIn(n, H200) for n in ("vllm.marlin.gptq", "vllm.gptq_gemm", "vllm.machete.gptq")))
    marlin, exllama = counts(found, "Marlin"), counts(found, "ExLlama")
    assert found.failures == ()
    assert (marlin.problems, marlin.comparisons, marlin.differing_bits) == (4, 4, 0)
    assert marlin.outputs == 3 * 128 + 20 * 128 + 2 * 64 + 2 * 64
    assert marlin.features[BIAS] == 1
    assert exllama.sampled > 0
    assert exllama.unreachable == 0


def test_one_flipped_bit_is_listed_by_its_problem():
    found = run(StandIn("vllm.marlin.gptq", H200, flip=True))
    marlin = [f for f in found.failures if f.kernel == "vllm.marlin.gptq"]
    assert [f.problem for f in marlin] == list(SMALL)
    assert all("1 outputs in 1 rows differ, first (0, 0)" in f.what for f in marlin)
    assert counts(found, "Marlin").differing_bits == 4


def test_a_kernel_of_another_gpu_is_caught():
    assert run(StandIn("vllm.marlin.gptq.fp16", gpu("a100"))).failures


def test_a_kernel_that_raises_is_a_listed_failure():
    found = run(StandIn("vllm.marlin.gptq", H200, error="out of luck"))
    assert [f.problem for f in found.failures] == list(SMALL)
    assert all("out of luck" in f.what for f in found.failures)


def test_shards_add_up_to_the_whole(tmp_path):
    stand = StandIn("vllm.marlin.gptq", H200)
    for i in range(2):
        write_json(tmp_path / f"proof.{i}-of-2.json", run(stand, shard=i, of=2))
    merged, whole = proof.merge_folder(tmp_path), run(stand)
    assert merged.complete
    assert counts(merged, "Marlin") == counts(whole, "Marlin")
    assert read_json(proof.Proof, tmp_path / "proof.json", proof.SCHEMA) == merged


@pytest.mark.parametrize(("shards", "kept"), [(2, []), (1, ["proof.0-of-2.json"])])
def test_shards_go_once_the_proof_is_complete(tmp_path, monkeypatch, shards, kept):
    def run_shards(out, processes, arguments):
        for i in range(shards):
            write_json(out / f"proof.{i}-of-2.json", run(StandIn("vllm.marlin.gptq", H200), shard=i, of=2))
        return shards == processes

    monkeypatch.setattr(prove_replay, "detect", lambda: H200)
    monkeypatch.setattr(prove_replay, "extension", lambda: Extension(tmp_path, "", ""))
    monkeypatch.setattr(prove_replay, "run_shards", run_shards)
    monkeypatch.setattr("sys.argv", ["prove_replay", "--out", str(tmp_path), "--processes", "2"])
    assert prove_replay.main() == (0 if shards == 2 else 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*kept, "proof.json"]
