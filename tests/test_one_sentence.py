"""Every command answers bad input with one sentence behind its name, on standard error, and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from qlab.command import one_sentence
from qlab.errors import PackingError

ROOT = Path(__file__).parent.parent


def test_a_mistake_is_a_sentence_and_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    @one_sentence("qlab.some")
    def command(fault: Exception | None = None) -> None:
        if fault:
            raise fault

    command()
    with pytest.raises(typer.Exit) as ended:
        command(PackingError("column 3 holds 16; store it as GPTQ v1"))
    assert ended.value.exit_code == 2
    assert capsys.readouterr() == ("", "qlab.some: column 3 holds 16; store it as GPTQ v1\n")
    with pytest.raises(ZeroDivisionError):
        command(ZeroDivisionError())


@pytest.mark.parametrize("command", ["qlab.report.markdown absent.json", "qlab.report.figures absent.json out.png"])
def test_reports_of_a_missing_result(command: str) -> None:
    run = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == f"{command.split()[0]}: cannot read absent.json: No such file or directory\n"
