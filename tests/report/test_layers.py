"""The layer report: its sentences, tables that are not cut, heat maps that follow the data."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import matplotlib.image
import pytest
from matplotlib.figure import Figure as Canvas
from rich.console import Console

from qlab import environment
from qlab.errors import QlabError
from qlab.layers.result import EMBEDDING, HEAD, SCHEMA, LayersResult, LinearRow, StreamRow, SwapRow
from qlab.report import layer_figure, layers
from qlab.serial import write_json

TAPS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


def linear(name, size, tokens):
    rows = tuple(size * (1 + t) for t in range(tokens))
    return LinearRow(
        name, ("vllm.awq_gemm", "vllm.marlin.awq"), ("replay", "native"), size, 0.25, 2 * size, 3 * size, rows, rows
    )


def result(depth=2, tokens=12, total=8.0, gap=0.1, dense=False):
    """Shares that rise along the network but for the second linear, which takes some away."""
    names = [f"model.layers.{i}.{tap}" for i in range(depth) for tap in TAPS]
    whole = [*([EMBEDDING] if dense else []), *names, *([HEAD] if dense else [])]
    parts = [i + 1.0 for i in range(len(whole))]
    parts[1] = -5.0
    shares = [total * p / sum(parts) for p in parts]
    swaps = tuple(
        SwapRow(n, (n,) if n in names else (), sum(shares[: i + 1]), s, (s,) * tokens, 0.1, 0.05, abs(s))
        for i, (n, s) in enumerate(zip(whole, shares, strict=True))
    )
    linears = tuple(linear(n, 0.0 if not total else 10.0 ** (i / 4 - 5), tokens) for i, n in enumerate(names))
    stream = (StreamRow(EMBEDDING, 0.25 if dense else 0.0, math.nan),)
    stream += tuple(StreamRow(f"model.layers.{i}", 0.1 * (i + 1), math.nan if not i else 1.5) for i in range(depth))
    words = tuple(["[the]", "\n", " " * 9, "x" * 40, "$a$"][t % 5] for t in range(tokens))
    return LayersResult(
        SCHEMA,
        {"a": "awq@a100"},
        environment.collect(details=False),
        ("awq@a100", "awq_marlin@h100:vllm"),
        ("model [one] (awq): whatever", "model [one] (awq): whatever"),
        "float16",
        "kept" if dense else "",
        words,
        5,
        total,
        0.0,
        (total / tokens,) * tokens,
        linears,
        stream,
        swaps,
        1.25,
        0.3,
        0.9,
        gap,
        1.5,
    )


def printed(r, width=100):
    out = io.StringIO()
    layers.show(r, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("dense", [False, True])
def test_nothing_is_cut(width, dense):
    text = printed(result(12, 300, dense=dense), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "model [one] (awq)" in text
    assert "whatever" not in text
    assert "11.gate_up_proj" in text
    assert ("norm and head" in text) == dense
    assert "the largest of each" in text


def test_the_sentence_comes_first():
    r = result()
    text = " ".join(printed(r).split())
    assert text.startswith(
        "27.6% of the log-probability divergence enters at layer 1's down_proj, 24.1% at layer 1's gate_up_proj"
    )
    assert "20.7% at layer 1's o_proj; the other 5 add 27.6%." in text
    assert "Swapped one at a time they add up to 125% of the total; the linear response explains 90.0%" in text
    assert "10.0% off the nested projections: the divergence is large" in text
    assert "one flipped bit re-rolls every later rounding" in printed(result(gap=1.0)).replace("\n", " ")
    assert "Swapped" not in layers.caution(replace(r, singles=None))
    less = tuple(replace(s, share=10.0 if i == 2 else -2.0 / 7) for i, s in enumerate(r.swaps))
    assert layers.sentence(replace(r, swaps=less)).endswith("layer 0's gate_up_proj; the other 7 take 25.0% back.")
    swaps = (replace(r.swaps[0], name="model.layers.7", linears=tuple(x.name for x in r.linears[:4]), share=8.0),)
    assert layers.sentence(replace(r, swaps=swaps)) == "100% of the log-probability divergence enters at layer 7."


def test_no_divergence():
    text = printed(result(total=0.0))
    assert text.startswith("awq@a100 and awq_marlin@h100:vllm give equal log-probabilities at A's 5 most probable ids")
    assert "re-rolls" not in text
    assert "nan" not in text
    assert "0.qkv_proj     " + layers.NONE * 12 in text


def test_tables_hold_the_figures():
    text = printed(result(dense=True))
    (row,) = [line for line in text.splitlines() if re.match(r" *0\.down_proj +5\.62e-5", line)]
    assert row.split() == ["0.down_proj", "5.62e-5", "25.00%", "1.12e-4", "1.69e-4", "0.1"]
    assert re.search(r"1\.down_proj.* 1\.50x", text)
    assert ["embedding", "0.25"] in [line.split() for line in text.splitlines()]
    assert re.search(r"0\.qkv_proj +-10\.4% +-━+ +10\.4% +10\.0% +5\.0%", text)
    assert re.search(r"sum +100% +125% +100% +90\.0%", text)
    assert re.search(r"gap to nested +30\.0% +10\.0%", text)
    assert "awq_gemm (replay)" in text
    assert "marlin.awq (native)" in text
    bare = printed(
        replace(result(), singles=None, singles_gap=None, swaps=tuple(replace(s, single=None) for s in result().swaps))
    )
    assert "alone" not in bare


def test_the_map_follows_the_data():
    r = result(tokens=20)
    lines = printed(r).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Total divergence by token"))
    rows = [line[15:35] for line in lines[start + 2 : start + 10]]
    assert {len(row) for row in rows} == {20}
    levels = [[layers.LEVELS.index(c) for c in row] for row in rows]
    assert levels[0][0] == 0
    assert levels[-1][-1] == 7
    assert all(row == sorted(row) for row in levels)
    assert [column == sorted(column) for column in map(list, zip(*levels, strict=True))] == [True] * 20
    changed = replace(r.linears[0], total_by_token=(0.0, math.inf, *r.linears[0].total_by_token[2:]))
    row = layers.heat_map(replace(r, linears=(changed, *r.linears[1:])), 100).plain.splitlines()[2]
    assert row[15:17] == layers.NONE + layers.LEVELS[-1]
    assert layers.binned([1, 5, 2, 3, 4], 2) == [5, 3, 4]
    assert layers.ruler(25, 1) == "0         10        20"


@pytest.mark.parametrize(
    ("v", "text"), [(0.0, "0"), (0.128, "12.8%"), (-0.0412, "-4.1%"), (3.85, "385%"), (-4.2e-4, "-0.04%"), (1.2e-9, "1e-7%")]
)
def test_percentages(v, text):
    assert layers.percent(v) == text


@pytest.fixture
def drawn(monkeypatch):
    found = []
    monkeypatch.setattr(Canvas, "savefig", lambda figure, *_, **__: found.append(figure))
    return found


@pytest.mark.parametrize("suffix", STARTS)
def test_each_format(tmp_path, suffix):
    layer_figure.plot(result(dense=True), tmp_path / f"r.{suffix}")
    assert (tmp_path / f"r.{suffix}").read_bytes().startswith(STARTS[suffix])
    assert len(list(tmp_path.iterdir())) == 1


def test_another_suffix(tmp_path):
    with pytest.raises(QlabError, match="'gif' is no image format here"):
        layer_figure.plot(result(), tmp_path / "r.gif")


@pytest.mark.parametrize(("depth", "tokens", "total"), [(2, 12, 8.0), (20, 100, 8.0), (1, 1, 8.0), (2, 12, 0.0)])
def test_any_size(tmp_path, depth, tokens, total):
    layer_figure.plot(result(depth, tokens, total), tmp_path / "r.png")
    assert matplotlib.image.imread(tmp_path / "r.png").std() > 0.02


def test_the_figure_follows_the_data(drawn, tmp_path):
    r = result(dense=True)
    layer_figure.plot(r, tmp_path / "r.png")
    left, right, *_ = drawn[0].axes
    (image,) = left.images
    assert image.get_array().shape == (10, 12)
    assert image.get_array()[1, 2] == r.linears[0].total_by_token[2]
    assert [t.get_text() for t in left.get_yticklabels()][::9] == [EMBEDDING, HEAD]
    assert [t.get_text() for t in left.get_xticklabels()][:5] == ["[the]", "\u21b5", "\u2423", "x" * 11 + "\u2026", "$a$"]
    bars = [p.get_width() for p in right.patches]
    assert bars == pytest.approx([s.share / r.total for s in r.swaps])
    assert [t.get_text() for t in right.texts][1] == layers.of(r.swaps[1].share, r.total)


def test_it_is_drawn_anew_from_its_json(tmp_path):
    write_json(tmp_path / "r.json", result())
    assert LayersResult.read(tmp_path / "r.json") == result() or math.isnan(result().stream[0].growth)
    layer_figure.main(tmp_path / "r.json", tmp_path / "r.svg")
    layer_figure.plot(result(), tmp_path / "again.svg")
    assert (tmp_path / "r.svg").stat().st_size == pytest.approx((tmp_path / "again.svg").stat().st_size, rel=0.01)
