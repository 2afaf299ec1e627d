"""The session with vLLM: steps that can be parsed, one deadline for all of them, and what is kept."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from bench import vllm_session
from bench.gpu_session import SCHEMA, Session, Step
from qlab.serial import read_json, write_json

QUICK = Step("quick", ("platform",), 60)
LONG = Step("long", ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"), 50)


def test_all_steps_keep_to_one_deadline(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vllm_session, "LEAST", 1)
    began = time.monotonic()
    assert vllm_session.follow([QUICK, LONG, QUICK], tmp_path, began + 4) == 1
    assert time.monotonic() - began < 12
    record = read_json(Session, tmp_path / "session.json", SCHEMA)
    assert [(s.name, s.status) for s in record.steps] == [("quick", 0), ("long", -1)]
    assert "no time left" in capsys.readouterr().out
    # a repeated step takes its own place; what the others left stays
    assert vllm_session.follow([QUICK], tmp_path, time.monotonic() + 30) == 0
    again = read_json(Session, tmp_path / "session.json", SCHEMA)
    assert [(s.name, s.status) for s in again.steps] == [("long", -1), ("quick", 0)]
    write_json(tmp_path / "session.json", again)


def test_every_step_is_a_command_that_takes_its_options(tmp_path):
    steps = vllm_session.steps("h200", tmp_path, tmp_path / "m", 8, 2)
    assert len({s.name for s in steps}) == len(steps)
    assert len(vllm_session.steps("h200", tmp_path, tmp_path / "m", 8, 1)) == len(steps) - 2
    for module in {s.arguments[0] for s in steps}:
        shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60, check=True)
        for step in steps:
            if step.arguments[0] == module:
                assert all(a in shown.stdout for a in step.arguments if a.startswith("--"))


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vllm_session, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["vllm_session", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit):
        vllm_session.main()
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
