"""``python -m qlab.layers``: its files, and one sentence for what cannot be."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from qlab.engine.path import Path
from qlab.errors import CheckpointError, QlabError, UnsupportedError
from qlab.layers.__main__ import app
from qlab.layers.pair import open_pair
from qlab.layers.result import LayersResult
from qlab.layers.run import Plan, run
from tests.layers.conftest import CPU, IDS


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_everything_is_written(awq, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and over everything else that lies in its way.")
    files = [tmp_path / "r.json", tmp_path / "r.png"]
    options = ("--tokens", 11, "--text", text, "--model", awq, "--device", "cpu", "--json", files[0], "--plot", files[1])
    done = invoke("--a", "awq@a100", "--b", "awq_marlin@H100", *options)
    assert done.exit_code == 0, done.output
    assert files[1].read_bytes().startswith(b"\x89PNG")
    r = LayersResult.read(files[0])
    assert r.schema == "qlab.layers/1"
    assert r.paths == ("awq@a100", "awq_marlin@h100")
    assert len(r.tokens) == len(r.total_by_token) == len(r.linears[0].total_by_token) == 11
    assert "quick" in "".join(r.tokens)
    assert r.arguments["text"] == "text.txt"
    assert r.arguments["model"] == "awq"
    assert r.residual == 0 < r.total
    assert "of the log-probability divergence enters at layer" in done.stdout.splitlines()[0]
    assert "Total divergence by token" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--a", "gptq@a100", "--b", "gptq_marlin@a100", "--tokens", 51),
            "--tokens 51: gptq@a100 leaves its INT4 kernel for cuBLAS above 50",
        ),
        (
            ("--a", "awq_marlin@a100", "--b", "awq@h100", "--tokens", 256),
            "awq@h100 leaves its INT4 kernel for cuBLAS above 255",
        ),
        (("--a", "awq", "--b", "awq@h100"), "'awq' is no method@gpu"),
        (("--a", "awq@a100", "--b", "nothing@h100"), "unknown method 'nothing'"),
        (("--a", "awq@a100", "--b", "awq@h100", "--by", "token"), "--by 'token' is neither linear nor layer"),
        (("--a", "awq@a100", "--b", "awq@h100", "--top-k", "few"), "--top-k 'few' is neither a number nor all"),
        (("--a", "awq@a100", "--b", "awq@h100", "--top-k", "5000"), "--top-k 5000: the model has 2048 token ids"),
        (("--a", "awq@a100", "--b", "awq@h100", "--dtype", "int8"), "--dtype 'int8' is not one of"),
        (("--a", "awq@a100", "--b", "awq@h100", "--model-b", "x"), "name A's with --model"),
        (("--a", "awq@a100", "--b", "awq@h100", "--model", "absent"), "absent is not a directory"),
        (("--a", "awq@a100", "--b", "awq@h100", "--text", "absent"), "cannot read the text absent"),
        (("--a", "awq@a100", "--b", "awq@h100", "--json", "absent/r.json"), "--json absent/r.json: the folder"),
        (("--a", "awq@a100", "--b", "awq@h100", "--plot", "r.gif"), "--plot r.gif: name a .png, .svg or .pdf file"),
        (("--a", "awq@a100", "--b", "awq@h100", "--native", "--device", "cpu"), "do not run natively on the CPU"),
    ],
)
def test_one_sentence_for_bad_options(options, said):
    done = invoke(*options)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.startswith("qlab.layers: ")
    assert done.stderr.count("\n") == 1


def test_bad_pairs_and_plans(awq, gptq, changed, opened):
    with pytest.raises(CheckpointError, match="a checkpoint of gptq, which vLLM does not run as awq"):
        opened("awq@a100", "awq@h100", awq, gptq)
    other = changed(awq, config=lambda c: c.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="are not checkpoints of one model: num_hidden_layers is 2 in one"):
        opened("awq@a100", "awq@h100", awq, other)
    for changes in ({"rope_theta": 500000.0}, {"rms_norm_eps": 1e-3}):
        turned = changed(awq, config=lambda c, changes=changes: c.update(changes))
        with pytest.raises(CheckpointError, match="are not checkpoints of one model: r"):
            opened("awq@a100", "awq@h100", awq, turned)
    pair = opened("awq@a100", "awq@h100", awq)
    for plan, said in (
        (Plan(()), "there is no token"),
        (Plan((1, 2048)), "token 2048 is not in the vocabulary of 2048 ids"),
        (Plan((1,) * 513), "--tokens 513: the model takes 512"),
        (Plan((1,) * 256), "awq@a100 leaves its INT4 kernel"),
        (Plan((1,), seed=-1), "--seed -1"),
        (Plan((1,), top_k=-1), "--top-k -1"),
        (Plan((1,), "token"), "--by 'token'"),
    ):
        with pytest.raises(QlabError, match=said):
            run(pair, plan)


def test_a_fall_back_to_cublas_is_refused(unquantised):
    """bf16 takes another kernel; one that no recipe describes is refused where it is met."""
    pair = open_pair(Path.parse("awq@a100"), Path.parse("awq@h100"), unquantised, unquantised, CPU, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="awq takes fp16 only"):
        run(pair, Plan(IDS))


def test_overflow_has_its_sentence(awq, changed, opened):
    loud = changed(awq, lambda t: t["model.layers.0.input_layernorm.weight"].fill_(3e4))
    with pytest.raises(UnsupportedError, match="a linear left the range of float16; run the model in another dtype"):
        run(opened("awq@a100", "awq@h100", loud), Plan(IDS, singles=False))


def test_help_needs_no_torch():
    code = """
import sys
try:
    from qlab.layers.__main__ import app
    app(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
