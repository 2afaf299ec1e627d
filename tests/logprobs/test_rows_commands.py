"""``python -m qlab.logprobs rows``: from a recording to the verdict, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlab import data
from qlab.engine.path import Path as EnginePath
from qlab.engine.run import Request
from qlab.engine.schedule import Batching
from qlab.logprobs import trace as traces
from qlab.logprobs.commands.rows import app
from qlab.logprobs.model import identify
from qlab.logprobs.record import record
from qlab.logprobs.row_counts import RowVerdict
from qlab.logprobs.row_predictions import Predictions
from tests.logprobs.row_cases import NEW, prompts, run

WIDE = {"COLUMNS": "200"}


class Once:
    """An engine whose run is known."""

    name, native = "builtin", False

    def __init__(self, generator: str) -> None:
        import torch

        self.path, self.generator, self.dtype = EnginePath.parse(generator), generator, torch.float16

    def run(self, request, advance=None):
        return run(self.generator, 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace with every row."""
    directory = tmp_path_factory.mktemp("rows") / "trace"
    request = Request(prompts(), NEW, batching=Batching(16))
    made = record(Once("awq_marlin@h100"), request, model=identify(data.model_directory("awq")))
    traces.write(made, directory)
    return directory


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env=WIDE)


def test_from_commitment_to_verdict(whole: Path, tmp_path: Path) -> None:
    c, o, v = (str(tmp_path / name) for name in ("c.json", "o.json", "v.json"))
    told = invoke("commit", str(whole), "--out", c)
    assert told.exit_code == 0, told.stderr
    assert json.loads(Path(c).read_text())["root"] in told.stdout
    assert invoke("open", str(whole), "--commitment", c, "--seed", "drawn", "--count", "20", "--out", o).exit_code == 0
    candidates = ["--candidates", "awq@a100,awq@h100,awq_marlin@a100,awq_marlin@h100,awq_marlin@h200"]
    sample = ["--opening", o, "--commitment", c, "--seed", "drawn", "--count", "20"]
    found = invoke("verify", str(whole), *candidates, *sample, "--verifier", "a100", "--json", v)
    assert found.exit_code == 0, found.stderr
    assert (
        "consistent with class {awq_marlin@h100, awq_marlin@h200}; 3 other candidates are excluded for certain" in found.stdout
    )
    assert "awq_marlin: 20 of 20 rows are nearest to it, at an error rate of" in found.stdout
    verdict = RowVerdict.read(Path(v))
    assert (verdict.claimed, verdict.replay.rows) == ("awq_marlin@h100", 20)
    assert verdict.kernels is not None
    assert verdict.kernels.answer == "awq_marlin"
    other = invoke("verify", str(whole), *candidates, *sample[:4], "--seed", "chosen", "--count", "20")
    assert other.exit_code == 2
    assert "was asked for and is not in the opening" in other.stderr
    edited = json.loads(Path(o).read_text())
    x = edited["rows"][0]["x"]
    edited["rows"][0]["x"] = ("0" if x[0] != "0" else "1") + x[1:]
    Path(o).write_text(json.dumps(edited))
    refused = invoke("verify", str(whole), *candidates, *sample)
    assert refused.exit_code == 2
    assert "is not the one that was committed to" in refused.stderr
    forged = json.loads(Path(c).read_text()) | {"context": "00" * 32}
    Path(c).write_text(json.dumps(forged))
    assert "other tokens, steps or linears" in invoke("verify", str(whole), *candidates, *sample).stderr
    assert "is not the commitment" in invoke("open", str(whole), "--commitment", c, "--seed", "s", "--out", o).stderr


def test_rates(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["--shape", "16,512,256", "--m", "8", "--every-linear", "--json", str(out)]
    told = invoke("rates", *arguments)
    assert told.exit_code == 0, told.stderr
    found = Predictions.read(out)
    assert len(found.rates) == 2 * 6
    assert found.arguments["shape"] == "16,512,256"
    assert "awq@a100, awq_marlin@h100" in told.stdout
    assert "told by a verifier's own kernels" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "TRACE", "--candidates", "awq@a100,awq@a100"], "names awq@a100 twice"),
        (["verify", "TRACE", "--candidates", "awq"], "is no method@gpu"),
        (["verify", "TRACE", "--candidates", "awq@a100", "--opening", "x"], "belong together"),
        (["verify", "nowhere", "--candidates", "awq@a100"], "nowhere"),
        (["verify", "TRACE", "--candidates", "awq@a100,awq@h100:vllm", "--verifier", "h100"], "cannot share one rule"),
        (["verify", "TRACE", "--candidates", "awq@a100,awq@h100", "--verifier", "h100"], "two methods or more"),
        (["verify", "TRACE", "--candidates", "awq@a100,gptq@a100", "--verifier", "h900"], "unknown GPU"),
        (["verify", "TRACE", "--candidates", "awq@a100", "--awq", "GPTQ"], "a checkpoint of gptq"),
        (["rates", "--methods", "awq", "--awq", "GPTQ"], "a checkpoint of gptq"),
        (["rates", "--m", "0"], "--m '0'"),
        (["rates", "--dtype", "int8"], "--dtype 'int8'"),
        (["rates", "--methods", "nothing"], "unknown method"),
        (["rates", "--shape", "1,2"], "--shape"),
        (["commit", "TRACE", "--out", "nowhere/c.json"], "does not exist"),
    ],
)
def test_refusals(arguments: list[str], message: str, whole: Path) -> None:
    known = {"TRACE": str(whole), "GPTQ": str(data.model_directory("gptq"))}
    found = invoke(*[known.get(a, a) for a in arguments])
    assert found.exit_code == 2
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_trace_without_rows_and_one_with_some(tmp_path: Path) -> None:
    class Some(Once):
        def run(self, request, advance=None):
            from dataclasses import replace

            made = run(self.generator, 0)
            return replace(made, rows=made.rows[: self.keep])

    for keep, message in ((0, "has no recorded row"), (9, "a commitment covers all")):
        engine = Some("awq_marlin@h100")
        engine.keep = keep
        made = record(engine, Request(prompts(), NEW, batching=Batching(16)), model=identify(data.model_directory("awq")))
        traces.write(made, tmp_path / str(keep))
        command = ["verify", "--candidates", "awq@a100"] if keep == 0 else ["commit", "--out", str(tmp_path / "c")]
        found = invoke(command[0], str(tmp_path / str(keep)), *command[1:])
        assert found.exit_code == 2
        assert message in found.stderr
