"""The session's driver: steps that fail, hang or are repeated, with small commands in place of the real ones."""

from __future__ import annotations

import sys
from importlib import util

import pytest

from bench import gpu_session
from bench.gpu_session import SCHEMA, Session, Step
from qlab.backends.registry import Problem
from qlab.command import parse_shape
from qlab.hardware import gpu
from qlab.recipes import builders
from qlab.reveal.subject import MATMUL, kernel_name
from qlab.serial import read_json
from qlab.weights import DTYPES

GOOD = Step("good", ("platform",), 60)
BAD = Step("bad", ("json.tool", "/no/such/file"), 60)
SLOW = Step("slow", ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"), 1)


@pytest.fixture
def session(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_session, "has_gpu", lambda: True)

    def go(*steps, only=()):
        monkeypatch.setattr(gpu_session, "steps", lambda hw, out, minutes: list(steps))
        arguments = ["gpu_session", "--out", str(tmp_path), *(("--only", ",".join(only)) if only else ())]
        monkeypatch.setattr(sys, "argv", arguments)
        status = gpu_session.main()
        return status, read_json(Session, tmp_path / "session.json", SCHEMA)

    return go


def test_a_step_that_fails_or_hangs_costs_nothing_but_itself(session, tmp_path, capsys):
    status, record = session(SLOW, BAD, GOOD)
    assert status == 1
    assert [(o.name, o.status) for o in record.steps] == [("slow", -1), ("bad", record.steps[1].status), ("good", 0)]
    assert record.steps[1].status > 0
    assert record.steps[0].seconds < 30
    assert (tmp_path / "good.log").read_text().strip()
    assert "/no/such/file" in capsys.readouterr().out


def test_all_good_is_status_zero(session):
    assert session(GOOD)[0] == 0


def test_repeating_one_step_keeps_the_others(session):
    session(BAD, GOOD)
    _, record = session(Step("bad", ("platform",), 60), GOOD, only=["bad"])
    assert {(o.name, o.status) for o in record.steps} == {("bad", 0), ("good", 0)}


def test_an_unknown_step_is_refused(session, capsys):
    with pytest.raises(SystemExit) as e:
        session(GOOD, only=["bood"])
    assert e.value.code == 2
    assert "--only bood: no such step; steps are good" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_at_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_session, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as e:
        gpu_session.main()
    assert e.value.code == 2
    assert "finds no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_shapes_are_ones_that_the_command_takes(tmp_path):
    names = [s.name for s in gpu_session.steps("h100", tmp_path, 1.0)]
    assert len(set(names)) == len(names)
    assert len({parse_shape(text, 128) for text in gpu_session.SHAPES}) == 12


def test_every_step_names_a_module_and_every_revealed_kernel_exists(tmp_path):
    for step in gpu_session.steps("h200", tmp_path, 1.0):
        assert util.find_spec(step.arguments[0]), step.name
    for kernel, shape, dtype in gpu_session.REVEALED:
        m, k, n = map(int, shape.split(","))
        problem = Problem(m, k, n, 128, DTYPES[dtype], symmetric=True, act_order=False)
        assert kernel == MATMUL or kernel_name(kernel, problem, gpu("h200")) in builders(), kernel
