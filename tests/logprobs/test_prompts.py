"""Prompts from files and from the held-out text."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from qlab import data
from qlab.errors import QlabError
from qlab.logprobs.prompts import from_file, heldout
from qlab.quantize.llama import tokenizer

MODEL = data.model_directory("awq")


def test_heldout_prompts_are_the_same_every_time_and_spread_over_the_text() -> None:
    prompts = heldout(MODEL)
    assert [len(p) for p in prompts] == [100] * 12
    assert len(set(prompts)) == 12
    assert prompts == heldout(data.model_directory("gptq"))
    text = tokenizer(MODEL)(data.heldout_text(), add_special_tokens=False, verbose=False)["input_ids"]
    starts = [next(i for i in range(0, len(text), 100) if tuple(text[i : i + 100]) == p) for p in prompts]
    assert starts[0] == 0
    assert starts[-1] > 0.9 * len(text) - 200
    steps = [b - a for a, b in pairwise(starts)]
    assert max(steps) - min(steps) <= 100


@pytest.mark.parametrize(("count", "length", "said"), [(0, 9, "0 prompts of 9"), (9, 1, "of 1 tokens"), (999, 900, "not 999")])
def test_heldout_prompts_that_cannot_be_had(count: int, length: int, said: str) -> None:
    with pytest.raises(QlabError, match=said):
        heldout(MODEL, count, length)


def test_a_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("The first prompt.\n\n   \nZwölf Böxkämpfer\r\n", "utf-8")
    encode = tokenizer(MODEL)
    expected = [encode("The first prompt.")["input_ids"], encode("Zwölf Böxkämpfer")["input_ids"]]
    assert from_file(file, MODEL) == tuple(map(tuple, expected))
    assert from_file(file, MODEL, 3) == tuple(tuple(p[:3]) for p in expected)


def test_json_has_strings_or_ids(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(["A string\nof two lines", [7, 8, 9]]))
    text, ids = from_file(file, MODEL)
    assert text == tuple(tokenizer(MODEL)("A string\nof two lines")["input_ids"])
    assert ids == (7, 8, 9)
    assert from_file(file, MODEL, 2)[1] == (7, 8)


def test_ids_need_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("[[1, 2]]")
    assert from_file(tmp_path / "p.json", tmp_path) == ((1, 2),)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"\n \n", "p.txt holds no prompt; write one a line"),
        ("p.txt", b"\xff", "p.txt is not UTF-8 text"),
        ("p.json", b"[", "p.json is not JSON"),
        ("p.json", b"[" * 100000, "p.json is not JSON"),
        ("p.json", b"{}", "p.json holds no list"),
        ("p.json", b"[]", "p.json holds no prompt"),
        ("p.json", b'["a", 3]', "p.json: prompt 2 is neither a string nor a list of token ids"),
        ("p.json", b"[[1, true]]", "p.json: prompt 1 is neither a string nor a list of token ids"),
        ("p.json", b"[[1, -1]]", "p.json: prompt 1 is neither a string nor a list of token ids"),
        ("p.json", b"[[1], []]", "p.json: prompt 2 has no token"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QlabError, match=said):
        from_file(tmp_path / name, MODEL)


def test_a_missing_file_and_a_model_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(QlabError, match=r"cannot read the prompts .*absent.txt: No such file"):
        from_file(tmp_path / "absent.txt", MODEL)
    (tmp_path / "p.txt").write_text("x")
    with pytest.raises(QlabError, match=f"cannot load the tokenizer in {tmp_path}"):
        from_file(tmp_path / "p.txt", tmp_path)
