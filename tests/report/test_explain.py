"""Why two paths differ, on a terminal, as Markdown and as a figure: figures add up, the sentence says what the numbers say."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from decimal import Decimal

import pytest
from rich.console import Console

from qlab import environment
from qlab.attribution.explain import measure
from qlab.attribution.game import Game, attribute
from qlab.attribution.result import SCHEMA, End, Explained, Factor, LayerMeasure, Measure, Share
from qlab.errors import QlabError
from qlab.report import explain
from qlab.report.explain_words import brief, headline, percent, reading
from qlab.serial import write_json

LAYERS = ("model.layers.0.self_attn.qkv_proj", "model.layers.11.mlp.gate_up_proj")
PACKED = Factor("packing", "packing", "", "AWQ's interleaved codes", "Marlin's tiles", same=True)
PARTS = (
    Factor("weights behind the dot", "dequantisation", "", "w - z to fp16, times s in fp16", "the same, fused [to fp32]"),
    Factor(
        "rounding of partial sums", "rounding of partial sums", "splits of K", "each of 8 pieces to fp16", "nothing is rounded"
    ),
    Factor("splits of K", "order of summation", "splits of K", "8 interleaved slices of K", "stripes over 132 SMs"),
    Factor("F", "tensor core", "", "F=24", "F=25"),
    Factor("output rule", "output rule", "", "sum of fp16 pieces to fp16", "fp32 to fp16"),
)


def split(values, parts=PARTS, unions=(), **options):
    """The measures of a game whose value functions are given as {name: function of mask}."""
    game = Game(tuple(f.name for f in parts), unions)
    found = attribute(game, lambda m: {name: v(m) for name, v in values.items()}, **options)
    return tuple(measure(name, game.names, a) for name, a in found.items())


def additive(*amounts, saturate=0.0, pairs=()):
    """A value function: a sum over the factors, with interactions; ``saturate`` mixes in a jump that any factor makes."""

    def value(mask):
        total = sum(a for i, a in enumerate(amounts) if mask >> i & 1)
        total += sum(x for i, j, x in pairs if mask >> i & 1 and mask >> j & 1)
        return (1 - saturate) * total + saturate * (mask > 0) * sum(amounts)

    return value


@pytest.fixture(scope="module")
def here():
    return environment.collect(details=False)


@pytest.fixture
def result(here):
    """As awq against awq_marlin: the rounding of pieces dominates, F and the output rule are small."""
    values = {
        "logprobs": additive(0.001, 0.31, 0.012, 0.0004, 0.0007, pairs=[(1, 2, -0.004)]),
        "output": additive(1.1e-9, 3.02e-7, 1.3e-8, 3e-10, 7e-10),
        "projection": additive(0.002, 0.962, 0.033, 0.001, 0.002),
    }
    return explained(here, split(values, unions=((1, 2),)))


def explained(here, measures, parts=PARTS, a="awq@h100", b="awq_marlin@h100", packing=PACKED, **changed):
    bits = 0 if measures[0].total == 0 else 12345
    names = [f.name for f in parts]
    layers = tuple(LayerMeasure(x, 50, 1.25e-4, bits, 50 * 3072, dict.fromkeys(names, 1.5e-9)) for x in LAYERS)
    ends = (End(a, "replay", ("vllm.awq_gemm",), 600_000, 0), End(b, "native", ("vllm.marlin.awq",), 600_000, 0))
    given = {
        "schema": SCHEMA,
        "arguments": {"explain": f"{a} {b}"},
        "environment": here,
        "a": a,
        "b": b,
        "where": "tiny Llama [45143195cec4683c]",
        "rows": 96,
        "tokens": 96,
        "ends": ends,
        "factors": (*parts, packing),
        "measures": measures,
        "layers": layers,
        "notes": ("unions were dissolved [none]",),
        "evaluations": 24,
        "seconds": 12.5,
    }
    return Explained(**{**given, **changed})


def printed(e, width=100, **options):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    explain.show(e, console, **options)
    return console.file.getvalue()


def test_the_sentence_is_the_narrow_answer(result):
    said = explain.sentence(result)
    m = result.measure("logprobs")
    part = m.part("rounding of partial sums")
    assert said.startswith(f"{100 * part.value / m.total:.1f}% of the difference in the log-probabilities comes from rounding")
    assert "(each of 8 pieces to fp16 in awq_gemm, nothing is rounded in marlin.awq)" in said
    assert said.endswith("; packing contributes 0.")
    assert "splits" not in said  # 3% is not worth a word


def test_the_second_factor_is_named_from_a_tenth_on(here):
    e = explained(here, split({"logprobs": additive(0.0, 0.7, 0.0, 0.2, 0.1)}), a="awq_marlin@a100", b="awq_marlin@h100")
    said = explain.sentence(e)
    assert said.startswith("70.0% of the difference")
    assert ", 20.0% from F (F=24 on a100, F=25 on h100); packing" in said


def test_without_log_probabilities_the_outputs_speak(here):
    values = {"output": additive(0.0, 0.9, 0.1, 0.0, 0.0)}
    e = explained(here, split(values), rows=0)
    assert "of the difference in the layers' outputs comes from rounding" in explain.sentence(e)
    both = explained(here, split({"logprobs": lambda m: 0.0, **values}))
    assert explain.sentence(both).startswith("The log-probabilities are equal, bit for bit. 90.0%")
    assert headline(both).name == "output"
    assert "nan" not in printed(both, every_layer=True)


def test_equal_paths_are_equal(here):
    e = explained(here, split({"logprobs": lambda m: 0.0, "output": lambda m: 0.0}))
    assert "are equal, bit for bit, though they differ in" in explain.sentence(e)
    none = explained(here, tuple(Measure(n, 0.0, ()) for n in ("logprobs", "output")), parts=())
    assert explain.sentence(none) == "awq@h100 and awq_marlin@h100 are equal, bit for bit; packing contributes 0."
    for x in (e, none):
        assert "nan" not in printed(x, every_layer=True)
        assert "100%" not in printed(x)
        assert "nan" not in explain.markdown(x)
    signs = replace(e, layers=tuple(replace(x, differing=1) for x in e.layers))
    assert "but for the sign of zeros" in explain.sentence(signs)


def test_a_wrong_nibble_is_placed(here):
    place = "code 3 instead of 12 at k=17, n=42 of model.layers.0.mlp.down_proj"
    wrong = Factor("packing", "packing", "", "as the checkpoint says", place)
    e = explained(here, split({"logprobs": additive(2.0)}, (wrong,)), (), packing=wrong, b="awq@h100")
    assert explain.sentence(e).startswith("100% of the difference in the log-probabilities comes from packing")
    assert place in explain.sentence(e)
    assert "contributes" not in explain.sentence(e)
    assert "(as the checkpoint says in A, code 3" in explain.sentence(e)
    with_more = (*PARTS, wrong)
    values = {"logprobs": additive(0.0, 0.9, 0.05, 0.0, 0.0, 0.05)}
    small = explained(here, split(values, with_more), PARTS, packing=wrong)
    assert f"packing contributes 5.0% ({place})" in explain.sentence(small)
    idle = explained(here, split({"logprobs": additive(0.0, 0.9, 0.1)}, with_more), PARTS, packing=wrong)
    assert f"packing contributes 0, though it differs: {place}" in explain.sentence(idle)
    without = replace(e, factors=PARTS, measures=split({"logprobs": additive(0.5, 0.9)}))
    assert explain.sentence(without).endswith("packing was not compared.")


def test_factors_that_cancel_say_so(here):
    f, length = PARTS[3], Factor("L", "tensor core", "", "L=8", "L=16")
    v = (0.0, 1.22, 1.42, 0.88)
    e = explained(here, split({"logprobs": lambda m: v[m]}, (f, length)), (f, length), "awq_marlin@a100", "awq_marlin@h100")
    said = explain.sentence(e)
    assert "61.4% of the difference" in said
    assert "38.6% from F" in said
    assert "F and L partly undo each other: interaction -200.0% of the difference." in said
    assert reading(e.measures[0], e.measures[0].interactions[0]) == "partly undo each other"
    assert "partly undo each other" in printed(e)
    hidden = split({"logprobs": lambda m: float(m > 0), "output": lambda m: v[m] * 1e-9}, (f, length))
    said = explain.sentence(replace(e, measures=hidden))
    assert "In the layers' outputs F and L partly undo each other: interaction -200.0%" in said
    overlapping = split({"logprobs": lambda m: float(m > 0)}, (f, length))
    assert "F and L overlap" in explain.sentence(replace(e, measures=overlapping))
    beyond = split({"logprobs": lambda m: float(m == 3)}, (f, length))
    assert reading(beyond[0], beyond[0].interactions[0]) == "go beyond their sum together"
    assert "overlap" not in explain.sentence(replace(e, measures=beyond))


def test_negative_shares_are_written_as_they_are(here):
    e = explained(here, split({"logprobs": additive(0.0, 1.3, 0.0, -0.3, 0.0)}))
    assert "130.0% of the difference" in explain.sentence(e)
    assert "-30.0% from F" in explain.sentence(e)
    assert "-30.00%" in printed(e)


def test_saturated_log_probabilities_are_called_so(here, result):
    outputs = additive(1e-9, 3e-7, 1e-8, 1e-10, 1e-10)
    saturated = split({"logprobs": additive(0.01, 0.3, 0.02, 0.0, 0.0, saturate=0.95), "output": outputs})
    said = explain.sentence(explained(here, saturated))
    assert "one flipped bit re-rolls every later rounding" in said
    assert "comes from rounding of partial sums, of that in the log-probabilities" in said
    plain = split({"logprobs": additive(0.5, 0.1, 0.4), "output": outputs})
    assert "of that in the log-probabilities 10.0%." in explain.sentence(explained(here, plain))
    assert "re-rolls" not in explain.sentence(result)


def numbers(cells):
    return [Decimal(c.rstrip("%")) for c in cells]


@pytest.mark.parametrize("thirds", [False, True])
def test_printed_shares_add_up_to_the_total(here, result, thirds):
    """What rounding leaves of 100% stands in a row of its own, exactly."""
    if thirds:
        parts = PARTS[:3]
        result = explained(here, split({"logprobs": additive(1, 1, 1), "output": additive(1, 1, 4)}, parts), parts)
    found = explain.rows(result)
    for i, m in enumerate(x for x in result.measures):
        shown = numbers(r.shares[i] for r in found if r.kind in ("factor", "same", "rounding"))
        (total,) = (r for r in found if r.kind == "total")
        assert sum(shown) == 100 == numbers([total.shares[i]])[0]
        for r in found:
            if r.kind == "factor":
                assert float(numbers([r.shares[i]])[0]) == pytest.approx(100 * m.part(r.name).share, abs=0.005)
    off = [sum(numbers(r.shares[i] for r in found if r.kind == "factor")) != 100 for i in range(len(result.measures))]
    assert ("rounding of the shares" in printed(result, 120)) == any(off)
    assert any(off) or not thirds
    union = [r for r in found if r.kind == "union"]
    if not thirds:
        (sums,) = union
        inside = [r for r in found if r.inside]
        assert {r.name for r in inside} == {"rounding of partial sums", "splits of K"}
        for i in range(3):
            assert abs(sum(numbers(r.shares[i] for r in inside)) - numbers([sums.shares[i]])[0]) <= Decimal("0.02")
    text = printed(result, 120)
    for m in result.measures:
        assert explain.number(m.residual) in text
    assert re.search(r"total +100% +100%", text)


def test_planted_a_lost_part_shows(result):
    """A part left out of a measure, or doubled, no longer adds up: the rounding row shows it."""
    m = result.measures[0]
    lost = replace(m, parts=tuple(p for p in m.parts if p.factor != "splits of K"))
    found = explain.rows(replace(result, measures=(lost,)))
    assert found[-1].kind == "rounding"
    assert abs(numbers(found[-1].shares)[0]) > 2


@pytest.mark.parametrize("width", [100, 160])
def test_nothing_is_cut(result, width):
    text = printed(result, width, every_layer=True)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    flat = re.sub(r"[\s│]+", "", text)
    for f in result.factors:
        assert f.name.replace(" ", "") in flat
    for words in ("45143195cec4683c", "[to fp32]", "600,000", "24 hybrids", "0.qkv_proj", "11.gate_up_proj", "[none]"):
        assert words.replace(" ", "") in flat
    assert "qkv_proj" not in printed(result, width)
    assert explain.sentence(result).replace(" ", "") in flat


LONG = (
    Factor(
        "dequantisation rule + place of the scale + unit of multiplication",
        "dequantisation",
        "kernel (gptq_gemm or machete.gptq)",
        "q-z, scale behind each dot, fp16 dot",
        "RN((q-z)*s), scale in the weight, tensor core",
    ),
    Factor("tensor core: F, fraction bits", "tensor core", "", "F=24", "F=25"),
    Factor(
        "cut of K (split-K, stripes)", "order of summation", "kernel (gptq_gemm or machete.gptq)", "4 blocks of 128", "1 piece"
    ),
)


@pytest.mark.parametrize("width", [80, 99, 100, 110, 160])
@pytest.mark.parametrize("intervals", [False, True])
def test_words_stay_whole_in_narrow_tables(here, width, intervals):
    values = {name: additive(0.9, 0.5, -0.2, pairs=[(0, 1, -0.6)]) for name in ("logprobs", "output", "projection")}
    e = explained(here, split(values, LONG, ((0, 2),), **({"samples": 20} if intervals else {})), LONG, notes=())
    text = printed(e, width)
    table = text.partition("Where the difference")[2].partition("Total:")[0]
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for f in LONG:
        for word in f"{f.name} {f.a} {f.b} {f.union}".split():
            assert word in table
    assert ("projec-" in table) == (width >= 100 or not intervals)
    assert ("alone" in table) == ("Alone:" in text) == (width >= (110 if intervals else 100))
    assert ("95%" in table) == intervals
    assert not text.endswith("\n\n\n")


def test_names_are_brief_where_they_are_told_again(here):
    assert [brief(f.name) for f in LONG] == [LONG[0].name, "tensor core: F", "cut of K"]
    e = explained(
        here, split({"logprobs": additive(0.1, 0.3, 1.0, pairs=[(0, 2, -0.6)])}, LONG), LONG, evaluations=1, rows=1, tokens=1
    )
    said = explain.sentence(e)
    assert "comes from cut of K (4 blocks of 128 in awq_gemm, 1 piece in marlin.awq)" in said
    assert "from tensor core: F (F=24 in awq_gemm, F=25 in marlin.awq)" in said
    two = explained(here, split({"logprobs": additive(0.5, 0.1, 0.1)}, LONG), LONG)
    assert "(q-z, scale behind each dot, fp16 dot in awq_gemm; RN((q-z)*s), scale in the weight" in explain.sentence(two)
    (opens,) = re.findall(r"\. (\w)[^.]*: interaction", said)
    assert opens.isupper()
    text = printed(e, 160)
    assert "1 row of log-probabilities, 1 token; 1 hybrid;" in text
    pairs = text.partition("Interactions")[2]
    assert "cut of K" in pairs
    assert "stripes" not in pairs


def test_only_the_largest_interactions_are_shown(here):
    pairs = [(i, j, 0.01 * (1 + i + 3 * j)) for j in range(5) for i in range(j)]
    e = explained(here, split({"logprobs": additive(0.2, 0.2, 0.2, 0.2, 0.2, pairs=pairs)}))
    table = printed(e, 120).partition("Interactions")[2]
    assert table.count("go beyond their sum together") == explain.PAIRS
    largest = max(e.measures[0].interactions, key=lambda i: abs(i.value))
    assert f"{largest.first}, {largest.second}" in table
    smallest = min(e.measures[0].interactions, key=lambda i: abs(i.value))
    assert f"{smallest.first}, {smallest.second}" not in table


def test_sampled_shares_have_intervals(here, tmp_path):
    value = additive(0.2, 0.5, 0.1, 0.1, 0.1, pairs=[(0, 3, 0.3), (1, 2, -0.2)])
    e = explained(here, split({"logprobs": value}, samples=20))
    assert re.search(r"\d\d\.\d% \[\d\d\.\d, \d\d\.\d\] of the difference", explain.sentence(e))
    assert "20 draws" in printed(e)
    assert "95%" in printed(e)
    assert "95%" not in printed(explained(here, split({"logprobs": value})))
    explain.waterfall(e, tmp_path / "w.png")


def test_markdown_has_a_row_for_each_factor(result):
    text = explain.markdown(replace(result, factors=(*result.factors[:-1], replace(PACKED, a="codes | zeros"))))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(explain.rows(result))
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert text.startswith(explain.sentence(result))
    assert "As fractions the parts add up exactly" in text


def test_json_travels(result, tmp_path):
    write_json(tmp_path / "e.json", result)
    assert Explained.read(tmp_path / "e.json") == result
    empty = replace(result, measures=(Measure("output", 0.0, (Share("F", 0.0, math.nan),)),))
    write_json(tmp_path / "e.json", empty)
    assert math.isnan(Explained.read(tmp_path / "e.json").measures[0].parts[0].share)
    (tmp_path / "e.json").write_text('{"schema": "other"}')
    with pytest.raises(QlabError, match="explained/1"):
        Explained.read(tmp_path / "e.json")
    with pytest.raises(QlabError, match="none of the factors"):
        replace(result, factors=result.factors[1:])
    with pytest.raises(QlabError, match="measure 'other'"):
        replace(result, measures=(Measure("other", 0.0, ()),))


def test_the_waterfall_is_drawn(result, here, tmp_path):
    for suffix in ("png", "svg", "pdf"):
        explain.waterfall(result, tmp_path / f"w.{suffix}")
        assert (tmp_path / f"w.{suffix}").stat().st_size > 5000
    with pytest.raises(QlabError, match="no image format here"):
        explain.waterfall(result, tmp_path / "w.gif")
    with pytest.raises(QlabError, match="nothing to draw"):
        explain.waterfall(explained(here, split({"output": lambda m: 0.0})), tmp_path / "w.png")


def test_bars_lead_from_a_to_b(result, monkeypatch, tmp_path):
    """Each bar begins where the one before ends; the last ends at the total."""
    from matplotlib.axes import Axes

    seen = []
    draw = Axes.barh
    monkeypatch.setattr(Axes, "barh", lambda ax, y, width, **k: seen.append((y, width, k)) or draw(ax, y, width, **k))
    explain.waterfall(result, tmp_path / "w.png")
    panels = [i for i, (y, _, _) in enumerate(seen) if y == 0] + [len(seen)]
    assert len(panels) == 3
    for start, stop, m in zip(panels, panels[1:], result.measures[:2], strict=False):
        at = 0.0
        for _, width, options in seen[start : stop - 1]:
            assert options["left"] == pytest.approx(at)
            at += width
        assert at == pytest.approx(m.total)
        assert seen[stop - 1][1] == m.total


def test_percentages_round_honestly():
    said = {0.9921: "99.2%", 0.0: "0", 1.0: "100%", 0.99999: ">99.9%", 1e-6: "<0.1%", -1e-6: ">-0.1%", -2.0: "-200.0%"}
    assert {v: percent(v) for v in said} == said
    assert percent(math.nan) == "-"
