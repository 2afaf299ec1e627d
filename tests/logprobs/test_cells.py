"""Kept runs: asked for again they are found, whatever changes a number is another run, and damage is no answer."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from qlab.engine.path import Path
from qlab.engine.run import Request, Sampling, Tap
from qlab.engine.schedule import Batching
from qlab.errors import QlabError, UnsupportedError
from qlab.logprobs.cells import Bench, Store, attempt, decode_of, prefill_of
from qlab.logprobs.distance import distances
from tests.logprobs.counted_engine import REASON, Counted
from tests.logprobs.fake_engine import LINEARS, FakeEngine

PROMPT = (5, 6, 7, 8)
REQUEST = Request((PROMPT,), 3, top_k=4)
MARLIN = "awq_marlin@h100"


def bench(path=MARLIN, *, model="m", variant="", **options):
    return Bench(Counted(Path.parse(path), **options), model, variant)


def ran_again(first, second):
    """Whether the second (bench, request) is another run than the first."""
    store = Store()
    for b, request in (first, second):
        store.run(b, request)
    return bool(second[0].engine.requests) if second[0] is not first[0] else len(first[0].engine.requests) > 1


WANTED = torch.tensor([[1]] * 6)
OTHERS = {
    "prompts": {"prompts": ((5, 6, 7, 9),)},
    "new tokens": {"new_tokens": 2},
    "forced": {"forced": ((1, 2, 3),)},
    "budget": {"batching": Batching(2)},
    "temperature": {"sampling": Sampling(0.5)},
    "top-k": {"top_k": 5},
    "wanted": {"wanted": (WANTED,)},
}


@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
def test_another_request_is_another_run(changed):
    assert ran_again((bench(), REQUEST), (bench(), replace(REQUEST, **changed)))


def test_other_wanted_ids_and_forced_tokens_are_other_runs():
    for name, one, other in (
        ("wanted", (WANTED,), (WANTED + 1,)),
        ("forced", ((1, 2, 3),), ((1, 2, 4),)),
        ("batching", Batching(8, 1), Batching(8, 2)),
    ):
        assert ran_again((bench(), replace(REQUEST, **{name: one})), (bench(), replace(REQUEST, **{name: other})))


@pytest.mark.parametrize(
    "other",
    [
        bench(model="n"),
        bench(variant="flip"),
        bench(name="vllm"),
        bench("awq@h100"),
        bench("awq_marlin@h200"),
        bench("awq_marlin@h100:vllm"),
        bench(dtype=torch.bfloat16),
        bench(native=True),
    ],
    ids=lambda b: f"{b.model} {b.variant} {b.engine.name} {b.engine.path} {b.engine.dtype} {b.native}",
)
def test_another_engine_is_another_run(other):
    assert ran_again((bench(), REQUEST), (other, REQUEST))


def test_the_same_again_is_one_run():
    assert not ran_again((bench(), REQUEST), (bench(), replace(REQUEST)))


@pytest.mark.parametrize(
    ("path", "native", "matters"),
    [
        (MARLIN, False, False),
        ("awq@h100", False, False),
        ("vllm.awq_triton@h100", False, False),
        ("gptq@h100", False, True),
        ("vllm.gptq_gemm@h100", False, True),
        (MARLIN, True, True),
    ],
)
def test_a_seed_matters_to_atomics_and_to_native_kernels(path, native, matters):
    b = bench(path, native=native)
    assert b.repeats == matters
    assert ran_again((b, REQUEST), (b, replace(REQUEST, seed=1))) == matters


def test_what_is_drawn_depends_on_seed_and_number_of_the_sequence():
    b, warm = bench(), replace(REQUEST, sampling=Sampling(0.8))
    assert not ran_again((bench(), REQUEST), (bench(), replace(REQUEST, sampling=Sampling(0.0, 1))))
    assert not ran_again((bench(), REQUEST), (bench(), replace(REQUEST, first=3)))
    assert ran_again((bench(), warm), (bench(), replace(warm, sampling=Sampling(0.8, 1))))
    assert ran_again((b, warm), (b, replace(warm, first=3)))
    flipped = bench(variant="flip")
    assert ran_again((flipped, REQUEST), (flipped, replace(REQUEST, first=3)))
    forced = replace(warm, forced=((1, 2, 3),))
    assert not ran_again((bench(), forced), (bench(), replace(forced, first=3, sampling=Sampling(0.2, 7))))


def test_rows_and_digests_are_not_asked_for():
    b = bench()
    taps = frozenset({Tap(LINEARS[0], 1, 2)})
    two = replace(REQUEST, prompts=(PROMPT, PROMPT[:2]), taps=taps, digests=True)
    store = Store()
    assert len(store.run(b, two)) == 2  # the second prompt alone has no sequence 1 to tap
    assert all(not r.taps and not r.digests for r in b.engine.requests)
    store.run(b, REQUEST)
    assert len(b.engine.requests) == 2


def test_each_prompt_is_a_run_of_its_own_with_its_number():
    b, store = bench(), Store()
    two = replace(REQUEST, prompts=(PROMPT, PROMPT[:2]), first=4)
    store.run(b, two)
    assert [(r.prompts, r.first) for r in b.engine.requests] == [((PROMPT,), 4), ((PROMPT[:2],), 5)]
    store.run(b, replace(two, prompts=(PROMPT[:2], PROMPT, PROMPT[1:])))
    assert len(b.engine.requests) == 3


def test_prompts_of_one_batch_are_one_run(tmp_path):
    b = bench()
    two = replace(REQUEST, prompts=(PROMPT, PROMPT), batching=Batching(4, 2))
    Store(tmp_path).run(b, two)
    assert [len(r.prompts) for r in b.engine.requests] == [2]
    assert len(list(tmp_path.iterdir())) == 2, "equal prompts in two places of a batch"
    told = []
    store = Store(tmp_path)
    store.run(b, two, told.append)
    once = FakeEngine(b.engine.path).run(two).calls
    assert {(c.linear, c.M): c.count for c in store.called(MARLIN)} == {(c.linear, c.M): c.count for c in once}
    assert len(b.engine.requests) == 1
    assert sum(told) == 12
    next(iter(sorted(tmp_path.iterdir()))).unlink()
    told.clear()
    Store(tmp_path).run(b, two, told.append)
    assert [len(r.prompts) for r in b.engine.requests] == [2, 2]
    assert sum(told) == 12


def same(a, b):
    return all(
        torch.equal(x.tokens, y.tokens)
        and x.prompt == y.prompt
        and torch.equal(x.ids, y.ids)
        and torch.equal(x.logprobs, y.logprobs)
        for x, y in zip(a, b, strict=True)
    )


def test_a_folder_gives_back_sequences_and_calls(tmp_path):
    b, store = bench(), Store(tmp_path)
    three = replace(REQUEST, prompts=(PROMPT, PROMPT[:2], PROMPT[1:]))
    first = store.run(b, three)
    calls = store.called(MARLIN)
    assert {c.M for c in calls} == {1, 2, 3, 4}
    assert sum(c.count for c in calls) == len(LINEARS) * (3 + 3 * 2)
    resumed = Store(tmp_path)
    assert resumed.called(MARLIN) == ()
    assert same(first, resumed.run(b, three))
    assert resumed.called(MARLIN) == calls
    assert resumed.called("awq@h100") == ()
    assert len(b.engine.requests) == 3


def damage(file, how):
    raw = bytearray(file.read_bytes())
    if isinstance(how, int):
        raw[how] ^= 1
    elif how == "empty":
        raw.clear()
    elif how == "half":
        del raw[len(raw) // 2 :]
    elif how == "no header":
        raw[:] = b"\x02\0\0\0\0\0\0\0{}"
    elif how == "prompt":
        raw = raw.replace(b'\\"prompt\\": 4', b'\\"prompt\\": 3')
    file.write_bytes(raw)


@pytest.mark.parametrize("how", [-1, -200, 9, 0, "empty", "half", "no header", "prompt"])
def test_a_damaged_run_is_computed_again(tmp_path, how):
    b = bench()
    good = Store(tmp_path).run(b, REQUEST)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    damage(file, how)
    assert file.read_bytes() != before
    assert same(good, Store(tmp_path).run(b, REQUEST))
    assert len(b.engine.requests) == 2
    Store(tmp_path).run(b, REQUEST)
    assert len(b.engine.requests) == 2


def test_a_run_under_another_name_is_no_answer(tmp_path):
    b, other = bench(), replace(REQUEST, prompts=((9, 8, 7, 6),))
    Store(tmp_path).run(b, REQUEST)
    (file,) = tmp_path.iterdir()
    good = Store(tmp_path).run(b, other)
    (second,) = set(tmp_path.iterdir()) - {file}
    second.write_bytes(file.read_bytes())
    assert same(good, Store(tmp_path).run(b, other))
    assert len(b.engine.requests) == 3


def test_a_file_that_was_being_written_does_not_count(tmp_path, monkeypatch):
    b = bench()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path).run(b, REQUEST)
    assert list(tmp_path.iterdir()) == []
    Store(tmp_path).run(b, REQUEST)
    (file,) = tmp_path.iterdir()
    (tmp_path / f".{file.name}.abc").write_bytes(file.read_bytes())  # what a killed process leaves
    file.unlink()
    Store(tmp_path).run(b, REQUEST)
    assert len(b.engine.requests) == 3


def test_what_cannot_be_computed_says_why_and_keeps_nothing(tmp_path):
    b = bench(most=3)
    assert attempt(lambda: Store(tmp_path).run(b, REQUEST)) == REASON
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnsupportedError, match=REASON):
        Store().run(b, REQUEST)
    with pytest.raises(QlabError, match="bad"):
        attempt(lambda: (_ for _ in ()).throw(QlabError("bad")))


def test_both_re_executions_have_the_generators_rows():
    b, store = bench(), Store()
    two = replace(REQUEST, prompts=(PROMPT, PROMPT[:2]))
    made = store.run(b, two)
    prefilled = store.run(b, prefill_of(made, two))
    decoded = store.run(b, decode_of(made, two))
    for a, p, d in zip(made, prefilled, decoded, strict=True):
        assert torch.equal(a.tokens, p.tokens)
        assert torch.equal(a.tokens, d.tokens)
        assert len(a.ids) == len(p.ids) == len(d.ids) == len(a.tokens) - 1
        assert (p.prompt, d.prompt) == (len(a.tokens) - 1, a.prompt)
    for again in (prefilled, decoded):
        assert distances(made, again, top_k=4).tolist() == [0, 0]


def test_sequences_of_other_lengths_are_no_one_request():
    b = bench()
    one, other = (Store().run(b, replace(REQUEST, new_tokens=n))[0] for n in (2, 3))
    with pytest.raises(QlabError, match=r"have \[2, 3\] generated tokens"):
        decode_of((one, other), REQUEST)
