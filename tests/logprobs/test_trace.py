"""Traces: the same after a round trip, whole or not at all on disk, never in another directory's place."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlab.engine.run import Request, Sampling
from qlab.engine.schedule import Batching
from qlab.errors import QlabError
from qlab.logprobs import trace as traces
from qlab.logprobs.record import again, record
from qlab.logprobs.trace import NAMES, Trace, read, seal, write
from tests.logprobs.conftest import PROMPTS, TAPS


def assert_same(a: Trace, b: Trace) -> None:
    assert a.manifest == b.manifest
    assert len(a.sequences) == len(b.sequences)
    for s, t in zip(a.sequences, b.sequences, strict=True):
        assert s.prompt == t.prompt
        for name in ("tokens", "ids", "logprobs", "digests"):
            x, y = getattr(s, name), getattr(t, name)
            assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x.nan_to_num(7), y.nan_to_num(7))), name
    assert a.run.steps == b.run.steps
    assert a.run.calls == b.run.calls
    assert a.run.linears == b.run.linears
    assert a.run.notes == b.run.notes
    for r, q in zip(a.run.rows, b.run.rows, strict=True):
        assert (r.tap, r.row, r.M, r.kernel) == (q.tap, q.row, q.M, q.kernel)
        assert torch.equal(r.x, q.x)
        assert torch.equal(r.y, q.y)


def test_round_trip(made: Trace, tmp_path: Path) -> None:
    written = write(made, tmp_path / "t")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == sorted(NAMES)
    assert os.listdir(tmp_path) == ["t"]
    assert_same(read(tmp_path / "t"), made)
    assert written.manifest == made.manifest
    assert seal(read(tmp_path / "t")).manifest == made.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 0},
        {"top_k": 0, "wanted": tuple(torch.arange(2 * n).reshape(n, 2) for n in (5, 6))},
        {"wanted": tuple(torch.arange(2 * n).reshape(n, 2) for n in (5, 6)), "top_k": 3},
        {"forced": ((1, 2, 3), (4, 5, 6)), "batching": Batching(7, 2)},
        {"sampling": Sampling(0.8, 3), "taps": frozenset(), "digests": False, "seed": 5},
    ],
)
def test_round_trip_of_other_requests(fake, tmp_path: Path, change) -> None:
    request = replace(Request(PROMPTS, 3, taps=TAPS, digests=True), **change)
    t = record(fake, request)
    write(t, tmp_path / "t")
    back = read(tmp_path / "t")
    assert_same(back, t)
    asked = again(back)
    assert replace(asked, wanted=None).__dict__ == replace(request, wanted=None).__dict__
    assert (asked.wanted is None) == (request.wanted is None)
    assert_same(record(fake, asked), t)


def test_a_whole_vocabulary_keeps_no_ids(fake, tmp_path: Path) -> None:
    write(record(fake, Request(PROMPTS, 3, top_k=0)), tmp_path / "t")
    rows, vocabulary = 5 + 6, 2048
    assert (tmp_path / "t" / traces.SEQUENCES).stat().st_size < rows * vocabulary * 4 + 4000


def test_nan_only_where_a_wanted_one_could_not_be_had(made: Trace, fake, tmp_path: Path) -> None:
    wanted = tuple(torch.full((n, 1), 9) for n in (5, 6))
    t = record(fake, Request(PROMPTS, 3, wanted=wanted))
    s = t.sequences[0]
    for column, good in ((5, True), (4, False)):
        logprobs = s.logprobs.clone()
        logprobs[2, column] = float("nan")
        changed = replace(t, run=replace(t.run, sequences=(replace(s, logprobs=logprobs), t.sequences[1])))
        if good:
            write(changed, tmp_path / "t")
            assert_same(read(tmp_path / "t"), seal(changed))
        else:
            with pytest.raises(QlabError, match=r"0\.logprobs has NaN"):
                write(changed, tmp_path / "u")


@pytest.mark.parametrize("wrong", ["missing", "longer", "whole"])
def test_a_run_that_does_not_fit_is_not_written(made: Trace, fake, tmp_path: Path, wrong: str) -> None:
    s = made.sequences[0]
    if wrong == "missing":
        bad, said = replace(made, run=replace(made.run, sequences=(s,))), "tensor '1.tokens' is missing"
    elif wrong == "longer":
        longer = replace(s, tokens=torch.cat([s.tokens, s.tokens[:1]]))
        bad, said = replace(made, run=replace(made.run, sequences=(longer, made.sequences[1]))), "tensor '0.tokens' is int32"
    else:
        t = record(fake, Request(PROMPTS, 3, top_k=0))
        turned = replace(t.sequences[0], ids=t.sequences[0].ids.flip(1))
        bad, said = replace(t, run=replace(t.run, sequences=(turned, t.sequences[1]))), "whole vocabulary in order"
    with pytest.raises(QlabError, match=said):
        write(bad, tmp_path / "t")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "rename", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_write_that_fails_half_way_changes_nothing(
    made: Trace, fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException, there: bool, good: int
) -> None:
    other = record(fake, Request(PROMPTS, 2))
    if there:
        write(other, tmp_path / "t")
    real, calls = getattr(os, call), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == good + 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    said = ""
    try:
        write(made, tmp_path / "t", overwrite=True)
    except (QlabError, KeyboardInterrupt) as e:
        said = str(e) or "interrupted"
    monkeypatch.undo()
    failed = said != ""
    if isinstance(error, OSError) and failed:
        assert said == f"cannot write {tmp_path / 't'}: No space left on device; name a directory that can be written"
    assert failed == (len(calls) > good)
    if failed and not there:
        assert os.listdir(tmp_path) == []
    else:
        assert os.listdir(tmp_path) == ["t"]
        assert_same(read(tmp_path / "t"), other if failed else made)


def test_only_a_trace_is_replaced_and_only_on_request(made: Trace, fake, tmp_path: Path) -> None:
    other = record(fake, Request(PROMPTS, 2))
    write(made, tmp_path / "t")
    with pytest.raises(QlabError, match="t exists already; name another directory or ask to overwrite it"):
        write(other, tmp_path / "t")
    assert_same(read(tmp_path / "t"), made)
    write(other, tmp_path / "t", overwrite=True)
    assert_same(read(tmp_path / "t"), other)
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("kind", ["empty", "foreign", "more", "file", "link", "dangling"])
def test_what_is_no_trace_is_never_replaced(made: Trace, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "t"
    write(made, tmp_path / "real")
    if kind == "file":
        target.write_text("mine")
    elif kind in ("link", "dangling"):
        target.symlink_to(tmp_path / ("real" if kind == "link" else "absent"))
    elif kind == "more":
        write(made, target)
        (target / "notes.txt").write_text("mine")
    else:
        target.mkdir()
        if kind == "foreign":
            (target / "trace.json").write_text("{}")
    with pytest.raises(QlabError, match="t exists and is no trace, so it is not replaced"):
        write(made, target, overwrite=True)
    assert_same(read(tmp_path / "real"), made)
    assert os.path.lexists(target)


def test_a_missing_folder_is_named(made: Trace, tmp_path: Path) -> None:
    with pytest.raises(QlabError, match=r"the folder .*/absent does not exist; make it first"):
        write(made, tmp_path / "absent" / "t")
