"""Quantising again: what the command writes, made once, safe against failures and other processes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import qlab.quantize.model
import qlab.quantize.save
from qlab import checkpoint
from qlab.attribution.requantize import RECORD, Calibration, folder, place, requantize
from qlab.attribution.settings import Settings, declared
from qlab.data import calibration_text
from qlab.errors import QlabError
from qlab.quantize.__main__ import main

AWQ = Settings("awq", symmetric=False, group_size=32, clip=True)
ORDERED = Settings("gptq", symmetric=False, group_size=64, act_order=True)
PLAIN = Settings("rtn", symmetric=True, group_size=64)


def command(*arguments):
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (AWQ, ("--method", "awq", "--group", 32)),
        (replace(AWQ, symmetric=True, clip=False), ("--method", "awq", "--group", 32, "--symmetric", "--no-clip")),
        (ORDERED, ("--method", "gptq", "--group", 64, "--asymmetric", "--act-order")),
    ],
)
def test_it_is_what_the_command_writes(unquantised, few, tmp_path, settings, options):
    text = tmp_path / "text.txt"
    text.write_text(few.text)
    out = tmp_path / "out"
    command(*options, "--model", unquantised, "--text", text, "--out", out, "--samples", few.samples, "--length", few.length)
    made = requantize(unquantised, settings, few)
    written = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    assert {p.relative_to(made) for p in made.rglob("*") if p.is_file()} == written | {Path(RECORD)}
    for name in written:
        assert (made / name).read_bytes() == (out / name).read_bytes(), name
    assert declared(made, settings.algorithm, clip=settings.clip) == settings


def test_the_second_time_nothing_is_quantised(unquantised, few, monkeypatch):
    heard = []
    first = requantize(unquantised, PLAIN, few, heard.append)
    assert len(heard) == 8
    assert heard[0] == "round to nearest, symmetric, groups of 64: model.layers.0.qkv"
    monkeypatch.setattr(qlab.quantize.model, "quantize_model", lambda *_: pytest.fail("quantised again"))
    assert requantize(unquantised, PLAIN, few) == first == place(unquantised, PLAIN, few)
    record = json.loads((first / RECORD).read_text())
    assert record["settings"]["algorithm"] == "rtn"


def test_everything_that_decides_the_bytes_has_a_place_of_its_own(unquantised, few, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(unquantised, other)
    same = place(other, AWQ, few)
    with (other / "model.safetensors").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x01")
    places = [
        place(unquantised, AWQ, few),
        place(other, AWQ, few),
        place(unquantised, replace(AWQ, clip=False), few),
        place(unquantised, AWQ, replace(few, samples=5)),
        place(unquantised, AWQ, replace(few, length=33)),
        place(unquantised, AWQ, replace(few, text=few.text + " ")),
    ]
    assert len(set(places)) == len(places)
    assert same == places[0]
    assert place(unquantised, PLAIN, few) == place(unquantised, PLAIN, replace(few, samples=5))  # it sees no text


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "mine"))
    assert folder() == tmp_path / "mine" / "requantized"
    monkeypatch.delenv("QLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "qlab" / "requantized"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "qlab" / "requantized"


def test_another_process_that_is_first_wins(unquantised, few, monkeypatch, tmp_path):
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path))
    save, theirs = qlab.quantize.save.save, place(unquantised, PLAIN, few)

    def late(directory, *rest, **named):
        save(theirs, *rest, **named)
        (theirs / "mark").write_text("theirs")
        return save(directory, *rest, **named)

    monkeypatch.setattr(qlab.quantize.save, "save", late)
    assert requantize(unquantised, PLAIN, few) == theirs
    assert (theirs / "mark").exists()
    assert list(theirs.parent.iterdir()) == [theirs]


def test_a_failure_leaves_nothing_behind(unquantised, few, monkeypatch, tmp_path):
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "cache"))

    def broken(*_):
        raise QlabError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(qlab.quantize.model, "quantize_model", broken)
        with pytest.raises(QlabError, match="no such luck"):
            requantize(unquantised, PLAIN, few)
    assert list(folder().iterdir()) == []
    assert checkpoint.read(requantize(unquantised, PLAIN, few)).names()


def test_bad_places_give_one_sentence(unquantised, few, monkeypatch, tmp_path):
    with pytest.raises(QlabError, match=r"holds no config\.json; give the directory of the full-precision model"):
        requantize(tmp_path / "nothing", PLAIN, few)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(QlabError, match="name another folder in QLAB_CACHE"):
        requantize(unquantised, PLAIN, few)


def test_shipped_calibration():
    assert Calibration.shipped() == Calibration(calibration_text(), 128, 512)
