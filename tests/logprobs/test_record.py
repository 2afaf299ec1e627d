"""Recording and re-execution, on an engine without a model and on the shipped model by replay."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path as File

import pytest
import torch

from qlab import data
from qlab.engine.builtin import Builtin
from qlab.engine.path import Path
from qlab.engine.run import Request, Tap
from qlab.engine.schedule import Batching
from qlab.errors import QlabError
from qlab.logprobs.comparing import compare_traces
from qlab.logprobs.model import check_same, identify
from qlab.logprobs.prompts import heldout
from qlab.logprobs.record import fed, re_execute, record
from qlab.logprobs.summary import summarise
from qlab.logprobs.taps import choose, linear_names
from qlab.logprobs.trace import Trace, read, write
from tests.logprobs.fake_engine import FakeEngine

AWQ, GPTQ = data.model_directory("awq"), data.model_directory("gptq")


def test_a_re_execution_by_the_same_engine_gives_the_same(made: Trace, fake: FakeEngine) -> None:
    for mode in ("decode", "prefill"):
        t = re_execute(made, fake, mode)
        assert t.manifest.request.forced.mode == mode
        assert t.manifest.request.forced.path == "awq_marlin@h100"
        assert t.manifest.request.forced.manifest == made.manifest.digest
        assert t.manifest.request.imposed
        found = compare_traces(made, t)
        assert (found.total.distance, found.total.identical, found.total.digests) == (0, 1, 0)
        assert [r.tap for r in t.run.rows] == [r.tap for r in made.run.rows]
        for i, (a, b) in enumerate(zip(made.sequences, t.sequences, strict=True)):
            assert torch.equal(a.tokens, b.tokens)
            assert b.prompt == (len(b.tokens) - 1 if mode == "prefill" else a.prompt)
            assert torch.equal(b.ids[:, 5:], a.ids), f"the generator's ids are wanted, sequence {i}"


def test_a_re_execution_follows_the_traces_batching_unless_told(fake: FakeEngine) -> None:
    t = record(fake, Request(((1, 2, 3), (4, 5)), 4, batching=Batching(2, 2)))
    assert re_execute(t, fake).run.steps == t.run.steps
    assert re_execute(t, fake).manifest.request.batching == Batching(2, 2)
    other = re_execute(t, fake, "prefill", batching=Batching(50, 1))
    assert [len(step) for step in other.run.steps] == [1, 1]


def test_a_difference_is_measured_over_the_generators_ids(made: Trace, fake: FakeEngine) -> None:
    other = re_execute(made, replace(fake, shift=30.0))
    found = compare_traces(made, other)
    expected = 0.0
    for a, b in zip(made.sequences, other.sequences, strict=True):
        expected += float((a.logprobs.double() - b.logprobs[:, 5:].double()).square().sum().sqrt()) / 2
    assert found.total.distance == pytest.approx(expected, rel=1e-12)
    assert found.total.distance > 1
    assert found.total.identical < 1
    assert found.total.unlisted == 0
    one = made.sequences[0]
    prompt, generated = found.prompts[0].prompt, found.prompts[0].generated
    assert found.prompts[0].distance == pytest.approx((prompt**2 + generated**2) ** 0.5)
    assert found.prompts[0].rows == len(one.tokens) - 1


def test_traces_whose_tokens_split_are_infinitely_far_apart(fake: FakeEngine) -> None:
    request = Request(((1, 2, 3),), 4)
    found = compare_traces(record(fake, request), record(replace(fake, shift=30.0), request))
    assert found.total.distance == float("inf")
    assert found.total.prompt < float("inf")
    other = record(fake, Request(((1, 2, 4),), 4))
    with pytest.raises(QlabError, match="prompt 1: the two sequences begin with other prompts"):
        compare_traces(record(fake, request), other)
    with pytest.raises(QlabError, match="the traces have 1 and 2 prompts"):
        compare_traces(other, record(fake, Request(((1, 2, 4), (5,)), 4)))


def test_another_models_trace_is_refused_unless_told(made: Trace, fake: FakeEngine, tmp_path: File) -> None:
    other = tmp_path / "other"
    shutil.copytree(AWQ, other)
    weights = other / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(QlabError, match=r"the trace was made with awq \(awq, .*\), and this is other \(awq, .*--any-model"):
        re_execute(made, replace(fake, directory=other))
    assert re_execute(made, replace(fake, directory=other), any_model=True).manifest.model.name == "other"
    re_execute(made, replace(fake, directory=GPTQ))  # the shipped model's other checkpoint


def test_models_are_known_by_content(tmp_path: File) -> None:
    shutil.copytree(AWQ, tmp_path / "copy")
    copy = identify(tmp_path / "copy")
    assert copy == replace(identify(AWQ), name="copy")
    (tmp_path / "copy" / "README.md").write_text("x")
    assert identify(tmp_path / "copy") == copy
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text() + " ")
    assert identify(tmp_path / "copy").digest != copy.digest
    with pytest.raises(QlabError, match=r"has 2048 token ids, big 4096"):
        check_same(copy, replace(copy, name="big", vocabulary=4096), any_model=True)
    with pytest.raises(QlabError, match="absent is not a directory"):
        identify(tmp_path / "absent")


def test_every_part_of_a_model_counts(tmp_path: File) -> None:
    files = {"config.json": b'{"vocab_size": 9}', "a.safetensors": b"a", "b.safetensors": b"b"}
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    first = identify(tmp_path)
    assert (first.method, first.vocabulary) == ("unquantised", 9)
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw + b" ")
        assert identify(tmp_path).digest != first.digest, name
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    assert identify(tmp_path).digest != first.digest
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(QlabError, match=r"config.json: vocab_size is None"):
        identify(tmp_path)


def test_taps_are_drawn_by_seed_or_named_by_a_glob() -> None:
    names = linear_names(AWQ)
    assert names[1] == "model.layers.0.self_attn.o_proj"
    assert len(names) == 12
    drawn = choose("5", names, [10, 4], 3)
    assert drawn == choose("5", names, [10, 4], 3) != choose("5", names, [10, 4], 4)
    assert [sum(t.sequence == s for t in drawn) for s in (0, 1)] == [5, 5]
    assert all(t.position < [10, 4][t.sequence] for t in drawn)
    assert choose("*.2.*down_proj", names, [2], 0) == {Tap("model.layers.2.mlp.down_proj", 0, t) for t in (0, 1)}
    assert len(choose("48", names, [4], 0)) == 48
    for asked, said in (("0", "ask for 1 to 48"), ("49", "ask for 1 to 48"), ("x*", "matches no linear; names are like")):
        with pytest.raises(QlabError, match=said):
            choose(asked, names, [4], 0)


def test_an_engine_must_say_which_checkpoint_it_runs(fake: FakeEngine) -> None:
    with pytest.raises(QlabError, match="engine builtin does not say which checkpoint it runs"):
        record(replace(fake, directory=None), Request(((1, 2),), 1))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The shipped model under Marlin as on an H100, through a directory."""
    prompts = heldout(AWQ, 2, 20)
    taps = choose("3", linear_names(AWQ), [22, 22], 0)
    request = Request(prompts, 3, batching=Batching(12), taps=taps, digests=True)
    counted = []
    trace = record(engine("awq_marlin@h100"), request, model=identify(AWQ), advance=counted.append)
    assert sum(counted) == fed(request) == 44
    directory = tmp_path_factory.mktemp("shipped") / "t"
    write(trace, directory)
    return read(directory)


@lru_cache
def engine(path: str) -> Builtin:
    p = Path.parse(path)
    return Builtin(GPTQ if p.source == "gptq" else AWQ, p, torch.device("cpu"))


def again(recorded: Trace, path: str, mode: str) -> Trace:
    return re_execute(recorded, engine(path), mode, model=identify(AWQ))


@pytest.mark.parametrize("path", ["awq_marlin@h100", "awq_marlin@h200"])
def test_the_same_class_gives_the_same_bits(recorded: Trace, path: str) -> None:
    t = again(recorded, path, "decode")
    found = compare_traces(recorded, t).total
    assert (found.distance, found.identical, found.digests, found.flips, found.unlisted) == (0, 1, 0, 0, 0)
    for a, b in zip(recorded.run.rows, t.run.rows, strict=True):
        assert (a.tap, a.row, a.M, a.kernel) == (b.tap, b.row, b.M, b.kernel)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)


def test_another_kernel_gives_other_bits(recorded: Trace) -> None:
    for mode in ("decode", "prefill"):
        found = compare_traces(recorded, again(recorded, "awq@h100", mode)).total
        assert 1e-3 < found.distance < 1
        assert found.identical < 0.2
        assert found.digests > 0.9


def test_the_manifest_says_what_ran(recorded: Trace) -> None:
    m, s = recorded.manifest, summarise(recorded)
    assert (str(m.path), m.engine, m.origin, m.dtype) == ("awq_marlin@h100", "builtin", "replay", "float16")
    assert (m.model.method, m.model.vocabulary, m.linears) == ("awq", 2048, linear_names(AWQ))
    assert {c.M for c in m.calls} == {12, 8, 1}
    assert sum(c.count for c in m.calls) == 12 * len(recorded.run.steps)
    assert all(c.kernel == "vllm.marlin.awq" and c.origin == "replay" and c.recipe for c in m.calls)
    (used,) = s.kernels
    assert (used.kernel, used.linears, used.tokens) == ("vllm.marlin.awq", 12, (1, 8, 12))
    assert not m.environment.details
