"""Results to JSON and back; damaged files; writing that is interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab import serial
from qlab.errors import QlabError

SCHEMA = "test/1"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Leaf:
    name: str
    value: float
    flag: bool | None


@dataclass(frozen=True)
class Tree:
    schema: str
    count: int
    leaves: tuple[Leaf, ...]
    matrix: tuple[tuple[float, ...], ...]
    notes: dict[str, str]
    best: Leaf | None


leaves = st.builds(Leaf, st.text(), st.floats(), st.none() | st.booleans())
trees = st.builds(
    Tree,
    st.just(SCHEMA),
    st.integers(),
    st.lists(leaves, max_size=3).map(tuple),
    st.lists(st.lists(st.floats(), max_size=3).map(tuple), max_size=3).map(tuple),
    st.dictionaries(st.text(), st.text(), max_size=3),
    st.none() | leaves,
)
TREE = Tree(SCHEMA, 3, (Leaf("a", math.nan, None), Leaf("ä\ud83d", math.inf, True)), ((0.1, -math.inf), ()), {"k": "v"}, None)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_round_trip(tree):
    text = json.dumps(serial.to_plain(tree), allow_nan=False)
    back = serial.from_plain(Tree, json.loads(text))
    assert repr(back) == repr(tree)  # repr tells -0.0 from 0.0, and two NaN are not equal


def test_round_trip_through_a_file(tmp_path):
    path = tmp_path / "r.json"
    serial.write_json(path, TREE)
    assert repr(serial.read_json(Tree, path, SCHEMA)) == repr(TREE)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_the_file_is_strict_json(tmp_path):
    path = tmp_path / "r.json"
    serial.write_json(path, TREE)
    json.loads(path.read_text("ascii"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("count",), "3", "r.json.count: expected int, not '3'"),
        (("count",), True, "r.json.count: expected int, not True"),
        (("count",), 3.0, "r.json.count: expected int, not 3.0"),
        (("count",), None, "r.json.count"),
        (("leaves", 0, "value"), "infinity", r"r.json.leaves\[0\].value: expected float"),
        (("leaves", 0, "value"), True, r"r.json.leaves\[0\].value: expected float"),
        (("leaves", 0, "value"), 10**400, r"r.json.leaves\[0\].value: .* beyond the range"),
        (("leaves", 0, "flag"), 1, r"r.json.leaves\[0\].flag: expected bool"),
        (("leaves", 0), [], r"r.json.leaves\[0\]: expected an object"),
        (("leaves",), {}, "r.json.leaves: expected a list"),
        (("matrix", 0), "12", r"r.json.matrix\[0\]: expected a list"),
        (("notes",), [], "r.json.notes: expected an object"),
        (("notes", "k"), 1, "r.json.notes.k: expected str"),
        (("best",), {"name": "x"}, "r.json.best: field 'flag' is missing"),
        (("more",), 1, "r.json: unknown field 'more'; the file was written by another version"),
        (("leaves", 1, "more"), 1, r"r.json.leaves\[1\]: unknown field 'more'"),
        (("schema",), "test/2", "r.json holds 'test/2', not 'test/1'"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, place, value, said):
    plain = serial.to_plain(TREE)
    inner = plain
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path = tmp_path / "r.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(QlabError, match=said):
        serial.read_json(Tree, path, SCHEMA)


@pytest.mark.parametrize("name", ["count", "leaves", "best"])
def test_a_missing_field_is_named(tmp_path, name):
    plain = serial.to_plain(TREE)
    del plain[name]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(QlabError, match=f"field '{name}' is missing"):
        serial.read_json(Tree, path, SCHEMA)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b'{"schema": NaN}', b'{"schema": Infinity}', b"[" * 100_000, b"[1]", b'"test/1"']
)
def test_damaged_files_give_one_sentence(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(QlabError, match=r"r\.json") as e:
        serial.read_json(Tree, path, SCHEMA)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_floats_that_json_does_not_have_are_refused(tmp_path, literal):
    path = tmp_path / "r.json"
    serial.write_json(path, TREE)
    path.write_text(path.read_text().replace("0.1", literal))
    with pytest.raises(QlabError, match=f"r.json is not JSON: it has no {literal}"):
        serial.read_json(Tree, path, SCHEMA)


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / "r.json"
    serial.write_json(path, TREE)
    whole = path.read_bytes().rstrip()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(QlabError):
            serial.read_json(Tree, path, SCHEMA)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(QlabError, match=r"cannot read .*none\.json: No such file"):
        serial.read_json(Tree, tmp_path / "none.json", SCHEMA)
    with pytest.raises(QlabError, match=r"cannot write .*deeper.*No such file"):
        serial.write_json(tmp_path / "deeper" / "r.json", TREE)
    (tmp_path / "file").write_text("")
    with pytest.raises(QlabError, match="cannot write"):
        serial.write_json(tmp_path / "file" / "r.json", TREE)
    with pytest.raises(QlabError, match="cannot write"):
        serial.write_json(tmp_path, TREE)


def test_what_has_no_json_form_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match="set has no JSON form"):
        serial.write_json(tmp_path / "r.json", {"a": {1}})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(QlabError, match="Permission denied; name a folder"):
            serial.write_json(tmp_path / "r.json", TREE)
    finally:
        tmp_path.chmod(0o755)


def test_a_refused_write_is_one_sentence(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(serial.tempfile, "mkstemp", refuse)
    with pytest.raises(QlabError, match="Permission denied; name a folder"):
        serial.write_json(tmp_path / "r.json", TREE)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, failure):
    path = tmp_path / "r.json"
    path.write_text("old")

    def fail(*_):
        raise failure

    monkeypatch.setattr(serial.os, step, fail)
    kind = QlabError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(kind):
        serial.write_json(path, TREE)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_kill_before_the_rename_leaves_the_old_file_whole(tmp_path, step):
    path = tmp_path / "r.json"
    serial.write_json(path, TREE)
    old = path.read_bytes()
    code = (
        f"import os, signal; from pathlib import Path; from qlab.serial import write_whole\n"
        f"os.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_whole(Path({str(path)!r}), b'new' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == old
