"""``python -m qlab.kernels --map AXIS`` as a user meets it: a sentence for each kernel, files, and refusals in one sentence."""

from __future__ import annotations

import pytest

from qlab.attribution.map_result import SCHEMA, Map
from tests.kernels.test_command import call, command, refused

SHAPE = ("--shape", "1,1024,512")


def mapped(*arguments, **options):
    return call("--map", *arguments, **options)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_map_is_printed_and_written(suffix, tmp_path):
    files = ("--json", tmp_path / "m.json", "--plot", tmp_path / f"m.{suffix}")
    done = mapped("M", "--values", "1:70", "--kernels", "awq_marlin, gptq", "--hw", "a100", *SHAPE, *files, width=80)
    assert done.exit_code == 0, done.output
    assert "awq_marlin on a100, K=1024, N=512: row 0 has" in done.stdout
    assert "gptq on a100, K=1024, N=512: row 0 has 2 classes for M = 1 to 70" in done.stdout
    assert "…" not in done.stdout
    m = Map.read(tmp_path / "m.json")
    assert (m.schema, m.axis, m.gpu, m.sms, m.base) == (SCHEMA, "M", "a100", 108, 1)
    assert m.values == tuple(range(1, 71))
    assert [s.name for s in m.strips] == ["awq_marlin", "gptq"]
    assert (m.shape.K, m.shape.N, m.shape.group_size, m.shape.symmetric) == (1024, 512, 128, True)
    assert m.strips[1].at(50).function != m.strips[1].at(51).function
    assert m.arguments == {
        "hw": "a100",
        "kernels": "awq_marlin, gptq",
        "shape": "1,1024,512",
        "map": "M",
        "values": "1:70",
    }
    assert (tmp_path / f"m.{suffix}").stat().st_size > 3000


def test_every_axis_has_its_own_values(tmp_path):
    """Without --values a map walks over the whole axis, for Marlin on 4096 x 4096; here the longest is cut short."""
    for axis, values, count in (("K", "128:2048:128", 17), ("sms", None, 160), ("N", "64:1024:64", 17)):
        some = ("--values", values) if values else ()
        done = mapped(axis, *some, "--json", tmp_path / "m.json")
        assert done.exit_code == 0, done.output
        m = Map.read(tmp_path / "m.json")
        assert (m.axis, len(m.values), m.strips[0].name) == (axis, count, "vllm.marlin.awq")
        assert (m.shape.M, m.shape.K, m.shape.N, m.shape.symmetric) == (1, 4096, 4096, False)
    assert {p.reason != "" for p in m.strips[0].points if p.value % 64 == 0} == {False}


def test_options_reach_the_problem(tmp_path):
    options = ("--shape", "5,256,128", "--group", "-1", "--dtype", "bf16", "--kernels", "vllm.marlin.gptq")
    done = mapped("sms", "--values", "1,20,108", *options, "--json", tmp_path / "m.json")
    assert done.exit_code == 0, done.output
    m = Map.read(tmp_path / "m.json")
    assert (m.shape.M, m.shape.group_size, m.shape.dtype, m.shape.symmetric) == (5, 256, "bf16", True)
    assert m.values == (1, 20, 108, 132)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("m", "--map 'm' is none of M, N, K, sms"),
        ("M --hw h900", "unknown GPU 'h900'; known: v100, "),
        ("M --kernels nothing", "nothing"),
        ("M --kernels vllm.marlin.awq:vllm", "'vllm.marlin.awq:vllm': only a label "),
        ("M --kernels awq:own", "'awq:own': dispatch 'own' is neither pinned nor vllm"),
        ("M --kernels awq,awq", "a map needs at least one kernel, and each kernel once"),
        ("M --values 9:1", "--values '9:1': '9:1' needs positive numbers, the smaller one first"),
        ("M --values 0:4", "--values '0:4': '0:4' needs positive numbers"),
        ("M --values few", "--values 'few' is no list of numbers and ranges"),
        ("M --values 1:99999999", "--values '1:99999999' holds more than 65536 values; give a larger step"),
        ("sms --values 70000", "a map along sms ends at 65536, before 70000"),
        ("M --dtype int8", "--dtype 'int8' is not one of float16"),
        ("M --shape 1,128", "--shape '1,128' is not M,K,N"),
        ("M --shape 1,128,64 --group 48", "--group 48 does not divide K=128"),
        ("M --shape 1,128,64 --shape 1,128,32", "--map takes one --shape; the axis that is mapped walks over --values"),
        ("M --json {tmp}/none/m.json", "--json {tmp}/none/m.json: the folder {tmp}/none does not exist"),
        ("M --plot {tmp}/m.gif", "--plot {tmp}/m.gif: name a .png, .svg or .pdf file"),
        ("M --json {tmp}", "--json {tmp} is a folder; name a file"),
    ],
)
def test_a_bad_option_is_one_sentence(arguments, said, tmp_path):
    assert said.format(tmp=tmp_path) in refused(mapped(*arguments.format(tmp=tmp_path).split()))
    assert not list(tmp_path.iterdir())


OTHERS = {
    "against": "a100",
    "weights": "same",
    "model": ".",
    "awq": ".",
    "gptq": ".",
    "original": ".",
    "tokens": "4",
    "text": ".",
    "layers": "*",
    "runs": "3",
    "seed": "1",
    "probe": "",
    "trusted": ".",
    "pin_marlin": "",
    "every_layer": "",
    "device": "cpu",
    "model_b": ".",
    "prompts": "1",
    "decode": "1",
    "top_k": "3",
    "samples": "10",
    "requantize": "",
}


@pytest.mark.parametrize("option", OTHERS)
def test_options_of_other_modes_are_refused(option):
    words = [f"--{option.replace('_', '-')}", *[v for v in (OTHERS[option],) if v]]
    assert refused(mapped("M", *words)) == f"{words[0]} does not go with --map; leave it out"


def test_values_belong_to_a_map():
    assert refused(call("--shape", "4,128,64", "--values", "1:4")) == "--values belongs to --map"


def test_a_failed_write_still_shows_the_answer(monkeypatch, tmp_path):
    from qlab import serial

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serial.os, "replace", full)
    result = mapped("M", "--values", "1:4", *SHAPE, "--json", tmp_path / "m.json")
    assert result.exit_code == 2
    assert "row 0 has one class for M = 1 to 4" in result.stdout
    assert "m.json: No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_in_a_process_of_its_own():
    done = command("--map", "M", "--values", "1:20", *SHAPE, width=80)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("marlin.awq on h100, K=1024, N=512: row 0 has one class for M = 1 to 20")
    assert max(map(len, done.stdout.splitlines()[1:])) <= 80
