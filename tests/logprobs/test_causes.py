"""Where noise comes from: what is equal or replayed on both sides makes none, and each part shows where it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qlab import environment
from qlab.engine.flip import Flip
from qlab.engine.path import Path
from qlab.engine.schedule import Batching
from qlab.errors import QlabError, UnsupportedError
from qlab.logprobs.causes import DISPATCH, KERNELS, REPLAY, SCHEMA, SERIES, Causes, Study
from qlab.logprobs.cells import Store
from qlab.logprobs.experiment import Plan, compute
from qlab.logprobs.maker import Maker
from qlab.logprobs.tabulate import tabulate
from qlab.serial import write_json
from tests.logprobs.counted_engine import Benches

PLAN = Plan((), ((5, 6, 7, 8), (900, 1), (3, 4, 5)), 3, batching=Batching(4))
METHODS = ("awq", "awq_marlin")
SHARES = (0.25, 0.5)


def study(generator="a100", verifier="h100", *, plan=PLAN, methods=METHODS, benches=None, store=None):
    told = []
    return Study(plan, methods, generator, verifier, benches or Benches(), store or Store(), told.append), told


@pytest.fixture(scope="module")
def settings():
    return study()[0].settings(SHARES)


def of(settings, series, share=0.0):
    (found,) = (s for s in settings if (s.series, s.share) == (series, share))
    return found


def test_every_series_at_every_share(settings):
    assert [(s.share, s.series) for s in settings] == [(share, name) for share in (0.0, *SHARES) for name in SERIES]


def test_what_is_compared(settings):
    assert of(settings, KERNELS).kernels == ("awq@a100 to awq@h100", "awq_marlin@a100 to awq_marlin@h100")
    assert of(settings, DISPATCH).kernels == ("awq@a100:vllm to awq@h100:vllm", "awq_marlin@a100:vllm to awq_marlin@h100:vllm")
    assert of(settings, REPLAY, 0.5).kernels == ("awq@a100 to awq@a100", "awq_marlin@a100 to awq_marlin@a100")


def test_a_replay_of_the_generators_kernels_has_no_noise_until_attention_differs(settings):
    s = of(settings, REPLAY)
    assert (s.noise.value, s.noise.low, s.noise.high, s.snr.value) == (0, 0, 0, math.inf)
    assert 0 < of(settings, REPLAY, 0.25).noise.value < of(settings, REPLAY, 0.5).noise.value
    assert of(settings, KERNELS).noise.value > 0


def test_equal_gpus_have_no_noise_and_one_signal():
    found = study("h200", "h200")[0].settings((0.5,))
    for name in SERIES:
        assert (of(found, name).noise.value, of(found, name).snr.value) == (0, math.inf)
        assert of(found, name, 0.5).noise.value > 0
    assert len({of(found, name).signal.value for name in SERIES}) == 1


def test_the_experiments_signal_and_noise(settings):
    """The same paths in the experiment's table, where the noise is taken in both directions."""
    plan = replace(PLAN, paths=tuple(Path(m, g) for g in ("a100", "h100") for m in METHODS))
    (row,) = tabulate(compute(plan, Benches(), Store()), plan.paths, top_k=5).across
    s = of(settings, KERNELS)
    assert s.signal.value == pytest.approx(row.signal.value, rel=1e-5)
    assert s.noise.value == pytest.approx(row.noise.value, rel=0.2)


def test_the_signal_does_not_depend_on_the_share(settings):
    for name in SERIES:
        assert len({of(settings, name, share).signal for share in (0.0, *SHARES)}) == 1


@pytest.mark.parametrize("shares", [SHARES, (0.5,)])
def test_progress_ends_at_the_studys_cells(shares, tmp_path):
    for _ in range(2):  # the second time with kept runs
        work, told = study(store=Store(tmp_path))
        work.settings(shares)
        assert sum(told) == PLAN.fed * Study.cells(shares)


def test_a_verifier_adds_atomics_in_an_order_of_its_own():
    benches = Benches()
    study(methods=("gptq", "gptq_marlin"), benches=benches)[0].settings((0.5,))
    by_path = {(str(p), flip is not None): b.engine.requests for (p, flip), b in benches.made.items()}
    assert {r.seed for r in by_path["gptq@a100", False]} == {0, 1}
    assert {r.seed for r in by_path["gptq@h100", True]} == {1}


def test_an_interrupted_study_goes_on(tmp_path):
    clean = Benches()
    expected = study(benches=clean)[0].settings(SHARES)
    with pytest.raises(KeyboardInterrupt):
        study(benches=Benches(stop_after=20), store=Store(tmp_path))[0].settings(SHARES)
    second = Benches()
    assert study(benches=second, store=Store(tmp_path))[0].settings(SHARES) == expected
    assert second.done == clean.done - 20


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(UnsupportedError, match="opaque: cuBLAS"):
        study(benches=Benches(most={"awq": 3}))[0].settings(SHARES)


def test_on_a_tiny_model(awq):
    plan = Plan((), (tuple(range(40, 52)),), 2)
    with Maker({"awq": awq}, device="cpu") as maker:
        found = Study(plan, METHODS, "a100", "h100", maker.bench, Store()).settings((0.1,))
        engines = [maker.bench(Path("awq", "a100"), flip).engine for flip in (None, Flip(0.1), Flip(0.2))]
    assert of(found, REPLAY).noise.value == 0
    assert of(found, REPLAY, 0.1).noise.value > 0
    assert of(found, KERNELS).signal.value > 0
    assert [e.flip for e in engines] == [None, Flip(0.1), Flip(0.2)]
    assert len({id(e.model) for e in engines}) == 1, "one model for all shares"


def test_reads_what_was_written(settings, tmp_path):
    c = Causes(SCHEMA, {}, environment.collect(details=False), ("m",), METHODS, "a100", "h100", 3, 20, settings, 1.0)
    write_json(tmp_path / "c.json", c)
    assert Causes.read(tmp_path / "c.json") == c
    assert [s.share for s in c.series(REPLAY)] == [0, *SHARES]
    (tmp_path / "c.json").write_text((tmp_path / "c.json").read_text().replace(SCHEMA, "other/1"))
    with pytest.raises(QlabError, match="holds 'other/1'"):
        Causes.read(tmp_path / "c.json")
