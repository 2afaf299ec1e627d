"""The recording of vLLM's kernels, made here with kernels that run on a CPU: what is written can be re-created and compared."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import record_silicon as silicon
from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, kernel
from qlab.compare import differing, digest
from qlab.errors import PackingError
from qlab.weights import Int4Weight

FAR = time.monotonic() + 3600


class Stub(Kernel):
    """Multiplies in float64, in one of four ways that the recording must tell apart."""

    layout = "none"

    def __init__(self, way: str) -> None:
        self.name, self.way, self.calls = f"stub.{way}", way, 0

    def supports(self, problem: Problem, device: torch.device) -> Support:
        return Support(False, "it never runs") if self.way == "refuses" else YES

    def pack(self, weight: Int4Weight) -> Packed:
        if self.way == "cannot pack":
            raise PackingError("it does not fit")
        return Packed({"w": self.decoded(weight).double()}, Problem.of(weight, 0))

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        self.calls += 1
        if self.way == "fails":
            raise RuntimeError("the operator failed")
        y = (x.double() @ packed.tensors["w"]).to(x.dtype)
        if self.way == "drifts":
            y.view(torch.int16)[0, 0] += self.calls
        return y


@pytest.fixture(autouse=True)
def short_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = silicon.collect(details=False)
    monkeypatch.setattr(silicon, "collect", lambda: found)


def recorded(tmp_path: Path, chosen: list[Kernel], cases: list[silicon.Case]) -> tuple[dict, np.ndarray]:
    recorder = silicon.Recorder(tmp_path, torch.device("cpu"), chosen)
    for case in cases:
        recorder.run(case, FAR)
    recorder.write(complete=True)
    return json.loads(recorder.json.read_text()), np.load(recorder.npz)["bits"]


def test_the_plan_covers_every_axis_and_is_made_of_valid_weights() -> None:
    plan = silicon.cases()
    assert 400 <= sum(len(c.tokens) for c in plan) <= 600
    assert {(c.form, c.dtype, c.group_size) for c in plan} == {
        (form, dtype, group)
        for form in ("awq", "gptq", "act_order")
        for dtype in silicon.DTYPES
        for group in (32, 64, 128, -1)
        if (form, group) != ("act_order", -1)
    }
    assert {c.values for c in plan} == {"plain", "wide", "exact"}
    assert len({c.seed for c in plan}) == len(plan)
    assert [c.K * c.N for c in plan] == sorted(c.K * c.N for c in plan)
    assert {m for c in plan for m in c.tokens} == set(silicon.TOKENS)
    for case in plan[:40]:
        weight = silicon.make_weight(case)
        assert (weight.K, weight.N, weight.dtype) == (case.K, case.N, silicon.DTYPES[case.dtype])
        assert weight.symmetric == (case.form != "awq")
        assert weight.act_order == (case.form == "act_order" and weight.groups > 1)


@pytest.mark.parametrize("n", [1, 64, 1024, 1025, 4096, 256 * 4096, 256 * 28672])
def test_sample_positions_are_distinct_and_reach_every_part(n: int) -> None:
    at = silicon.sample_positions(n)
    assert len(at) == min(n, silicon.SAMPLE)
    assert (np.diff(at) > 0).all()
    assert at[0] >= 0
    assert at[-1] < n
    if n > 2 * silicon.SAMPLE and n % 4096 == 0:
        assert len(np.unique(at % 64)) > 8  # not one column of every tile


def test_wide_values_reach_over_many_binades_and_exact_ones_sum_exactly() -> None:
    x = silicon.make_activations("wide", 8, 512, "fp16", 1)
    _, exponents = torch.frexp(x[x != 0].double())
    assert exponents.max() - exponents.min() > 14
    case = silicon.Case(256, 64, 64, "fp16", "gptq", "exact", 5, (3,))
    w, e = silicon.make_weight(case), silicon.make_activations("exact", 3, 256, "fp16", 5)
    fp32 = e.float() @ w.dequantize(torch.float32)
    assert torch.equal(fp32.double(), e.double() @ w.dequantize(torch.float64))
    assert torch.equal(e.float().flip(1) @ w.dequantize(torch.float32).flip(0), fp32)


def test_a_record_is_re_created_from_what_was_written(tmp_path: Path) -> None:
    plan = [c for c in silicon.cases() if c.K * c.N <= 1 << 15][:3]
    written, bits = recorded(tmp_path, [kernel("reference.float64")], plan)
    assert written["schema"] == silicon.SCHEMA
    assert written["complete"]
    assert len(written["records"]) == sum(len(c.tokens) for c in plan)
    for record in written["records"]:
        problem = written["problems"][record["problem"]]
        entry = {k: v for k, v in written["cases"][problem["case"]].items() if k not in ("weight_digest", "refused")}
        case = silicon.Case(**{**entry, "tokens": tuple(entry["tokens"])})
        weight = silicon.make_weight(case)
        x = silicon.make_activations(case.values, problem["M"], case.K, case.dtype, problem["seed"])
        assert weight.digest() == written["cases"][problem["case"]]["weight_digest"]
        assert digest(x) == problem["input_digest"]
        k = kernel(record["kernel"])
        y = k.run(x, k.pack(weight))
        assert digest(y) == record["digest"]
        offset, count = record["sample"]
        at = torch.from_numpy(silicon.sample_positions(y.numel()))
        assert y.reshape(-1)[at].view(torch.int16).numpy().view(np.uint16).tolist() == bits[offset : offset + count].tolist()
        assert record["error"] < 1e-2
    assert {p["result"]["mismatches"] for p in written["probes"]} == {0}


def test_failures_and_drift_are_recorded_and_cost_no_other_kernel(tmp_path: Path) -> None:
    plan = [silicon.Case(128, 64, 32, "fp16", "awq", "plain", 3, (1, 2))]
    stubs: list[Kernel] = [Stub(way) for way in ("refuses", "cannot pack", "fails", "drifts", "works")]
    written, bits = recorded(tmp_path, stubs, plan)
    assert written["cases"][0]["refused"] == {
        "stub.refuses": "it never runs",
        "stub.cannot pack": "it does not fit",
    }
    by_kernel = {
        name: [r for r in written["records"] if r["kernel"] == f"stub.{name}"] for name in ("fails", "drifts", "works")
    }
    assert [r["reason"] for r in by_kernel["fails"]] == ["RuntimeError: the operator failed"] * 2
    assert [r["repeatable"] for r in by_kernel["drifts"]] == [False, False]
    assert [r["repeatable"] for r in by_kernel["works"]] == [True, True]
    assert {p["kernel"] for p in written["probes"] if "reason" in p} == {"stub.fails"}
    assert len(bits) == 2 * (64 + 128)  # two kernels recorded, one and two rows


def test_equal_outputs_share_a_sample(tmp_path: Path) -> None:
    plan = [silicon.Case(128, 64, 32, "fp16", "awq", "plain", 3, (4,))]
    one, two = Stub("works"), Stub("works")
    two.name = "stub.again"
    written, bits = recorded(tmp_path, [one, two], plan)
    assert [r["sample"] for r in written["records"]] == [[0, 256], [0, 256]]
    assert len(bits) == 256


def test_a_passed_deadline_starts_no_problem(tmp_path: Path) -> None:
    recorder = silicon.Recorder(tmp_path, torch.device("cpu"), [Stub("works")])
    recorder.run(silicon.Case(128, 64, 32, "fp16", "awq", "plain", 3, (1, 2)), time.monotonic() - 1)
    recorder.write()
    written = json.loads(recorder.json.read_text())
    assert (written["problems"], written["complete"]) == ([], False)


def test_the_orders_of_summation_can_be_told_apart() -> None:
    p = list(silicon.partial_sums(16, 1024, 77).float())
    outputs = [order(p).half() for order in silicon.SUM_ORDERS.values()]
    for i, a in enumerate(outputs):
        torch.testing.assert_close(a, torch.stack(p).double().sum(0).half(), rtol=2e-3, atol=1e-4)
        assert all(differing(a, b) > 100 for b in outputs[:i])


def test_a_sum_in_another_order_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    in_turn = silicon.SUM_ORDERS["P0+P1+...+P7 in turn"]
    real = torch.Tensor.sum

    def another(p: Tensor, *dim: int) -> Tensor:
        return in_turn(list(p.float())).half() if p.ndim == 3 and p.dtype == torch.float16 else real(p, *dim)

    monkeypatch.setattr(torch.Tensor, "sum", another)
    rows = list(silicon.sum_order(torch.device("cpu")))
    assert {r["differing"]["P0+P1+...+P7 in turn"] for r in rows} == {0}
    assert all(max(r["differing"].values()) > 0 for r in rows if r["outputs"] > 4000)


def test_an_unstable_sort_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda t, stable=False: real(t, stable=True))
    assert {r["moved"] for r in silicon.argsort_stable(torch.device("cpu"))} == {0}
    monkeypatch.setattr(torch, "argsort", lambda t, stable=False: real(t, stable=True) if stable else real(t).flip(0))
    assert all(r["moved"] for r in silicon.argsort_stable(torch.device("cpu")))
