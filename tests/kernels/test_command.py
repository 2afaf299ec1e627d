"""``python -m qlab.kernels`` as a user meets it: refusals in one sentence, tables uncut, files whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner

from qlab import data
from qlab.errors import CheckpointError
from qlab.kernels.__main__ import app
from qlab.lab.results import SCHEMA, TOTAL, LabResult
from qlab.serial import to_plain

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--shape", "4,128,64", "--group", "32", "--kernels", "reference.*,triton.gptq_gemm")


def call(*arguments, width=200):
    """The command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(width)})


def command(*arguments, width=80, **environment):
    """The command in a process of its own, from the repository's root."""
    return subprocess.run(
        [sys.executable, "-m", "qlab.kernels", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(width), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(result):
    """The one sentence of a refusal."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    text = result.stderr.strip().splitlines()[-1]
    assert text.startswith("qlab.kernels: ")
    assert "Traceback" not in result.stderr
    return text.removeprefix("qlab.kernels: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--hw h900", "unknown GPU 'h900'; known: v100, "),
        ("--weights both", "--weights 'both' is neither same nor own"),
        ("--dtype float8", "--dtype 'float8' is not one of float16, fp16, bfloat16, bf16"),
        ("--tokens 0", "--tokens 0 must be at least 1"),
        ("--shape 4,128", "--shape '4,128' is not M,K,N, for example"),
        ("--shape 4,128,64,1", "--shape '4,128,64,1' is not M,K,N"),
        ("--shape axbxc", "--shape 'axbxc' is not M,K,N"),
        ("--shape 4,1e2,64", "--shape '4,1e2,64' is not M,K,N"),
        ("--shape 0,128,64", "--shape 0,128,64: M, K and N must be positive"),
        ("--shape 16,1000000,1000000", "--shape 16,1000000,1000000: a matrix would have more than 2147483648 elements"),
        ("--shape 4,-128,64", "--shape 4,-128,64: M, K and N must be positive"),
        ("--shape 4,128,64 --group 48", "--group 48 does not divide K=128"),
        ("--shape 4,128,64 --group 0", "--group 0 does not divide K=128"),
        ("--shape 4,128,64 --group -2", "--group -2 does not divide K=128"),
        ("--shape 4,64,64", "--group 128 does not divide K=64"),
        ("--shape 4,128,64 --shape 4,128,64", "--shape names the same M,K,N twice"),
        ("--shape 4,128,64 --tokens 8", "--tokens belongs to a model"),
        ("--shape 4,128,64 --model .", "--shape and --model exclude each other"),
        ("--shape 4,128,64 --awq .", "--shape and --awq exclude each other"),
        ("--shape 4,128,64 --gptq .", "--shape and --gptq exclude each other"),
        ("--shape 4,128,64 --original .", "--shape and --original exclude each other"),
        ("--shape 4,128,64 --trusted . --probe", "--shape and --trusted exclude each other"),
        ("--shape 4,128,64 --text README.md", "--shape and --text exclude each other"),
        ("--shape 4,128,64 --layers *.0.*", "--shape and --layers exclude each other"),
        ("--model {gptq} --group 64", "--group belongs to --shape"),
        ("--shape 4,128,64 --device tpu", "--device 'tpu' is neither cuda nor cpu"),
        ("--shape 4,128,64 --kernels nothing", "--kernels 'nothing' matches nothing; known: awq, awq_marlin"),
        ("--shape 4,128,64 --kernels reference.*,", "--kernels '' matches nothing"),
        ("--model {gptq} --layers *.9.*", "--layers '*.9.*' matches no layer; names are like model.layers.0"),
        ("--model {gptq} --tokens 10000000", "the text has only "),
        ("--model {gptq} --text {tmp}/none.txt", "none.txt: No such file"),
        ("--model {gptq} --text {tmp}", "--text {tmp}: Is a directory"),
        ("--model {gptq} --text {tmp}/binary", "binary is not UTF-8 text"),
        ("--model {gptq} --text {tmp}/empty", "the text has only 1 tokens"),
        ("--model {gptq} --trusted {gptq}", "--trusted is what --probe compares with; add --probe"),
        ("--model {gptq} --probe --trusted {tmp}/none", "none is not a directory; name one"),
        ("--model {gptq} --original {tmp}/none", "none is not a directory; name one"),
        ("--model {tmp}/none", "none is not a directory; name one that holds config.json"),
        ("--model {tmp}", "config.json: the file is missing"),
        ("--model {tmp}/cut", "model.safetensors: not a whole safetensors file"),
        ("--model {tmp}/bad", "config.json: not valid JSON"),
        ("--model {gptq} --awq {awq}", "--awq and --gptq belong to --weights own"),
        ("--weights own --awq {awq}", "mode own needs both --awq and --gptq"),
        ("--weights own --gptq {gptq}", "mode own needs both --awq and --gptq"),
        ("--weights own --model {gptq}", "--model and --trusted belong to --weights same"),
        ("--weights own --awq {gptq} --gptq {awq}", "its method is gptq; name a checkpoint of awq"),
        ("--shape 4,128,64 --json {tmp}/none/r.json", "--json {tmp}/none/r.json: the folder {tmp}/none does not exist"),
        ("--shape 4,128,64 --json {tmp}", "--json {tmp} is a folder; name a file"),
        ("--shape 4,128,64 --plot {tmp}/none/r.png", "--plot {tmp}/none/r.png: the folder {tmp}/none does not exist"),
        ("--shape 4,128,64 --plot {tmp}/r.docx", "--plot {tmp}/r.docx: name a .png, .svg or .pdf file"),
        ("--shape 4,128,64 --plot {tmp}/r", "--plot {tmp}/r: name a .png, .svg or .pdf file"),
    ],
)
def test_a_bad_option_is_one_sentence(arguments, said, awq, gptq, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("cut", "bad"):
        (tmp_path / name).mkdir()
        for path in (gptq / "config.json", gptq / "model.safetensors"):
            content = path.read_bytes()
            spoiled = (name, path.suffix) in (("cut", ".safetensors"), ("bad", ".json"))
            (tmp_path / name / path.name).write_bytes(content[: len(content) // 2] if spoiled else content)
    places = {"tmp": tmp_path, "awq": awq, "gptq": gptq}
    assert said.format(**places) in refused(call(*(a.format(**places) for a in arguments.split())))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu():
    assert "--device cuda: PyTorch finds no CUDA GPU here" in refused(call(*SMALL, "--device", "cuda"))


@pytest.mark.parametrize(
    "arguments", [("--runs", "0"), ("--seed", "-1"), ("--seed", str(2**70)), ("--tokens", "x"), ("--nothing",), ("extra",)]
)
def test_values_of_a_wrong_kind_are_typers_to_refuse(arguments):
    result = call(*SMALL, *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.output


def test_an_unwritable_folder_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written; name another" in refused(call(*SMALL, "--json", tmp_path / "r.json"))


@pytest.mark.parametrize(("arguments", "kind"), [((), "gptq"), (("--weights", "own"), "awq")])
def test_without_the_shipped_checkpoints_there_is_one_sentence(monkeypatch, arguments, kind):
    def absent(asked):
        if asked == kind:
            raise CheckpointError(f"{asked} is not here; name one with --model")
        return real(asked)

    real = data.model_directory
    monkeypatch.setattr(data, "model_directory", absent)
    assert refused(call(*arguments)) == f"{kind} is not here; name one with --model"


def test_a_failed_write_still_shows_the_answer(monkeypatch, tmp_path):
    from qlab import serial

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serial.os, "replace", full)
    result = call(*SMALL, "--json", tmp_path / "r.json")
    assert result.exit_code == 2
    assert "Error against float64" in result.stdout
    assert "r.json: No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_shape_from_end_to_end(tmp_path):
    result = call(*SMALL, "--hw", "a100", "--probe", "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png", "--seed", "3")
    assert result.exit_code == 0, result.output
    r = LabResult.read(tmp_path / "r.json")
    assert (r.schema, r.mode, r.dtype, r.seed, r.hardware.asked) == (SCHEMA, "same", "float16", 3, "a100")
    assert r.layers() == ("4,128,64", TOTAL)
    assert r.ran() == ("reference.float32", "reference.float64", "triton.gptq_gemm")
    assert {(p.key, p.mismatches, p.reason) for p in r.probes} == {(key, 0, "") for key in r.ran()}
    assert [d.label for d in r.dispatch] == ["awq", "awq_marlin", "gptq", "gptq_marlin"]
    assert r.arguments["shape"] == "4,128,64"
    assert r.arguments["json"] == "r.json"
    assert r.digest[:16] in result.stdout
    assert matplotlib.image.imread(tmp_path / "r.png").std() > 0
    for line in (
        "Error against float64",
        "off the diagonal",
        "bitwise equivalence classes",
        "as packed",
        "What vLLM runs on a100",
    ):
        assert line in result.stdout


def test_the_file_has_every_promised_field(tmp_path):
    assert call(*SMALL, "--json", tmp_path / "r.json").exit_code == 0
    plain = json.loads((tmp_path / "r.json").read_text())
    assert plain == to_plain(LabResult.read(tmp_path / "r.json"))
    assert plain["environment"]["details"].startswith("torch_version")
    assert {"driver", "clocks", "torch", "triton", "gpu", "sms", "packages"} <= plain["environment"].keys()
    cell = next(c for c in plain["cells"] if c["layer"] == TOTAL)
    assert cell["error"].keys() == {"relative_l2", "ulp_median", "ulp_max", "backward"}
    assert {"repeatable", "noise_floor", "digest", "runs", "reason"} <= cell.keys()
    assert plain["pairs"][-1].keys() == {"layer", "keys", "relative_l2", "differing", "spread", "classes"}
    assert plain["columns"][0]["version"].startswith("torch ")
    assert plain["inputs"][0].keys() >= {"weight_digest", "input_digest", "M", "K", "N", "group_size"}


def test_the_same_call_gives_the_same_bits(tmp_path):
    for name in ("a", "b"):
        assert call(*SMALL, "--json", tmp_path / name).exit_code == 0
    a, b = (LabResult.read(tmp_path / name) for name in "ab")
    assert (a.digest, a.inputs, a.cells, a.pairs) == (b.digest, b.inputs, b.cells, b.pairs)


@pytest.mark.parametrize("mode", ["same", "own"])
def test_a_model_runs_in_both_modes(mode, awq, gptq, unquantised, tmp_path):
    where = ("--model", gptq) if mode == "same" else ("--weights", "own", "--awq", awq, "--gptq", gptq)
    chosen = ("--kernels", "reference.float64,triton.awq_gemm,triton.gptq_gemm", "--tokens", 4)
    result = call(*where, *chosen, "--original", unquantised, "--layers", "*.0.*", "--json", tmp_path / "r.json", width=80)
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    r = LabResult.read(tmp_path / "r.json")
    assert len(r.layers()) == 5
    keys = {"same": ("reference.float64",), "own": ("reference.float64@awq", "reference.float64@gptq")}[mode]
    assert r.ran() == (*keys, "triton.awq_gemm", "triton.gptq_gemm")
    assert {i.source for i in r.inputs} == ({"same"} if mode == "same" else {"awq", "gptq"})
    i, j = (r.pairs[-1].keys.index(f"triton.{s}_gemm") for s in ("awq", "gptq"))
    distance = r.pairs[-1].relative_l2[i][j]
    assert distance < 1e-3 if mode == "same" else 1e-3 < distance < 1
    assert all(c.error.relative_l2 < 1e-3 for c in r.cells)
    assert any("zero points" in text for text in r.checkpoints)


def test_pinning_marlin_changes_the_dispatch():
    shape = ("--shape", "4,128,128", "--kernels", "reference.float64")
    assert "vllm.machete.gptq" in call(*shape).stdout
    pinned = call(*shape, "--pin-marlin").stdout
    assert "vllm.machete" not in pinned
    assert "vllm.marlin.gptq" in pinned


def test_labels_choose_every_kernel_that_they_can_dispatch_to():
    text = call("--shape", "4,128,128", "--kernels", "gptq_marlin,reference.float64").stdout
    ran = text[text.index("Error against float64") : text.index("Relative L2")]
    assert "vllm.machete.gptq" in ran
    assert "vllm.marlin.gptq" in ran
    assert "awq" not in ran


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_kernels_of_another_gpu_are_replayed(dtype, tmp_path):
    chosen = "reference.float64,triton.gptq_gemm,vllm.marlin.gptq,vllm.machete.gptq,vllm.awq_dequantize"
    call("--hw", "a100", "--shape", "4,128,128", "--dtype", dtype, "--kernels", chosen, "--json", str(tmp_path / "r.json"))
    r = LabResult.read(tmp_path / "r.json")
    assert {c.key: c.origin for c in r.cells if c.layer == TOTAL} == {
        "reference.float64": "native",
        "triton.gptq_gemm": "replay",
        "vllm.marlin.gptq": "replay",
        "vllm.machete.gptq": "",
        "vllm.awq_dequantize": "opaque" if dtype == "fp16" else r.cell(TOTAL, "vllm.awq_dequantize").origin,
    }
    assert r.against is not None
    assert r.against.gpu == "h100"


def test_against_none_compares_with_no_other_gpu(tmp_path):
    call("--shape", "4,128,128", "--kernels", "vllm.marlin.gptq", "--against", "none", "--json", str(tmp_path / "r.json"))
    assert LabResult.read(tmp_path / "r.json").against is None


def test_the_defaults_run_the_shipped_model_within_a_minute(tmp_path):
    for kind in ("gptq", "fp16"):
        try:
            data.model_directory(kind)
        except CheckpointError as absent:
            pytest.skip(str(absent))
    done = command("--hw", "h100", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    r = LabResult.read(tmp_path / "r.json")
    assert r.seconds < 60
    assert len(r.layers()) == 13
    assert {(i.K, i.N) for i in r.inputs} == {(512, 1024), (512, 512), (512, 2048), (1024, 512)}
    assert {"reference.float64", "triton.awq_gemm", "vllm.marlin.awq", "vllm.machete.gptq", "vllm.gptq_gemm"} <= set(r.ran())
    assert all(r.cell(TOTAL, key).error.relative_l2 < 6e-4 for key in r.ran())
    atomics = {"vllm.gptq_gemm", "vllm.marlin.awq.atomic", "vllm.marlin.gptq.atomic"}
    assert {c.key for c in r.cells if c.repeatable is False} <= atomics


def test_help_in_a_process_of_its_own():
    done = command("--help", width=100)
    assert done.returncode == 0
    for option in ("--hw", "--weights", "--model", "--shape", "--probe", "--trusted", "--json", "--plot", "--device", "--seed"):
        assert option in done.stdout


def test_a_refusal_in_a_process_of_its_own():
    done = command("--hw", "h900")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("qlab.kernels: unknown GPU 'h900'")
    assert len(done.stderr.splitlines()) == 1


def test_every_kernel_in_a_process_of_its_own_at_80_columns():
    done = command("--hw", "h100", "--shape", "2,128,128", "--group", "-1", "--every-layer")
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Traceback" not in done.stderr
    for name in ("reference.float64", "triton.awq_gemm", "vllm.marlin.gptq"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("options", "machete"), [([], True), (["--pin-marlin"], False), (["--hw", "a100"], False)], ids=["h100", "pinned", "a100"]
)
def test_a_label_means_the_kernels_it_can_get(options, machete, tmp_path):
    path = tmp_path / "result.json"
    call = ["--shape", "4,128,128", "--kernels", "awq_marlin,gptq_marlin", "--json", str(path), *options]
    assert CliRunner().invoke(app, call).exit_code == 0
    names = {c.kernel for c in LabResult.read(path).columns}
    both = {"vllm.marlin.awq", "vllm.marlin.gptq"}
    assert names == (both | {"vllm.machete.awq", "vllm.machete.gptq"} if machete else both)
