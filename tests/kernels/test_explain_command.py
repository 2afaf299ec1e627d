"""``python -m qlab.kernels --explain A B`` as a user meets it: one sentence, a table, files, and refusals in one sentence."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from typer.testing import CliRunner

from qlab import checkpoint, data
from qlab.attribution.result import SCHEMA, Explained
from qlab.errors import CheckpointError
from qlab.kernels.__main__ import app
from qlab.replay import native
from tests.kernels.test_command import call, command, refused
from tests.kernels.test_damaged_file import FLIP

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "-")
FEW = ("--tokens", 8, "--prompts", 1)


def explain(*arguments, **options):
    return call("--explain", *arguments, **options)


@pytest.fixture(scope="module")
def shipped():
    """The shipped checkpoints, by family."""
    try:
        return {kind: data.model_directory(kind) for kind in ("awq", "gptq")}
    except CheckpointError as absent:
        pytest.skip(str(absent))


@pytest.fixture(scope="module")
def relatives(awq, changed):
    """Checkpoints of other models (more token ids, a decoder layer less, other positions), and one without a tokenizer."""

    def shorter(tensors):
        for name in [n for n in tensors if "layers.1." in n]:
            del tensors[name]

    wide = changed(awq, config=lambda c: c.update(vocab_size=4096))
    mute = changed(awq)
    for file in mute.glob("tokenizer*"):
        file.unlink()
    return {
        "wide": wide,
        "short": changed(awq, shorter, lambda c: c.update(num_hidden_layers=1)),
        # equal tensors under another configuration
        "turned": changed(awq, config=lambda c: c.update(rope_theta=500000.0)),
        "cut": changed(awq, config=lambda c: c.update(num_hidden_layers=1)),
        "mute": mute,
    }


@pytest.fixture(scope="module")
def answered(shipped, tmp_path_factory):
    """awq against Marlin on the shipped model: what is printed, and the files."""
    folder = tmp_path_factory.mktemp("explained")
    files = ("--json", folder / "e.json", "--plot", folder / "e.png")
    done = explain("awq", "awq_marlin", "--hw", "h100", *FEW, *files, "--every-layer", width=80)
    assert done.exit_code == 0, done.output
    return done.stdout, Explained.read(folder / "e.json"), folder / "e.png"


def flat(text):
    return re.sub(r"[\s│]+", "", text)


def test_the_answer_opens_with_its_sentence(answered):
    text, e, _ = answered
    first = re.sub(r"[│\s]+", " ", text).split("A awq@h100")[0]
    assert re.search(r"--explain ─+╮ \d+\.\d% of the difference in the log-probabilities comes from ", first)
    assert "; packing contributes 0." in first
    assert (e.schema, e.a, e.b) == (SCHEMA, "awq@h100", "awq_marlin@h100")
    assert (e.rows, e.tokens) == (8, 8)
    assert [end.differing_bits for end in e.ends] == [0, 0]
    assert text.count("0 bits differ from its hybrid's") == 2
    assert {f.category for f in e.factors if not f.same} <= {"order of summation", "rounding of partial sums"}


def test_nothing_is_cut_at_80_columns(answered):
    text, e, _ = answered
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for f in e.factors:
        if not f.same:
            assert f.name.split(" (")[0] in text.partition("Interactions")[2]
            assert all(word in text for word in f.name.split())
    for name in ("0.qkv_proj", "2.down_proj"):
        assert name in text
    assert "Alone:" not in text  # its columns want more room
    assert not text.endswith("\n\n\n")


def test_parts_of_the_written_file_add_up(answered):
    _, e, _ = answered
    for m in e.measures:
        assert Fraction(m.total) - sum(Fraction(p.value) for p in m.parts) == Fraction(m.residual)


def test_the_figure_is_written(answered):
    assert answered[2].read_bytes().startswith(b"\x89PNG")


def test_arguments_are_kept_without_places(answered):
    assert answered[1].arguments == {
        "explain": "awq awq_marlin",
        "hw": "h100",
        "tokens": "8",
        "prompts": "1",
        "json": "e.json",
        "plot": "e.png",
        "every_layer": "True",
    }


def test_a_path_and_itself(shipped, tmp_path):
    files = ("--json", tmp_path / "e.json", "--plot", tmp_path / "e.png")
    done = explain("awq@a100", "awq@a100", *FEW, *files)
    assert "awq@a100 and awq@a100 are equal, bit for bit; packing contributes 0." in done.stdout
    assert "1 hybrid;" in done.stdout
    assert "nan" not in done.stdout
    e = Explained.read(tmp_path / "e.json")
    assert [m.total for m in e.measures] == [0.0] * 3
    assert done.exit_code == 2  # there is no waterfall of nothing
    assert done.stderr.strip().splitlines()[-1] == (
        f"qlab.kernels: {tmp_path}/e.png: awq@a100 and awq@a100 do not differ, so there is nothing to draw"
    )
    assert not (tmp_path / "e.png").exists()
    assert explain("awq@a100", "awq@a100", *FEW, "--tokens", 2).exit_code == 0


def test_two_checkpoints(shipped, tmp_path):
    done = explain("awq", "gptq", "--tokens", 4, "--prompts", 1, "--json", tmp_path / "e.json")
    assert done.exit_code == 0, done.output
    e = Explained.read(tmp_path / "e.json")
    assert re.search(r"(9\d\.\d|100\.0)% of the difference in the log-probabilities comes from weights \(awq in", done.stdout)
    assert e.measure("output").part("weights").share > 0.99
    assert "note: the weights (relative L2 0.162" in done.stdout
    assert "packing contributes 0" in done.stdout
    assert "awq (awq, " in e.where
    assert " and gptq (gptq, " in e.where


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_nibble_flipped_by_another_process_is_all_of_the_difference(method, awq, gptq, tmp_path):
    """One code of v_proj: packing, 100%, with its row and column in the sentence and in the table."""
    good, bad = {"awq": awq, "gptq": gptq}[method], tmp_path / "bad"
    shutil.copytree(good, bad)
    module, k, n = "model.layers.1.self_attn.v_proj", 77, 21
    word, nibble = (k * 8 + n // 8, [0, 4, 1, 5, 2, 6, 3, 7][n % 8]) if method == "awq" else (k // 8 * 64 + n, k % 8)
    place = [bad / "model.safetensors", f"{module}.qweight", word, nibble, 9]
    subprocess.run([sys.executable, "-c", FLIP, *map(str, place)], check=True, timeout=60)
    code = int(checkpoint.read(good).weight(module).codes[k, n])
    done = explain(method, method, "--model", good, "--model-b", bad, *FEW, "--json", tmp_path / "e.json", width=240)
    assert done.exit_code == 0, done.output
    said = f"{module}: k=77, n=21 holds code {code ^ 9} instead of {code}"
    lines = done.stdout.splitlines()
    assert any(
        "100% of the difference in the log-probabilities comes from packing" in line and said in line for line in lines[:4]
    )
    (row,) = [line for line in lines if line.startswith(" packing ")]
    assert row.count("100.00%") == 5
    assert "k=77, n=21" in flat(row).replace("k=77,n=21", "k=77, n=21")
    e = Explained.read(tmp_path / "e.json")
    assert [(f.name, f.category, f.b) for f in e.factors if not f.same] == [("packing", "packing", said)]
    assert all(m.part("packing").share == 1.0 for m in e.measures)
    assert [x.layer for x in e.layers if x.differing] == ["model.layers.1.self_attn.qkv_proj"]
    both = explain(method, f"{method}_marlin", "--model", good, "--model-b", bad, *FEW, "--json", tmp_path / "both.json")
    assert both.exit_code == 0, both.output
    e = Explained.read(tmp_path / "both.json")
    assert e.measure("output").part("packing").share > 0
    assert "packing contributes 0" not in both.stdout


def test_a_layer(tmp_path):
    options = ("--shape", "1,512,256", "--group", "64", "--seed", 3, "--json", tmp_path / "e.json")
    done = explain("awq@a100", "vllm.marlin.awq.fp16@h100", *options)
    assert done.exit_code == 0, done.output
    e = Explained.read(tmp_path / "e.json")
    assert [m.name for m in e.measures] == ["output", "projection"]
    assert (e.rows, len(e.layers), e.arguments["shape"]) == (0, 1, "1,512,256")
    assert "groups of 64, asymmetric, seed 3" in e.where
    assert [end.kernels for end in e.ends] == [("vllm.awq_gemm",), ("vllm.marlin.awq.fp16",)]
    for a, b in (("gptq", "gptq_marlin"), ("triton.gptq_gemm", "awq")):
        assert ", symmetric, seed 0" in explain(a, b, "--shape", "2,256,128").stdout


def test_bfloat16_and_samples(tmp_path):
    options = ("--shape", "2,256,128", "--dtype", "bf16", "--samples", 10, "--json", tmp_path / "e.json")
    done = explain("awq_marlin@a100", "awq_marlin@h100:vllm", *options)
    assert done.exit_code == 0, done.output
    assert {m.samples for m in Explained.read(tmp_path / "e.json").measures} == {10}
    assert "10 draws" in done.stdout


def test_decoded_tokens(awq, tmp_path, monkeypatch):
    """Two prompts, each with three tokens in one step and then two by themselves."""
    from qlab.attribution import explain as module

    seen, real = [], module.explain
    monkeypatch.setattr(module, "explain", lambda subject, *a, **k: seen.append(subject) or real(subject, *a, **k))
    options = ("--model", awq, "--tokens", 3, "--prompts", 2, "--decode", 2, "--top-k", 0, "--json", tmp_path / "e.json")
    done = explain("awq_marlin@a100", "awq_marlin@h100", *options)
    assert done.exit_code == 0, done.output
    e = Explained.read(tmp_path / "e.json")
    assert (e.tokens, e.rows) == (10, 10)
    assert {x.M for x in e.layers} == {10}
    (subject,) = seen
    assert [c.M for c in subject.calls if c.linear.endswith("1.mlp.down_proj")] == [3, 1, 1, 3, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nothing awq", "unknown method 'nothing'; known: awq, awq_marlin, "),
        ("awq awq@h900", "unknown GPU 'h900'; known: v100, "),
        ("awq awq_marlin --hw h900", "unknown GPU 'h900'"),
        ("awq awq_marlin@h100:own", "dispatch 'own' is neither pinned nor vllm"),
        ("awq@a100 awq@h100 --hw h100", "--hw is the GPU of a path that names none; both paths name theirs"),
        ("awq awq_marlin --dtype int8", "--dtype 'int8' is not one of float16"),
        ("awq awq_marlin --device tpu", "--device 'tpu' is neither cuda nor cpu"),
        (
            "awq awq_marlin --tokens 300 --prompts 1",
            "--tokens 300: awq@h100 leaves its INT4 kernel for cuBLAS above 255 tokens",
        ),
        ("gptq_marlin gptq@a100 --tokens 60", "--tokens 60: gptq@a100 leaves its INT4 kernel for cuBLAS above 50 tokens"),
        (
            "awq awq_marlin --shape 300,256,128",
            "awq@h100: 300,256,128 with 300 tokens: opaque: cuBLAS GEMM of torch.matmul; its",
        ),
        ("awq awq_marlin --tokens 0", "--tokens 0 must be at least 1"),
        ("awq awq_marlin --tokens -3", "--tokens -3 must be at least 1"),
        ("awq awq_marlin --model {awq} --tokens 600", "--tokens 600: awq@h100 leaves its INT4 kernel"),
        (
            "vllm.marlin.awq awq_marlin --model {awq} --tokens 600 --prompts 1",
            "--tokens 600 and --decode 0: the model takes 512 tokens; name fewer",
        ),
        ("awq awq_marlin --model {awq} --tokens 3 --decode 510", "--tokens 3 and --decode 510: the model takes 512 tokens"),
        ("awq awq --model {awq} --model-b {turned}", "are not checkpoints of one model: rope_parameters is "),
        ("awq awq --model {awq} --model-b {cut}", "are not checkpoints of one model: num_hidden_layers is 2 in one"),
        ("awq awq_marlin --model {mute}", "cannot load the tokenizer in {mute}: Couldn't instantiate"),
        (
            "awq gptq --model {awq} --model-b {gptq} --requantize --original {tmp}/none",
            "--original {tmp}/none is not a directory",
        ),
        ("awq gptq --model {awq}", "--model is a checkpoint for awq@h100; name the one that gptq@h100 serves with --model-b"),
        ("awq awq_marlin --model {gptq}", "a checkpoint of gptq, which vLLM does not run as awq; name one of awq"),
        ("awq gptq --model {awq} --model-b {awq}", "a checkpoint of awq, which vLLM does not run as gptq; name one of gptq"),
        ("awq awq --model {awq} --model-b {tmp}/none", "none is not a directory; name one that holds config.json"),
        ("awq awq --model {awq} --model-b {wide}", "have different vocabularies: they are two models"),
        ("awq awq --model {awq} --model-b {short}", "only one of "),
        ("awq awq_marlin --model {awq} --top-k 5000", "--top-k 5000: the model has 2048 token ids; name so many or fewer"),
        (
            "awq awq_marlin --model {awq} --prompts 100000",
            "prompts of 49 tokens, not 100000; ask for fewer --prompts or --tokens",
        ),
        ("awq awq_marlin --model {awq} --text {tmp}/empty", "fewer than one row of 49; give a longer text or shorter rows"),
        ("awq awq_marlin --model {awq} --text {tmp}/none.txt", "cannot read the text "),
        (
            "awq awq_marlin --model {awq} --original {awq}",
            "--original tells two checkpoints apart; both paths serve the same one",
        ),
        (
            "awq awq_marlin --model {awq} --requantize",
            "--requantize tells two checkpoints apart; both paths serve the same one",
        ),
        ("awq gptq --model {awq} --model-b {gptq} --original {awq}", "--original is what --requantize starts from; add that"),
        ("awq awq_marlin --group 64", "--group belongs to --shape; a model's checkpoint has its own group size"),
        ("awq awq_marlin --shape 4,256,128 --shape 4,256,64", "--explain takes one --shape; name each in a call of its own"),
        ("awq awq_marlin --shape 4,256", "--shape '4,256' is not M,K,N"),
        ("awq awq_marlin --shape 4,256,128 --group 48", "--group 48 does not divide K=256"),
        ("awq awq_marlin --json {tmp}/none/e.json", "--json {tmp}/none/e.json: the folder {tmp}/none does not exist"),
        ("awq awq_marlin --plot {tmp}/e.gif", "--plot {tmp}/e.gif: name a .png, .svg or .pdf file"),
        ("awq awq_marlin --plot {tmp}", "--plot {tmp} is a folder; name a file"),
        (
            "reference.float32 awq --model {awq} --tokens 2 --prompts 1",
            "reference.float32 has no recipe; kernels that have one",
        ),
        ("awq@v100 awq@a100 --model {awq}", "awq@v100: no kernel for K=128, N=256: vLLM's AWQ needs compute capability 7.5"),
        ("awq awq_marlin --dtype bf16 --model {awq}", "vLLM's awq takes fp16 only"),
    ],
)
def test_a_bad_option_is_one_sentence(arguments, said, awq, gptq, relatives, tmp_path):
    (tmp_path / "empty").write_text("few")
    places = {"tmp": tmp_path, "awq": awq, "gptq": gptq, **relatives}
    assert said.format(**places) in refused(explain(*(a.format(**places) for a in arguments.split())))
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


OF_OTHERS = {
    "against": "a100",
    "weights": "same",
    "awq": ".",
    "gptq": ".",
    "layers": "*",
    "kernels": "awq",
    "runs": "3",
    "probe": "",
    "trusted": ".",
    "pin_marlin": "",
    "map": "M",
    "values": "1:4",
}


@pytest.mark.parametrize("option", OF_OTHERS)
def test_options_of_other_modes_are_refused(option):
    words = [f"--{option.replace('_', '-')}", *[v for v in (OF_OTHERS[option],) if v]]
    assert refused(explain("awq", "awq_marlin", *words)) == f"{words[0]} does not go with --explain A B; leave it out"


OF_A_MODEL = {
    "model": ".",
    "model_b": ".",
    "original": ".",
    "text": ".",
    "prompts": "1",
    "decode": "1",
    "top_k": "3",
    "requantize": "",
    "tokens": "4",
}


@pytest.mark.parametrize("option", OF_A_MODEL)
def test_options_of_a_model_are_refused_with_a_shape(option):
    words = [f"--{option.replace('_', '-')}", *[v for v in (OF_A_MODEL[option],) if v]]
    said = refused(explain("awq", "awq_marlin", "--shape", "2,256,128", *words))
    assert said == f"{words[0]} belongs to a model; --shape is one random layer"


@pytest.mark.parametrize("option", ["model_b", "prompts", "decode", "top_k", "samples", "requantize"])
def test_options_of_explain_are_refused_without_it(option):
    words = [f"--{option.replace('_', '-')}", *[v for v in ({**OF_A_MODEL, "samples": "10"}[option],) if v]]
    assert refused(call("--shape", "4,128,64", *words)) == f"{words[0]} belongs to --explain A B"


@pytest.mark.parametrize(
    "arguments", [("awq",), ("awq", "gptq", "x"), ("awq", "awq", "--samples", "9"), ("awq", "awq", "--top-k", "-1")]
)
def test_values_of_a_wrong_kind_are_typers_to_refuse(arguments):
    result = explain(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu():
    assert "--device cuda: PyTorch finds no CUDA GPU here" in refused(explain("awq", "awq_marlin", "--device", "cuda"))


def test_a_failed_write_still_shows_the_answer(monkeypatch, tmp_path):
    from qlab import serial

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serial.os, "replace", full)
    result = explain("awq", "awq_marlin", "--shape", "2,256,128", "--json", tmp_path / "e.json")
    assert result.exit_code == 2
    assert "of the difference in the layers' outputs comes from" in result.stdout
    assert "e.json: No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_help_answers_at_once_without_heavy_imports():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("--help", width=100)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3  # of its own, however busy the machine is
    for option in ("--explain", "--map", "--model-b", "--decode", "--requantize", "--samples", "--values"):
        assert option in done.stdout
    code = """
import sys
from qlab.kernels.__main__ import app
try:
    app(["--help"])
except SystemExit:
    print(sorted({"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)))
"""
    bare = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert bare.stdout.splitlines()[-1] == "[]"


def test_a_refusal_in_a_process_of_its_own():
    done = command("--explain", "awq", "awq_marlin", "--map", "M")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "qlab.kernels: --map does not go with --explain A B; leave it out\n"


def test_the_runner_has_no_second_copy_of_the_command():
    """``python -m`` names the module __main__: nothing may import it again under its own name."""
    code = """
import runpy, sys
sys.argv = ["qlab.kernels", "--explain", "awq", "awq_marlin", "--shape", "2,256,128"]
try:
    runpy.run_module("qlab.kernels", run_name="__main__", alter_sys=True)
except SystemExit as e:
    print(e.code, "qlab.kernels.__main__" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert CliRunner().invoke(app, ["--explain", "awq"]).exit_code == 2
