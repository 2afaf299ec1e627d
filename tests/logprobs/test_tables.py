"""The tables from runs whose every distance is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qlab.engine.path import Path
from qlab.errors import QlabError
from qlab.logprobs.tables import ExperimentResult
from qlab.logprobs.tabulate import tabulate
from qlab.serial import write_json
from tests.logprobs import synthetic_runs as runs


def expected(offset, rows):
    """Mean over prompts of the distance where every one of the 5 log-probabilities is off by ``offset``."""
    return sum(abs(offset) * math.sqrt(runs.K * r) for r in rows) / len(rows)


ALL = [6 + 2 * s + runs.NEW - 1 for s in range(8)]
DECODED = [runs.NEW - 1] * 8


@pytest.fixture(scope="module")
def both():
    return runs.result()


def at(m, g, r):
    return m.cells[m.keys.index(g)][m.keys.index(r)]


def test_within_prefill_and_decode(both):
    m = both.matrix("a100", "prefill")
    assert m.keys == tuple(f"{k}@a100" for k in runs.METHODS)
    for g in runs.METHODS:
        for r in runs.METHODS:
            off = runs.OFFSET[g] - runs.OFFSET[r]
            e = at(m, f"{g}@a100", f"{r}@a100")
            assert e.figure.value == pytest.approx(expected(off, ALL), rel=1e-12)
            assert e.figure.low <= e.figure.value <= e.figure.high
            assert e.identical == (g == r)
            d = at(both.matrix("a100", "decode"), f"{g}@a100", f"{r}@a100")
            assert d.figure.value == pytest.approx(expected(off, DECODED), rel=1e-12)
    offs = [abs(runs.OFFSET[g] - runs.OFFSET[r]) for g in runs.METHODS for r in runs.METHODS if g != r]
    assert m.off_diagonal.mean.value == pytest.approx(expected(sum(offs) / 12, ALL), rel=1e-12)
    assert (m.off_diagonal.low, m.off_diagonal.high) == pytest.approx((expected(min(offs), ALL), expected(max(offs), ALL)))
    assert m.off_diagonal.mean.low < m.off_diagonal.mean.value < m.off_diagonal.mean.high
    assert m.off_diagonal.cells == 12


def test_free_decode_splits(both):
    m = both.matrix("a100", "decode, free")
    e = at(m, "gptq@a100", "gptq_marlin@a100")
    assert (e.figure.value, e.figure.infinite, e.figure.prompts) == (math.inf, 1, 8)
    assert e.together.value == pytest.approx(expected(0.5, DECODED), rel=1e-12)
    e = at(m, "awq@a100", "gptq@a100")
    assert (e.figure.infinite, e.figure.low, e.together) == (8, math.inf, None)
    assert at(m, "awq@a100", "awq_marlin@a100").figure.value == pytest.approx(expected(0.125, DECODED), rel=1e-12)


def test_noise_floor(both):
    floor = {r.path: r for r in both.tables.noise_floor}
    assert floor["awq_marlin@h100"].prefill.identical
    assert floor["awq_marlin@h100"].decode.identical
    g = floor["gptq@h100"]
    assert (g.method, g.gpu) == ("gptq", "h100")
    assert g.prefill.figure.value == pytest.approx(expected(0.03125, ALL), rel=1e-12)
    assert (g.decode.figure.value, g.decode.figure.infinite) == (math.inf, 2)
    assert g.decode.together.value == pytest.approx(expected(0.03125, DECODED), rel=1e-12)


def test_across(both):
    rows = {r.methods: r for r in both.tables.across}
    assert len(rows) == 6
    r = rows["awq", "awq_marlin"]
    assert r.gpus == ("a100", "h100")
    # On the A100 they are 0.125 apart, on the H100 0.1875; awq does not move between the two, Marlin by 0.0625.
    assert r.signal.value == pytest.approx(expected((0.125 + 0.1875) / 2, ALL), rel=1e-12)
    assert r.noise.value == pytest.approx(expected(0.0625 / 2, ALL), rel=1e-12)
    assert r.snr.value == pytest.approx(5, rel=1e-12)
    assert r.snr.high - r.snr.low < 1e-9  # the ratio is 5 on every prompt
    r = rows["awq", "gptq"]
    assert (r.noise.value, r.snr.value, r.snr.low) == (0, math.inf, math.inf)


def test_a_swapped_direction_shows(both):
    """Planted: one GPU's methods swapped changes signal and noise."""
    paths = [Path(m, g) for g in ("a100", "h100") for m in ("awq", "awq_marlin")]
    c = runs.cells(paths)
    a, m = Path("awq", "h100"), Path("awq_marlin", "a100")
    c.prefill[a, m], c.prefill[a, a] = c.prefill[a, a], c.prefill[a, m]
    (row,) = tabulate(c, paths, top_k=runs.K).across
    assert row.noise.value != pytest.approx(expected(0.0625 / 2, ALL))


def test_classes_are_those_with_equal_bits():
    r = runs.result(("a100", "h100", "h200"), methods=("awq", "awq_marlin"))
    (m,) = [m for m in r.tables.full if m.mode == "prefill"]
    assert ("awq@a100", "awq@h100", "awq@h200") in m.classes
    assert ("awq_marlin@h100", "awq_marlin@h200") in m.classes
    assert ("awq_marlin@a100",) in m.classes
    assert sum(map(len, m.classes)) == 6


def test_one_bit_parts_a_class():
    paths = [Path(m, g) for g in ("h100", "h200") for m in ("awq", "awq_marlin")]
    c = runs.cells(paths)
    assert tabulate(c, paths).full[0].classes == (("awq@h100", "awq@h200"), ("awq_marlin@h100", "awq_marlin@h200"))
    c.prefill[paths[1], paths[2]][7].logprobs[-1, -1] += 2.0**-20
    assert tabulate(c, paths).full[0].classes == (("awq@h100",), ("awq_marlin@h100", "awq_marlin@h200"), ("awq@h200",))
    assert tabulate(c, paths, decimals=4).full[0].classes[0] == ("awq@h100", "awq@h200")


def test_h100_and_h200_cannot_be_told():
    paths = [Path(m, gpu) for gpu in ("h100", "h200") for m in runs.METHODS]
    c = runs.cells(paths)
    # Atomics add in another order than the generator's on either GPU, as they do when the generator runs again.
    c.prefill[Path("gptq", "h200"), Path("gptq", "h100")] = c.prefill_again[Path("gptq", "h100")]
    found = {(t.claimed, t.other): t for t in tabulate(c, paths, top_k=runs.K).detection}
    for m in runs.METHODS:
        t = found[f"{m}@h100", f"{m}@h200"]
        assert (t.auc.value, t.auc.low, t.auc.high, t.tokens.value) == (0.5, 0.5, 0.5, math.inf)
    t = found["awq@h100", "awq_marlin@h100"]
    assert (t.verifier, t.auc.value) == ("awq@h200", 1.0)
    assert t.tokens_per_prompt == sum(ALL) / 8 <= t.tokens.value < math.inf


def test_other_batches(both):
    rows = {(b.path, b.schedule): b for b in both.tables.batches}
    b = rows["awq_marlin@a100", "whole"]
    assert b.distance.figure.value == pytest.approx(expected(0.25, ALL), rel=1e-12)
    assert (b.differing.value, b.flips.value, b.largest) == (1, 0, 0.25)
    b = rows["awq@a100", "whole"]
    assert (b.distance.identical, b.differing.value, b.largest) == (True, 0, 0)


def test_reasons_stay_where_a_path_cannot_be_computed():
    t = runs.result(refused=("gptq@a100",)).tables
    m = t.within[0]
    assert {e.reason for e in m.cells[2]} | {row[2].reason for row in m.cells} == {runs.REASON}
    assert all(e.figure is None for e in m.cells[2])
    assert m.off_diagonal.cells == 6
    assert m.classes == tuple((f"{name}@a100",) for name in ("awq", "awq_marlin", "gptq_marlin"))
    assert {r.methods for r in t.across if r.reason == runs.REASON} == {r.methods for r in t.across if "gptq" in r.methods}
    assert not any("gptq@a100" in (d.claimed, d.other, d.verifier) for d in t.detection)
    assert next(n for n in t.noise_floor if n.path == "gptq@a100").prefill.reason == runs.REASON


def test_one_gpu_has_nothing_across():
    t = runs.result(("h100",)).tables
    assert (t.across, t.full) == ((), ())
    assert [m.mode for m in t.within] == ["prefill", "decode", "decode, free"]
    assert {d.verifier.split("@")[1] for d in t.detection} == {"h100"}


def test_json_and_back(both, tmp_path):
    write_json(tmp_path / "r.json", both)
    assert ExperimentResult.read(tmp_path / "r.json") == both
    write_json(tmp_path / "r.json", replace(both, schema="qlab.logprobs/0"))
    with pytest.raises(QlabError, match=r"r.json holds 'qlab.logprobs/0'"):
        ExperimentResult.read(tmp_path / "r.json")


def test_runs_of_other_tokens_are_refused():
    paths = [Path("awq", "a100"), Path("gptq", "a100")]
    c = runs.cells(paths)
    c.prefill[paths[0], paths[1]] = c.prefill[paths[1], paths[1]]
    with pytest.raises(QlabError, match="only a re-execution of the same tokens"):
        tabulate(c, paths)
