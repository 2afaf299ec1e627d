"""Every command answers bad input with one sentence behind its name, on standard error, and exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from qlab.command import check_output, one_sentence
from qlab.errors import PackingError, QlabError

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


def test_an_output_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """Files are renamed into place, which would replace a pipe, or as root /dev/null, by a file."""
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(QlabError, match=f"^--json {place} is a device or a pipe; name a file$"):
            check_output("--json", place)
    (tmp_path / "old.json").write_text("{}")
    check_output("--json", tmp_path / "old.json")


@pytest.mark.parametrize("command", ["qlab.report.markdown absent.json", "qlab.report.figures absent.json out.png"])
def test_reports_of_a_missing_result(command: str) -> None:
    run = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == f"{command.split()[0]}: cannot read absent.json: No such file or directory\n"
