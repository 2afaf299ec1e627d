"""``python -m qlab.logprobs record, replay, show, compare`` as a user meets them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlab import data
from qlab.engine.schedule import Batching
from qlab.logprobs.__main__ import app
from qlab.logprobs.engines import Choice
from qlab.logprobs.trace import read
from tests.logprobs.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments, width=100):
    """The command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(width)})


def good(*arguments, width=100) -> str:
    result = call(*arguments, width=width)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments) -> str:
    """The one sentence of a refusal."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    text = result.stderr.strip().splitlines()[-1]
    assert text.startswith(f"qlab.logprobs {arguments[0]}: ")
    assert "Traceback" not in result.stderr
    return text.partition(": ")[2]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model-less engine: another GPU class moves its logits."""

    def make(choice: Choice, batching: Batching) -> FakeEngine:
        return FakeEngine(choice.path, shift=0.0 if choice.path.gpu in ("h100", "h200") else 3.0)

    monkeypatch.setattr(Choice, "make", make)


SMALL = ("--count", 2, "--tokens", 9, "--new-tokens", 3)


def test_on_the_shipped_model(tmp_path: Path) -> None:
    shown = good("record", "--out", tmp_path / "t", *SMALL, "--rows", 2, "--digests", width=80)
    assert shown.startswith("awq_marlin@h100: engine builtin, kernels replay, float16\n")
    assert "vllm.marlin.awq" in shown
    assert good("show", tmp_path / "t", width=80) == shown
    text = good("replay", tmp_path / "t", "--method", "awq_marlin", "--hw", "h200", "--json", tmp_path / "r.json", width=80)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["schema"] == "qlab.logprobs.comparison/1"
    total = result["total"]
    assert (total["distance"], total["identical"], total["digests"], total["rows"]) == (0, 1, 0, 22)
    assert "22 of 22" in text
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_record_replay_compare(faked, tmp_path: Path) -> None:
    good("record", "--out", tmp_path / "t", "--method", "awq", *SMALL, "--chunk", 4, "--together", 2, "--top-k", 3)
    m = read(tmp_path / "t").manifest
    assert (m.request.batching.budget, m.request.batching.together, m.request.top_k) == (4, 2, 3)
    assert [n.tokens for n in m.sequences] == [12, 12]
    out = tmp_path / "u"
    replay = ("replay", tmp_path / "t", "--method", "gptq", "--hw", "a100", "--mode", "prefill", "--out", out)
    text = good(*replay, "--json", tmp_path / "r.json")
    u = read(out).manifest
    assert (str(u.path), u.request.forced.path, u.request.forced.manifest) == ("gptq@a100", "awq@h100", m.digest)
    assert (u.request.forced.mode, u.request.batching) == ("prefill", m.request.batching)
    assert json.loads((tmp_path / "r.json").read_text())["total"]["distance"] > 0
    assert "prefill of awq@h100's tokens" in text
    compared = good("compare", tmp_path / "t", out, "--json", tmp_path / "c.json")
    assert compared == text
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "r.json").read_bytes()
    assert json.loads((tmp_path / "c.json").read_text())["top_k"] == 3
    good("compare", tmp_path / "t", out, "--top-k", 1, "--decimals", 4, "--json", tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["top_k"] == 1
    assert refused(*replay) == f"{out} exists already; name another directory or ask to overwrite it"
    good(*replay, "--overwrite")


def test_prompts_come_from_a_file(faked, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("[[1, 2, 3, 4], [5, 6]]")
    good("record", "--out", tmp_path / "t", "--prompts", tmp_path / "p.json", "--tokens", 3, "--top-k", "all", "--seed", 4)
    t = read(tmp_path / "t")
    assert t.prompts == ((1, 2, 3), (5, 6))
    assert t.manifest.request.top_k == 0
    assert t.sequences[0].logprobs.shape == (34, 2048)
    assert t.manifest.request.batching.budget == 50, "the default chunk"


def test_a_trace_of_another_model_is_refused_unless_told(faked, tmp_path: Path) -> None:
    shutil.copytree(data.model_directory("awq"), tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((tmp_path / "other" / "config.json").read_text() + "\n")
    good("record", "--out", tmp_path / "t", "--model", tmp_path / "other", *SMALL)
    replay = ("replay", tmp_path / "t", "--method", "awq_marlin", "--hw", "h100")
    assert "the trace was made with other (awq, " in refused(*replay)
    good(*replay, "--any-model")
    good(*replay, "--model", tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--method awq_exllama", "unknown method 'awq_exllama'; known: awq, "),
        ("--hw h900", "unknown GPU 'h900'"),
        ("--dispatch mine", "dispatch 'mine' is neither pinned nor vllm"),
        ("--engine sglang", "--engine 'sglang' is neither builtin nor vllm"),
        ("--dtype float8", "--dtype 'float8' is not one of float16"),
        ("--device tpu", "--device 'tpu' is neither cuda nor cpu"),
        ("--engine vllm --device cpu", "--engine vllm needs a CUDA GPU"),
        ("--top-k many", "--top-k 'many' is neither a number nor all"),
        ("--chunk 2 --together 3", "--together 3: steps of --chunk 2 tokens cannot serve"),
        ("--rows 99999", "--rows 99999: sequence 0 has "),
        ("--rows x", "--rows 'x' is no number and matches no linear; names are like model.layers.0.self_attn.qkv_proj"),
        ("--prompts absent.txt", "cannot read the prompts absent.txt: No such file"),
        ("--prompts absent.txt --count 2", "--count belongs to the held-out text"),
        ("--model absent", "absent is not a directory"),
        ("--json absent/r.json", "--json absent/r.json: the folder"),
        ("--tokens 4000", "the held-out text has"),
    ],
)
def test_a_bad_option_of_record_is_named_and_nothing_is_written(tmp_path: Path, arguments: str, said: str) -> None:
    assert refused("record", "--out", tmp_path / "t", *arguments.split()).startswith(said)
    assert os.listdir(tmp_path) == []


def test_record_refuses_a_target_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    text = refused("record", "--out", tmp_path / "t", "--hw", "h900")
    assert text == f"{tmp_path / 't'} exists and is no trace, so it is not replaced; name another directory"


def test_bad_options_of_the_others(faked, tmp_path: Path) -> None:
    good("record", "--out", tmp_path / "t", *SMALL)
    replay = ("replay", tmp_path / "t", "--method", "awq", "--hw", "h100")
    assert refused(*replay, "--mode", "both") == "mode 'both' is neither decode nor prefill"
    assert refused(*replay, "--together", 51).startswith("--chunk 50: such steps cannot serve 51 sequences")
    assert refused("show", tmp_path).startswith(f"{tmp_path / 'trace.json'} is missing")
    assert refused("compare", tmp_path / "t", tmp_path / "t", "--top-k", 6).startswith("top_k 6: the generator's trace keeps 5")
    file = tmp_path / "t" / "sequences.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 4
    file.write_bytes(raw)
    for command in (replay, ("show", tmp_path / "t"), ("compare", tmp_path / "t", tmp_path / "t")):
        assert refused(*command).startswith(f"{file} was damaged or edited")


def test_help_answers_at_once_and_says_the_default_chunk() -> None:
    code = "import sys; from qlab.logprobs.__main__ import app; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
    shown = " ".join(good("record", "--help", width=200).split())
    assert "50 keeps gptq off cuBLAS" in shown
    for command in ("replay", "show", "compare"):
        good(command, "--help")
