"""The experiment's tables on a terminal and in Markdown: its numbers, its intervals, nothing cut at 100 columns."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from qlab.logprobs.detection import detect
from qlab.logprobs.statistics import Figure
from qlab.logprobs.tables import BatchRow, Entry
from qlab.report import logprob_cells, logprob_markdown, logprob_verdict, logprobs
from qlab.serial import write_json
from tests.logprobs import synthetic_runs as runs


@pytest.fixture(scope="module")
def both():
    return runs.result()


def printed(show, width=100):
    out = io.StringIO()
    show(Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_nothing_is_cut(both, width):
    text = printed(lambda c: logprobs.show(both, c), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "model/awq [one]" in text


def test_names_and_layout_of_the_experiment(both):
    text = printed(lambda c: logprobs.show(both, c))
    heads = (
        "Noise floor",
        "Within A100, prefill",
        "Within H100, prefill",
        "Within A100, decode",
        "Across A100 and H100",
        "Signal",
        "Same tokens in another batch",
        "Detection",
    )
    places = [text.index(h) for h in heads]
    assert places == sorted(places)
    assert "5.00x" in text
    assert "1 of 8 split" in text
    assert "else 1.94" in text
    assert "off the diagonal: mean" in text


def test_figures_follow_the_data(both):
    """Planted: another log-probability gives another table."""
    paths = [runs.Path(m, "a100") for m in ("awq", "gptq")]
    c = runs.cells(paths)
    before = printed(lambda k: logprobs.show_tables(runs.tabulate(c, paths), k))
    c.prefill[paths[0], paths[1]][0].logprobs[0] += 8.0
    assert printed(lambda k: logprobs.show_tables(runs.tabulate(c, paths), k)) != before


def test_reasons_in_words():
    r = runs.result(refused=("gptq@a100",))
    text = printed(lambda c: logprobs.show(r, c))
    assert text.count(runs.REASON) > 10
    assert "Did not run" in text
    assert runs.REASON in logprob_markdown.document(r)


def test_equal_paths_are_told_as_classes():
    text = printed(lambda c: logprobs.show(runs.result(("h100", "h200"), methods=("awq", "awq_marlin")), c))
    assert "cannot be told" in text
    m = runs.result(("h100", "h200"), methods=("awq",)).tables.full[0]
    assert "equal in all bits: {awq@h100, awq@h200}" in logprobs.matrix_notes(m).plain


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(3.88e-2, 3.1e-2, 4.44e-2, 0, 8), "3.88e-2 [3.1, 4.4]e-2"),
        (Figure(4.3, 3.96, 4.6, 0, 8), "4.30 [4.0, 4.6]"),
        (Figure(1e-2, 1e-5, 2e-2, 0, 8), "1.00e-2 [1.00e-5, 2.00e-2]"),
        (Figure(0.0, 0.0, 0.0, 0, 8), "0"),
        (Figure(math.inf, 2.0, math.inf, 1, 8), "inf [2.00, inf]"),
        (Figure(2.0, math.nan, math.nan, 0, 1), "2.00 one prompt"),
        (Figure(9.9996e-2, 9.1e-2, 0.11, 0, 8), "1.00e-1 [0.91, 1.1]e-1"),
    ],
)
def test_one_line_figures(figure, text):
    assert logprob_cells.figure(figure) == text


@pytest.mark.parametrize(
    ("v", "text"), [(81.2, "81.2x"), (1.26, "1.26x"), (412.3, "412x"), (math.inf, "inf"), (math.nan, "nan")]
)
def test_ratios(v, text):
    assert logprob_cells.times(v) == text


def test_shares_have_their_interval_in_percent():
    rows = (
        BatchRow(
            "awq@h100", "whole", Entry(Figure(0.1, 0.1, 0.1)), Figure(0.9905, 0.987, 0.995), Figure(0.0006, 0.0, 0.00254), 1.0
        ),
    )
    text = logprob_markdown.batch_table(replace(runs.result().tables, batches=rows))
    assert "99.05% [98.7, 99.5]%" in text
    assert "0.06% [0, 0.254]%" in text


def test_one_prompt_claims_no_interval():
    text = printed(lambda c: logprobs.show(runs.result(prompts=1), c))
    assert "one prompt" in text
    assert "nan" not in text


def test_a_verdict():
    p = runs.Path("awq", "h100")
    trace = [runs.scored(p, t, 6) for t in (runs.tokens_of(p, s) for s in range(8))]
    other = [runs.scored(p, s.tokens.tolist(), 6, 0.5) for s in trace]
    v = detect(trace, {"awq@h100": trace, "awq@h200": trace, "[awq]": other}, decimals=4)
    text = printed(lambda c: c.print(logprob_verdict.verdict(v)))
    assert "consistent with class {awq@h100, awq@h200}" in " ".join(text.replace("\u2502", " ").split())
    assert "[awq]" in text
    assert "4 decimals" in text
    assert "3.91e-3" in text


def test_markdown(both, tmp_path):
    text = logprob_markdown.document(both)
    for line in text.splitlines():
        if line.startswith("| Within A100, prefill"):
            assert line.count("|") == 6
    assert "| `awq` vs `awq_marlin`, A100 and H100 |" in text
    assert "5.00x" in text
    write_json(tmp_path / "r.json", both)
    assert logprob_markdown.document(type(both).read(tmp_path / "r.json")) == text


@pytest.mark.parametrize("width", [80, 120])
def test_every_name_and_interval_is_whole(width):
    """Three GPUs and cells with tokens that split: the widest tables there are."""
    r = runs.result(("a100", "h100", "h200"))
    text = printed(lambda c: logprobs.show(r, c), width)
    words = {r.tables.noise_floor[i].path for i in range(12)}
    words |= {f"{a} vs {b}" for a, b in (row.methods for row in r.tables.across)}
    words |= {f"Across {a.upper()} and {b.upper()}" for a, b in (row.gpus for row in r.tables.across)}
    for m in r.tables.within:
        for e in (e for row in m.cells for e in row if not e.identical):
            shown = e.together if e.figure.infinite else e.figure
            words |= set(logprob_cells.figure(shown).split(" ", 1)) if shown else {"8 of 8 split"}
    for row in r.tables.across:
        words |= {word for f in (row.signal, row.noise) for word in logprob_cells.figure(f).split(" ", 1)}
    for d in r.tables.detection:
        words |= {d.claimed, d.other, d.verifier, logprobs.auc_interval(d.auc)}
    assert len(words) > 40
    assert {w for w in words if w not in text} == set()


def test_classes_across_gpus_are_said():
    text = printed(lambda c: logprobs.show(runs.result(("h100", "h200"), methods=("awq", "awq_marlin")), c), 120)
    assert "  prefill: equal in all bits: {awq@h100, awq@h200}, {awq_marlin@h100, awq_marlin@h200}" in text
    assert "All paths" not in printed(lambda c: logprobs.show(runs.result(("h100",)), c), 120)


def test_a_matrix_that_does_not_fit_has_numbers_for_names():
    m = runs.result(("a100",)).tables.within[0]
    text = printed(lambda c: c.print(logprobs.matrix_table(m, c.width)), 60)
    assert max(map(len, text.splitlines())) <= 60
    for i, name in enumerate(logprobs.names(m), 1):
        assert f" {i} {name} " in text
    assert "awq_marlin " in printed(lambda c: c.print(logprobs.matrix_table(m, c.width)), 100).splitlines()[2]


def test_one_prompt_that_was_enough_is_a_limit() -> None:
    from qlab.logprobs.telling import tell
    from qlab.report.logprobs import tokens_cell

    apart = tell("a", "b", "v", [1.0, 1.1, 0.9, 1.0], [9.0, 9.1, 8.9, 9.0], 131)
    near = tell("a", "b", "v", [1.0, 1.1, 0.9, 1.0], [1.1, 1.0, 1.1, 1.2], 131)
    assert tokens_cell(apart).plain == "at most 131\none prompt"
    assert "at most" not in tokens_cell(near).plain
