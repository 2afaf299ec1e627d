"""An engine in a process of its own: answers, errors, the environment, and the end of either process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path as File

import pytest
import torch

from qlab import data
from qlab.engine.builtin import Builtin
from qlab.engine.path import Path
from qlab.engine.run import Request
from qlab.engine.worker import Remote
from qlab.errors import CheckpointError, QlabError, UnsupportedError
from tests.engine import remote_engines as e

PATH = Path("awq_marlin", "h100")
ROOT = File(__file__).parents[2]


def ask(new_tokens: int) -> Request:
    return Request(((5, 6, 7),), new_tokens)


def test_a_run_comes_back_as_the_engine_made_it(monkeypatch, tmp_path):
    monkeypatch.setenv(e.VARIABLE, "outside")
    log = tmp_path / "logs" / "engine.log"
    with (
        Remote(e.Told, PATH, environment={e.VARIABLE: "inside"}, log=log) as first,
        Remote(e.Told, PATH, environment={e.VARIABLE: None}) as second,
    ):
        assert (first.name, first.path, first.dtype, first.directory) == ("builtin", PATH, torch.float16, File("model"))
        with pytest.raises(AttributeError, match="native"):
            _ = first.native
        told = []
        a, b = first.run(ask(1), told.append), second.run(ask(1))
        assert told == [2, 2, 2]
        assert (a.notes["variable"], b.notes["variable"]) == ("inside", "absent")
        assert len({a.notes["process"], b.notes["process"], str(os.getpid())}) == 3
        assert a.sequences[0].logprobs.tolist() == [[-1.5], [-0.5], [0.5]]
        assert a.sequences[0].logprobs.dtype == torch.float32
        assert a.calls == b.calls
        # errors: of the engine's own kind, of any other kind; the engine serves on
        with pytest.raises(UnsupportedError, match=r"^opaque: cuBLAS$"):
            first.run(ask(2))
        with pytest.raises(QlabError, match=r"^the engine failed while running: RuntimeError: first line; see .*engine.log$"):
            first.run(ask(3))
        assert first.run(ask(1)).notes["variable"] == "inside"
        assert "asked for 3" in log.read_text()
        assert "second line" in log.read_text()
        with pytest.raises(QlabError, match=r"ended with status 7 while running"):
            second.run(ask(4))
    with pytest.raises(QlabError, match="closed"):
        first.run(ask(1))


def test_an_engine_that_cannot_be_made_says_so_at_every_use():
    with Remote(e.refuse, PATH) as engine:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"^no checkpoint for awq_marlin@h100$"):
                engine.run(ask(1))
            with pytest.raises(CheckpointError):
                _ = engine.name


def test_a_silent_engine_is_ended():
    with Remote(e.Told, PATH) as engine:
        engine.wait()
        engine._seconds = 0.5
        with pytest.raises(QlabError, match=r"silent for 0.5 s while running and was ended"):
            engine.run(ask(5))
        assert not engine._process.is_alive()


def test_the_process_ends_with_its_caller():
    script = (
        "from tests.engine import remote_engines as e\nfrom qlab.engine.worker import Remote\n"
        "from qlab.engine.path import Path\nimport os, sys\n"
        "def main():\n    r = Remote(e.slow, Path('awq', 'h100'))\n    print(r._process.pid, flush=True)\n    os._exit(0)\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    pid = int(made.stdout)
    for _ in range(100):
        if not File(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the engine's process outlived its caller by ten seconds")


def test_the_builtin_engine_gives_the_same_from_a_process_of_its_own():
    directory, path = data.model_directory("awq"), Path("awq", "h100")
    asked = Request(((5, 6, 7, 8),), 2, top_k=3)
    with Remote(Builtin, directory, path, torch.device("cpu")) as engine:
        here = Builtin(directory, path, torch.device("cpu")).run(asked)
        there = engine.run(asked)
    assert torch.equal(here.sequences[0].logprobs, there.sequences[0].logprobs)
    assert torch.equal(here.sequences[0].ids, there.sequences[0].ids)
    assert (here.steps, here.calls, here.linears) == (there.steps, there.calls, there.linears)
