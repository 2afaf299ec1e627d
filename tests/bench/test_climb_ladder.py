"""The ladder as a command: one process per kernel, and what is left when that process does not end well."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import climb_ladder as ladder
from qlab.backends.registry import kernel
from qlab.serial import read_json, to_plain
from tests.expected_rungs import CASES
from tests.ladder import RUNGS, Result, Wrapped

CPU = torch.device("cpu")
PASSED = Result("exact", "vllm.awq_gemm", str(CASES[0]), "float16", "cuda", "passed")


def test_a_kernel_climbs_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ladder.collect(details=False)
    monkeypatch.setattr(ladder, "collect", lambda: found)
    out = tmp_path / "ladder.json"
    arguments = ["climb_ladder", "--json", str(out), "--kernels", "reference.float64,vllm.marlin.awq", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", arguments)
    assert ladder.main() == 0
    ours, peer = read_json(ladder.Ladder, out, ladder.SCHEMA).climbs
    assert (ours.fault, ours.refusal) == ("", "")
    assert [r.result.rung for r in ours.rungs] == 2 * [r.__name__ for r in RUNGS]
    assert {r.result.status for r in ours.rungs} == {"passed"}
    assert (peer.rungs, peer.refusal) == ((), "needs a CUDA GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(("device", "said"), [("cuda", "finds no CUDA GPU here"), ("tpu", "neither cuda nor cpu")])
def test_a_device_that_is_not_there_is_refused(
    device: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["climb_ladder", "--json", str(tmp_path / "x.json"), "--device", device])
    with pytest.raises(SystemExit):
        ladder.main()
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_or_hangs_costs_its_kernel_only(tmp_path: Path) -> None:
    stranger = Wrapped(kernel("reference.float64"), "nobody.knows")
    far = time.monotonic() + 60
    fell = ladder.climb_apart(stranger, CPU, tmp_path, 30, far)
    assert "unknown kernel 'nobody.knows'" in fell.fault
    assert not fell.good
    slow = ladder.climb_apart(stranger, CPU, tmp_path, 0.2, far)
    assert slow.fault == "stopped after 0.2 s"
    late = ladder.climb_apart(stranger, CPU, tmp_path, 30, time.monotonic() - 1)
    assert "time for all kernels ran out" in late.fault


def test_what_a_killed_process_wrote_is_kept_up_to_the_last_whole_line(tmp_path: Path) -> None:
    rung = ladder.judged(PASSED, CASES[0], torch.float16)
    line = json.dumps(to_plain(rung))
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line[:40]}")
    assert list(ladder._read(tmp_path / "a.jsonl")) == [rung]


def test_peers_are_judged_by_the_table_and_ours_must_not_fail() -> None:
    failed = replace(PASSED, status="failed", detail="4 of 9 elements")
    ours = replace(failed, kernel="triton.awq_gemm")
    rungs = [ladder.judged(r, CASES[0], torch.float16) for r in (PASSED, failed, ours, replace(ours, status="refused"))]
    assert [r.agrees for r in rungs] == [False, True, False, True]
    assert [r.expected for r in rungs] == ["failed", "failed", "", ""]


def test_the_table_marks_what_was_not_expected() -> None:
    rungs = tuple(ladder.judged(replace(PASSED, status=s), CASES[0], torch.float16) for s in ("passed", "failed"))
    console = Console(width=140, record=True, file=io.StringIO())
    ladder.show([ladder.Climb("vllm.awq_gemm", "", "", "exit status -6: aborted", 1.0, rungs)], console)
    text = console.export_text()
    assert "1 of 2 !" in text
    assert "vllm.awq_gemm: exit status -6: aborted" in text
    assert "expected failed: eight partial sums are rounded to fp16" in text
