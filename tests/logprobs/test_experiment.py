"""The experiment's runs: nothing is computed twice, nothing is left out, progress ends at the end, reasons are everywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qlab.engine.path import Path
from qlab.engine.run import Sampling
from qlab.engine.schedule import Batching
from qlab.errors import QlabError
from qlab.logprobs.cells import Store
from qlab.logprobs.experiment import KEPT, Plan, compute, other_batches, summarise
from qlab.logprobs.maker import Maker, family
from qlab.logprobs.tabulate import tabulate
from qlab.report import logprob_markdown
from qlab.serial import to_plain
from tests.logprobs.counted_engine import REASON, Benches

FEW = tuple(Path(m, "h100") for m in ("awq", "gptq"))
PATHS = tuple(Path(m, g) for g in ("a100", "h100") for m in ("awq", "awq_marlin", "gptq"))
PROMPTS = ((5, 6, 7, 8), (900, 1), (3, 4, 5))
PLAN = Plan(PATHS, PROMPTS, 3, batching=Batching(4), batches=other_batches(Batching(4), 7, 3))


def cells_of(plan, benches, store):
    """Cells, and what progress was told."""
    told = []
    return compute(plan, benches, store, told.append), told


def done(plan=PLAN, benches=None, store=None):
    """Cells, tables and what progress was told."""
    cells, told = cells_of(plan, benches or Benches(), store or Store())
    return cells, tabulate(cells, plan.paths, top_k=plan.top_k), told


@pytest.fixture(scope="module")
def whole():
    return done()


def test_every_cell_is_there(whole):
    cells, tables, _ = whole
    assert set(cells.recordings) == set(cells.again) == set(cells.prefill_again) == set(PATHS)
    assert set(cells.prefill) == set(cells.decode) == {(g, r) for g in PATHS for r in PATHS}
    assert set(cells.batches) == {(p, name) for p in PATHS for name in ("whole", "token by token", "beside 2 others")}
    assert not any(isinstance(found, str) for part in vars(cells).values() for found in part.values())
    assert len(tables.across) == 3
    assert len(tables.full) == 3


def test_cells_hold_what_they_are_named(whole):
    cells, _, _ = whole
    g, r = Path("awq", "a100"), Path("gptq", "h100")
    own = cells.recordings[g]
    for re_executed in (cells.prefill[g, r], cells.decode[g, r], cells.batches[g, "whole"]):
        assert [s.tokens.tolist() for s in re_executed] == [s.tokens.tolist() for s in own]
    assert [s.prompt for s in cells.decode[g, r]] == [4, 2, 3]
    assert [s.prompt for s in cells.prefill[g, r]] == [6, 4, 5]
    for a, b in zip(own, cells.prefill[g, r], strict=True):
        listed = [set(row) for row in b.ids[:, KEPT:].tolist()]
        assert all(set(ids) <= have for ids, have in zip(a.ids[:, :5].tolist(), listed, strict=True)), "the generator's ids"


def test_each_distinct_run_is_computed_once():
    """awq and Marlin repeat themselves, so that a second recording and a second prefill are the first ones."""
    benches = Benches()
    plan = replace(PLAN, paths=tuple(Path(m, "h100") for m in ("awq", "gptq")), batches={})
    done(plan, benches)
    by_path = {str(path): b.engine.requests for (path, _), b in benches.made.items()}
    # Of each prompt: a recording, a prefill and a decode of the tokens, which are one here; gptq records and prefills again.
    assert len(by_path["awq@h100"]) == 3 * len(PROMPTS)
    assert len(by_path["gptq@h100"]) == 5 * len(PROMPTS)
    assert {r.seed for r in by_path["gptq@h100"]} == {0, 1}
    crossed = [r for r in by_path["gptq@h100"] if r.forced and r.prompts[0][:4] == PROMPTS[0] and r.new_tokens == 3]
    assert [r.seed for r in crossed] == [1], "a re-execution adds in an order of its own"


FOUR = (*PROMPTS, (1, 2, 3))


@pytest.mark.parametrize(
    ("plan", "most"),
    [
        (replace(PLAN, paths=FEW), {}),
        (PLAN, {"gptq": 3}),
        (PLAN, {"gptq": 0, "awq": 0, "awq_marlin": 0}),
        (replace(PLAN, paths=FEW), {"awq": 4}),
        (replace(PLAN, paths=FEW, batches={}), {}),
        (replace(PLAN, paths=FEW, batching=Batching(8, 3)), {}),
        (replace(PLAN, paths=FEW, batching=Batching(8, 3)), {"gptq": 6}),
        (replace(PLAN, paths=PATHS[:1]), {}),
        (
            replace(PLAN, paths=PATHS[:2], prompts=FOUR, new_tokens=1, batches=other_batches(Batching(2), 4, 4)),
            {"awq_marlin": 2},
        ),
        (replace(PLAN, paths=FEW, sampling=Sampling(0.8, 3)), {}),
    ],
)
def test_progress_ends_at_the_plans_tokens(plan, most, tmp_path):
    _, told = cells_of(plan, Benches(most=most), Store(tmp_path))
    assert sum(told) == plan.tokens
    _, told = cells_of(plan, Benches(most=most), Store(tmp_path))
    assert sum(told) == plan.tokens, "with kept runs"
    next(tmp_path.glob("*.safetensors"), tmp_path / "none").unlink(missing_ok=True)
    _, told = cells_of(plan, Benches(most=most), Store(tmp_path))
    assert sum(told) == plan.tokens, "with some of them"


@pytest.mark.parametrize("together", [1, 3])
def test_an_interrupted_experiment_goes_on(tmp_path, together):
    plan = replace(PLAN, paths=PATHS[1:4], batching=Batching(8, together))
    clean, reference = Benches(), Store()
    _, tables, _ = done(plan, clean, reference)
    stop = clean.done // 2
    with pytest.raises(KeyboardInterrupt):
        done(plan, Benches(stop_after=stop), Store(tmp_path))
    second, store = Benches(), Store(tmp_path)
    _, again, told = done(plan, second, store)
    assert second.done == clean.done - stop, "only what was missing"
    assert to_plain(again) == to_plain(tables)
    assert sum(told) == plan.tokens
    assert [store.called(str(p)) for p in plan.paths] == [reference.called(str(p)) for p in plan.paths]
    third = Benches()
    done(plan, third, Store(tmp_path))
    assert third.done == 0


def test_a_path_that_is_refused_says_why_in_every_table():
    benches = Benches(most={"gptq": 3})
    cells, t, _ = done(benches=benches)
    gone = {p for p in PATHS if p.method == "gptq"}
    for p in PATHS:
        for found in (cells.recordings[p], cells.again[p], cells.prefill_again[p]):
            assert isinstance(found, str) == (p in gone)
    for part in (cells.prefill, cells.decode):
        assert {pair for pair, found in part.items() if found == REASON} == {
            (g, r) for g in PATHS for r in PATHS if g in gone or r in gone
        }
    names = {str(p) for p in gone}
    assert {n.path for n in t.noise_floor if n.prefill.reason == n.decode.reason == REASON} == names
    assert {(b.path, b.schedule) for b in t.batches if b.distance.reason == REASON} == {
        (n, s) for n in names for s in PLAN.batches
    }
    assert len(t.batches) == len(PATHS) * len(PLAN.batches)
    assert {r.methods for r in t.across if r.reason == REASON} == {("awq", "gptq"), ("awq_marlin", "gptq")}
    for m in (*t.within, *t.full):
        for key, row in zip(m.keys, m.cells, strict=True):
            for other, e in zip(m.keys, row, strict=True):
                assert (e.figure is None) == (e.reason == REASON) == bool(names & {key, other})
    assert not any({d.claimed, d.other, d.verifier} & names for d in t.detection)
    store = Store()
    cells = compute(PLAN, Benches(most={"gptq": 3}), store)
    result = summarise(PLAN, cells, store, Maker({}), {}, 0.0)
    assert {d.path for d in result.dispatched if d.reason == REASON} == names
    assert all((not d.calls) == (d.path in names) for d in result.dispatched)
    assert REASON in logprob_markdown.document(result)


def test_only_the_schedule_that_cannot_run_is_refused():
    _, t, _ = done(benches=Benches(most={"awq": 4}))
    refused = {(b.path, b.schedule) for b in t.batches if b.distance.reason}
    assert refused == {(f"awq@{g}", "whole") for g in ("a100", "h100")}
    assert not any(n.prefill.reason for n in t.noise_floor)


def test_other_errors_are_not_cells():
    class Broken(Benches):
        def _count(self):
            raise QlabError("a log-probability is not a number")

    with pytest.raises(QlabError, match="not a number"):
        done(benches=Broken())


@pytest.mark.parametrize(
    ("chunk", "prompts", "name", "batching"),
    [
        (50, 12, "beside 3 others", Batching(50, 4)),
        (50, 4, "beside 3 others", Batching(50, 4)),
        (50, 3, "beside 2 others", Batching(50, 3)),
        (50, 2, "beside another", Batching(50, 2)),
        (1, 12, "beside 3 others", Batching(4, 4)),
    ],
)
def test_schedules_hold_what_their_names_say(chunk, prompts, name, batching):
    found = other_batches(Batching(chunk), 99, prompts)
    assert list(found) == ["whole", "token by token", name]
    assert found[name] == batching
    lengths = [min(chunk, 9)] * prompts
    assert max(len(step) for step in batching.steps(lengths, lengths)) == batching.together
    assert len(found["whole"].steps([99], [99])) == 1
    assert {len(s) for s in found["token by token"].steps([5], [5])} == {1}


def test_one_prompt_has_no_other_beside_it():
    assert list(other_batches(Batching(50), 60, 1)) == ["whole", "token by token"]


def test_one_gpu_and_one_prompt():
    plan = replace(PLAN, paths=PATHS[:2], prompts=PROMPTS[:1], batches={})
    _, t, told = done(plan)
    assert t.across == t.full == ()
    assert sum(told) == plan.tokens
    figure = t.within[0].cells[0][1].figure
    assert figure.value > 0
    assert math.isnan(figure.low)


def test_a_claimed_path_that_verifies_itself_has_its_noise_floor_for_a_score():
    """gptq's atomics: a GPU of the same class must not be told by them, whatever its own noise is."""
    paths = (Path("gptq", "h100"), Path("gptq", "h200"))
    plan = replace(PLAN, paths=paths, batches={})
    cells = compute(plan, Benches(), Store())
    for s in (*cells.prefill_again[paths[0]], *cells.prefill[paths[1], paths[0]]):
        s.logprobs.add_(0.25)
    (t,) = tabulate(cells, paths, top_k=5).detection
    assert (t.claimed, t.other, t.verifier) == ("gptq@h100", "gptq@h200", "gptq@h100")
    assert (t.auc.value, t.tokens.value) == (0.5, math.inf)


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ("reference.float64", "gptq"),
        ("reference.float64 awq", "awq"),
        ("triton.awq_gemm reference.float64", "awq"),
        ("awq gptq reference.float64", "gptq"),
    ],
)
def test_a_kernel_of_any_checkpoint_runs_the_others(methods, expected):
    paths = [Path(m, "h100") for m in methods.split()]
    either = family(paths)
    assert either == expected
    maker = Maker({"awq": None, "gptq": None}, either=either)
    assert {maker.directory(p).name for p in paths if not p.source} <= {expected}
