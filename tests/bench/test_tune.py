"""What the tuner makes of its measurements; measuring itself needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import tune
from bench.tune import Measured, Result
from bench.tune_candidates import FAMILIES, candidates
from qlab import environment
from qlab.errors import QlabError
from qlab.hardware import gpu
from qlab.recipes import tuned


def measured(
    m: int, slices: int, first: float | None, median: float | None = None, chosen: bool = False, k: int = 4096
) -> Measured:
    return Measured(k, 4096, m, slices, {"block_m": 16 * slices}, "" if first else "wrong", first, median, chosen)


def result(kernel: str, *rows: Measured) -> Result:
    here = environment.collect(details=False)
    return Result(tune.SCHEMA, True, here, "h200", kernel, "float16", 128, False, 4e12, {"torch": "2"}, 1.0, {}, rows)


def test_the_chosen_one_is_written_and_other_shapes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "LEAST_TRIED", 1)
    old = (tuned.Entry(4096, 4096, 1, 9, {}), tuned.Entry(8192, 4096, 1, 7, {}))
    rows = (measured(1, 1, 3.0), measured(1, 2, 2.0, 2.1), measured(1, 4, 2.1, 2.0, True), measured(1, 8, None))
    entries = tune.entries(result("triton.w4a16", *rows), old)
    assert [(e.k, e.rows, e.slices) for e in entries] == [(8192, 1, 7), (4096, 1, 4)]
    assert entries[1].config == {"block_m": 64}


def test_one_recipe_for_every_m(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 slices lose 10% at each M, 1 and 4 lose more at one of them."""
    monkeypatch.setattr(tune, "LEAST_TRIED", 1)
    rows = [
        *(measured(1, 1, 2.0), measured(1, 2, 1.1), measured(1, 4, 1.0, 1.0, True)),
        *(measured(64, 1, 1.0, 1.0, True), measured(64, 2, 1.1), measured(64, 4, 2.0)),
    ]
    entries = tune.entries(result("cuda.batch_invariant", *rows))
    assert [(e.rows, e.slices) for e in entries] == [(1, 2), (64, 2)]
    assert [e.slices for e in tune.entries(result("cuda.split", *rows))] == [4, 1]


def test_too_few_candidates_give_the_usual_tile() -> None:
    some = [measured(1, s, 1.0 + s, 1.0 + s, s == 1) for s in (1, 2, 4, 8)]
    split = tune.entries(result("cuda.split", *some, measured(4096, 4, 1.0, 1.0, True)))
    assert [(e.rows, e.slices, e.config.get("rows")) for e in split] == [(1, 1, None), (4096, 1, 256)]
    other = [replace(o, chosen=False) for o in some[1:]]
    one = tune.entries(result("cuda.batch_invariant", *other, measured(1, 16, 9.0, 9.0, True), measured(4096, 4, 1.0)))
    assert [(e.rows, e.slices, e.config.get("total")) for e in one] == [(1, 2, None), (4096, 2, 1)]


def test_a_log_serves_the_kernel_that_runs_the_same_code() -> None:
    log = result("cuda.split", measured(1, 1, 1.0, 1.0, True))
    assert tune.relabelled(log, "cuda.batch_invariant").kernel == "cuda.batch_invariant"
    with pytest.raises(QlabError, match=r"the log is of cuda\.split"):
        tune.relabelled(log, "triton.w4a16")


def test_no_common_slices() -> None:
    rows = (measured(1, 1, 1.0, 1.0, True), measured(64, 2, 1.0, 1.0, True))
    with pytest.raises(QlabError, match="no number of slices was timed at every M"):
        tune.entries(result("cuda.batch_invariant", *rows))


@pytest.mark.parametrize("kernel", FAMILIES)
@pytest.mark.parametrize("m", [1, 16, 64, 256, 4096])
def test_candidates_are_distinct_and_leave_slices_rows(kernel: str, m: int) -> None:
    for k, n in ((4096, 4096), (18944, 3584), (128, 64)):
        found = list(candidates(kernel, m, k, n, gpu("h200")))
        assert found
        assert len(set(found)) == len(found)
        assert all(len(tuned.ranges(k, c.slices)) == c.slices for c in found)


def test_lines_and_options() -> None:
    text = tune.line([measured(1, 2, 2e-6, 2e-6, True), measured(1, 8, None)], 4e-6)
    assert text.endswith("2 tried; us: 2.0 (S2 32); matmul 4.0; 1 out: wrong")
    assert tune.numbers("1,2;3,4", "--shapes", 2) == ((1, 2), (3, 4))
    for bad in ("1,2,3", "a,b", "0,1", ""):
        with pytest.raises(QlabError, match="--shapes"):
            tune.numbers(bad, "--shapes", 2)
