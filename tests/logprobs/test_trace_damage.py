"""Damaged, edited and ill-meant traces are refused, and the sentence names the file."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from qlab.errors import QlabError
from qlab.logprobs import manifest as manifests
from qlab.logprobs.trace import MANIFEST, NAMES, ROWS, SEQUENCES, Trace, read, write


@pytest.fixture
def directory(made: Trace, tmp_path: Path) -> Path:
    write(made, tmp_path / "t")
    return tmp_path / "t"


def refused(directory: Path) -> str:
    with pytest.raises(QlabError) as e:
        read(directory)
    return str(e.value)


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_byte_anywhere_is_refused(directory: Path, name: str) -> None:
    file, drawn = directory / name, random.Random(name)
    whole = file.read_bytes()
    offsets = [0, len(whole) - 1, *(drawn.randrange(len(whole)) for _ in range(150))]
    for at in offsets:
        for mask in (1 << drawn.randrange(8), drawn.randrange(1, 256)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
            assert refused(directory).startswith(str(file)), (at, mask)
    file.write_bytes(whole)
    read(directory)


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "a space becomes a newline": lambda raw: raw.replace(b" ", b"\n", 1),
    "a line more": lambda raw: raw + b"\n",
    "without its last line's end": lambda raw: raw[:-1],
    "a key twice": lambda raw: raw.replace(b"{\n", b'{\n "engine": "vllm",\n', 1),
    "a letter escaped": lambda raw: raw.replace(b'"builtin"', b'"buil\\u0074in"'),
    "1.0 becomes 1.00": lambda raw: raw.replace(b'"temperature": 0.0', b'"temperature": 0.00'),
    "another GPU": lambda raw: raw.replace(b'"h100"', b'"a100"'),
    "a byte order mark": lambda raw: b"\xef\xbb\xbf" + raw,
    "no text": lambda raw: b"\xff" + raw,
    "nothing": lambda raw: b"",
    "an array": lambda raw: b"[]\n",
    "nested deeply": lambda raw: b"[" * 100000,
    "a huge number": lambda raw: raw.replace(b'"temperature": 0.0', b'"temperature": ' + b"9" * 5000),
    "an infinity": lambda raw: raw.replace(b'"temperature": 0.0', b'"temperature": 1e999'),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused(directory: Path, edit: str) -> None:
    file = directory / MANIFEST
    raw = file.read_bytes()
    assert EDITS[edit](raw) != raw
    file.write_bytes(EDITS[edit](raw))
    assert refused(directory).startswith(str(file))


def test_a_huge_manifest_is_refused_unread(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_spell", None)  # it must not come to that
    with (directory / MANIFEST).open("r+b") as f:
        f.truncate(manifests.LARGEST + 1)
    assert refused(directory) == f"{directory / MANIFEST} has 67108865 bytes, more than the 67108864 that a trace's has at most"


@pytest.mark.parametrize("name", NAMES)
def test_every_file_must_be_there_whole_and_plain(directory: Path, tmp_path: Path, name: str) -> None:
    file, kept = directory / name, tmp_path / "kept"
    shutil.copy(file, kept)
    file.unlink()
    assert refused(directory).startswith(f"{file} is missing")
    file.symlink_to(kept)
    assert refused(directory).startswith(f"{file} is a link")
    file.unlink()
    file.symlink_to(tmp_path / "absent")
    assert refused(directory).startswith(f"{file} is a link")
    file.unlink()
    file.mkdir()
    assert refused(directory).startswith(f"{file} is no plain file")
    file.rmdir()
    os.mkfifo(file)
    assert refused(directory).startswith(f"{file} is no plain file")
    file.unlink()
    raw = kept.read_bytes()
    for other in (raw[:-1], raw + b"\0", b""):
        file.write_bytes(other)
        assert refused(directory).startswith(str(file))
    file.write_bytes(raw)
    read(directory)


@pytest.mark.parametrize("name", ["model.pt", ".hidden", "extra.safetensors", "trace.json.bak"])
def test_a_file_more_is_refused(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"")
    assert refused(directory) == f"{directory / name} is no part of the trace; remove it"


def test_what_is_no_directory(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent").startswith(f"cannot read the trace {tmp_path / 'absent'}: No such file")
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file").startswith(f"cannot read the trace {tmp_path / 'file'}: Not a directory")
    assert refused(tmp_path) == f"{tmp_path / MANIFEST} is missing; name a trace's directory"


def forge(
    directory: Path, change: Callable[[dict[str, Any]], object], **tensors: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    """Change tensors and manifest and compute every digest anew, as a forger can: the content itself must be refused."""
    plain = json.loads((directory / MANIFEST).read_text())
    for name, edit in tensors.items():
        file = directory / f"{name}.safetensors"
        held = load(file.read_bytes())
        edit(held)
        file.write_bytes(save({k: v.contiguous() for k, v in held.items()}))
        entry = next(f for f in plain["files"] if f["name"] == file.name)
        raw = file.read_bytes()
        entry |= {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    change(plain)
    plain["digest"] = ""
    text = json.dumps(plain, indent=1) + "\n"
    plain["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(plain, indent=1) + "\n")


def nothing(plain: dict[str, Any]) -> None:
    pass


def test_what_is_forged_consistently_is_read(directory: Path) -> None:
    """Says what the digests are not: a signature. It also shows that :func:`forge` itself gives no other reason to refuse."""
    forge(directory, lambda m: m.update(engine="vllm"), sequences=lambda t: t["0.logprobs"].mul_(1.5))
    assert read(directory).manifest.engine == "vllm"


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "out of the directory": (lambda m: m["files"][0].update(name="../sequences.safetensors"), "names the file '../sequences"),
    "absolute": (lambda m: m["files"][0].update(name="/etc/passwd"), "names the file '/etc/passwd'"),
    "a pickle": (lambda m: m["files"][0].update(name="sequences.pt"), "names the file 'sequences.pt'"),
    "another file": (lambda m: m["files"][0].update(name="other.safetensors"), "not rows.safetensors, sequences.safetensors"),
    "a file twice": (lambda m: m["files"].append(m["files"][0]), "not rows.safetensors, sequences.safetensors"),
    "no rows": (lambda m: m.update(taps=[]), "not sequences.safetensors"),
    "unknown field": (lambda m: m.update(more=1), "unknown field 'more'"),
    "missing field": (lambda m: m.pop("calls"), "field 'calls' is missing"),
    "wrong type": (lambda m: m.update(linears="x"), "linears: expected a list"),
    "bool for a number": (lambda m: m["request"].update(new_tokens=True), "new_tokens: expected int, not True"),
    "another schema": (lambda m: m.update(schema="qlab.trace/2"), "holds 'qlab.trace/2', not 'qlab.trace/1'"),
    "unknown GPU": (lambda m: m.update(gpu="h900"), "unknown GPU 'h900'"),
    "unknown method": (lambda m: m.update(method="os.system"), "unknown method 'os.system'"),
    "unknown dtype": (lambda m: m.update(dtype="float8"), "dtype is 'float8'"),
    "unknown origin": (lambda m: m.update(origin="magic"), "origin is 'magic'"),
    "no budget": (lambda m: m["request"]["batching"].update(budget=0), "batching holds a number below 1"),
    "other new tokens": (lambda m: m["request"].update(new_tokens=4), "does not add up"),
    "longer prompt": (lambda m: m["sequences"][0].update(prompt=4), "does not add up"),
    "shifted": (lambda m: m["sequences"][0].update(prompt=4, tokens=7), "tensor '0.tokens' is int32 [6], not int32 [7]"),
    "other inputs": (lambda m: m.update(inputs="0" * 64), "not those of the manifest's input digest"),
    "small vocabulary": (lambda m: m["model"].update(vocabulary=2000), "has an id outside 0 to 1999"),
    "no sequence": (lambda m: m.update(sequences=[]), "the manifest has no sequence"),
    "other top-k": (lambda m: m["request"].update(top_k=4), "tensor '0.ids' is int32 [5, 5], not int32 [5, 4]"),
    "no digests": (lambda m: m.update(digests=False), "tensor '0.digests' is no part of a trace"),
    "a linear more": (lambda m: m["linears"].append("x"), "tensor '0.digests' is int64 [2, 5], not int64 [3, 5]"),
    "tap elsewhere": (lambda m: m["taps"][0].update(position=99), "position 99 is no token that was fed"),
    "tap of no sequence": (lambda m: m["taps"][0].update(sequence=-1), "is no token that was fed"),
    "row beyond M": (lambda m: m["taps"][0].update(row=50), "is row 50 of"),
    "tap of another linear": (lambda m: m["taps"][0].update(linear="x"), "tensor 'x.x' is missing"),
    "bfloat16": (lambda m: m.update(dtype="bfloat16"), "is float16 [2, 6], not bfloat16 [2, 'any']"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_forged_manifest_must_still_fit(directory: Path, case: str) -> None:
    change, said = MANIFESTS[case]
    forge(directory, change)
    text = refused(directory)
    assert said in text
    assert text.startswith(str(directory))


def _set(name: str, at: Any, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda t: t[name].__setitem__(at, value)


TENSORS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "token too large": ("sequences", _set("0.tokens", 4, 2048), "tensor '0.tokens' has an id outside 0 to 2047"),
    "token negative": ("sequences", _set("0.tokens", 4, -1), "tensor '0.tokens' has an id outside"),
    "another prompt": ("sequences", _set("0.tokens", 0, 8), "not those of the manifest's input digest"),
    "id too large": ("sequences", _set("1.ids", (0, 2), 2048), "tensor '1.ids' has an id outside"),
    "id twice": ("sequences", lambda t: _set("1.ids", (0, 2), int(t["1.ids"][0, 1]))(t), "names one id twice"),
    "NaN": ("sequences", _set("1.logprobs", (3, 0), float("nan")), "1.logprobs has NaN or an infinity"),
    "infinity": ("sequences", _set("1.logprobs", (3, 4), float("-inf")), "1.logprobs has NaN or an infinity"),
    "above 0": ("sequences", _set("1.logprobs", (3, 0), 0.5), "1.logprobs has a log-probability above 0"),
    "not descending": ("sequences", lambda t: t.update({"0.logprobs": t["0.logprobs"].flip(1)}), "not in descending order"),
    "double": ("sequences", lambda t: t.update({"0.logprobs": t["0.logprobs"].double()}), "float64 [5, 5], not float32"),
    "int64": ("sequences", lambda t: t.update({"0.tokens": t["0.tokens"].long()}), "is int64 [6], not int32 [6]"),
    "flat": ("sequences", lambda t: t.update({"0.ids": t["0.ids"].flatten()}), "is int32 [25], not int32 [5, 5]"),
    "one missing": ("sequences", lambda t: t.pop("1.ids"), "tensor '1.ids' is missing"),
    "one more": ("sequences", lambda t: t.update(code=torch.zeros(1)), "tensor 'code' is no part of a trace"),
    "step of no sequence": ("sequences", _set("steps", (0, 1), 2), "steps has the span [0, 2, 0, 3]"),
    "step beyond": ("sequences", _set("steps", (0, 3), 99), "steps has the span [0, 0, 0, 99]"),
    "step skipped": ("sequences", _set("steps", (0, 0), 3), "steps has the span [3, 0, 0, 3]"),
    "a tap missing": ("rows", lambda t: t.update({k: v[:1] for k, v in t.items()}), "not float16 [2, 'any']"),
    "a row more": ("rows", lambda t: t.update({"x.z": torch.zeros(1, 1)}), "tensor 'x.z' is no part of a trace"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_forged_tensors_must_still_fit(directory: Path, case: str) -> None:
    which, edit, said = TENSORS[case]
    forge(directory, nothing, **{which: edit})
    text = refused(directory)
    assert said in text
    assert text.startswith(str(directory / f"{which}.safetensors"))


@pytest.mark.parametrize("name", [SEQUENCES, ROWS])
def test_what_is_no_safetensors_file(directory: Path, name: str) -> None:
    raw = b"\x80\x04cos\nsystem\n."
    (directory / name).write_bytes(raw)

    def change(m: dict[str, Any]) -> None:
        next(f for f in m["files"] if f["name"] == name).update(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw))

    forge(directory, change)
    assert refused(directory).startswith(f"{directory / name} is no safetensors file")
