"""Tables for the terminal: nothing cut, nothing lost, names taken literally, at narrow and wide widths."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from qlab import environment, hardware
from qlab.backends.registry import kernels
from qlab.compare import Error, OffDiagonal
from qlab.lab.results import (
    SCHEMA,
    TOTAL,
    Cell,
    Column,
    DispatchRow,
    Hardware,
    Input,
    LabResult,
    Pairs,
    ProbeFault,
    ProbeResult,
)
from qlab.lab.run import SAME, Layer, Plan, run
from qlab.report import terminal

LAYERS = ("model.layers.27.self_attn.qkv_proj", "model.layers.27.mlp.gate_up_proj")
WORST = Error(1.23456e-4, 1234.5678, 123456.789, 9.87654e-12)


def printed(result, width, **options):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    terminal.show(result, console, **options)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def here():
    return environment.collect(details=False)


@pytest.fixture
def crowded(here):
    """Every registered kernel ran (30 at least), each in a class of its own, with figures as wide as they come."""
    names = [k.name for k in kernels()]
    names += [f"reference.float64@{i:02}" for i in range(30 - len(names))]
    columns = tuple(Column(n, n, "same", "marlin", "", "") for n in names)
    cells = [Cell(layer, n, "", n, WORST, True, 1.23e-4, 20) for layer in (*LAYERS, TOTAL) for n in names]
    size = len(names)
    distance = tuple(tuple(0.0 if i == j else 1.234e-12 * (i + j) for j in range(size)) for i in range(size))
    share = tuple(tuple(0.0 if i == j else 0.99999 for j in range(size)) for i in range(size))
    classes = tuple((n,) for n in names)
    pairs = tuple(Pairs(x, tuple(names), distance, share, OffDiagonal(1e-12, 1e-12, 5e-11), classes) for x in (*LAYERS, TOTAL))
    inputs = tuple(Input(x, "same", 256, 14336, 28672, 128, True, False, "w", "x") for x in LAYERS)
    dispatch = tuple(DispatchRow(x, "gptq_marlin", "vllm.machete.gptq", "on Hopper vLLM prefers Machete") for x in LAYERS)
    found = "codes: k=14335, n=28671 (column 14335 of model.layers.27.mlp.up_proj) holds code 15 instead of 14"
    probes = tuple(ProbeResult(LAYERS[1], n, "", 1, 14336 * 28672, found, (ProbeFault(1, 2, 3, 4),)) for n in names)
    hw = Hardware("h100", "NVIDIA H200", "cuda", True, "native: 132 SMs and the same tensor core, so the same bits as h100")
    return LabResult(
        SCHEMA, {}, here, hw, "same", "model", ("gptq: zero points",), "float16", 0, "d" * 64, inputs, columns, tuple(cells),
        pairs, dispatch, probes, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("every_layer", [False, True])
def test_no_cell_is_cut(crowded, width, every_layer):
    text = printed(crowded, width, every_layer=every_layer)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for column in crowded.columns:
        assert column.key in text
    for figure in ("1.23e-4", "1.23e5", "9.88e-12", "100.00%", "20/20"):
        assert figure in text


def test_every_class_has_a_letter_of_its_own(crowded):
    letters = terminal.class_letters(crowded)
    assert len(set(letters.values())) == len(crowded.columns) > 26
    assert [terminal.letter(i) for i in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
    text = printed(crowded, 80)
    assert text.count("    AA  ") == 1


def test_every_figure_of_the_matrix_is_printed_once(crowded):
    size = len(crowded.columns)
    total = crowded.pairs[-1]
    spread = tuple(tuple(1e-6 * (1 + i * size + j) for j in range(size)) for i in range(size))
    text = printed(replace(crowded, pairs=(replace(total, relative_l2=spread),)), 80)
    for i in range(size):
        for j in range(i):
            assert terminal.number(spread[i][j]) in text


def test_names_are_taken_literally(crowded):
    odd = replace(
        crowded,
        model="[red]model[/red] [/b]",
        checkpoints=("[bold]dir[/]: gptq",),
        hardware=replace(crowded.hardware, running="[gpu]", note="[note]"),
        dispatch=(DispatchRow(LAYERS[0], "awq", "", "needs [k, n] or [/x]"),),
        probes=(
            ProbeResult(LAYERS[0], "k", "", 1, 2, "[diagnosis]", ()),
            ProbeResult(LAYERS[0], "l", "[/reason]", 0, 2, "", ()),
        ),
        cells=tuple(replace(c, reason="why [/not]", error=None) for c in crowded.cells),
        pairs=(),
    )
    text = printed(odd, 200)
    for literal in ("[red]model[/red] [/b]", "[bold]dir[/]: gptq", "[gpu]", "[note]", "needs [k, n] or [/x]", "[diagnosis]"):
        assert literal in text
    assert "[/reason]: l" in text
    assert "why [/not]" in text


def one_layer(here, *names, weight=None):
    from qlab.backends.registry import kernel
    from qlab.inputs import random_activations, random_weight

    w = weight or random_weight(64, 16, 32, symmetric=True, name="2,64,16")
    layer = Layer("2,64,16", {SAME: w}, {SAME: random_activations(2, 64)})
    plan = Plan([kernel(n) for n in names], hardware.gpu("a100"), torch.device("cpu"), SAME, "shape", (), torch.float16)
    return run(plan, [layer], here)


def test_what_is_promised_is_printed(here):
    r = one_layer(here, "reference.float64", "reference.float32", "vllm.marlin.gptq")
    text = printed(r, 120)
    for part in (
        "a100 on",
        "replayed bit for bit, a prediction",
        r.digest[:16],
        "rel. L2",
        "ULP",
        "med",
        "max",
        "Σ|x||w|",
        "noise",
    ):
        assert part in text
    for part in ("off the diagonal: mean", "bitwise equivalence classes", "What vLLM runs on a100", "2,64,16", "total"):
        assert part in text
    assert "Did not run" in text
    assert "vllm.marlin.gptq" in text
    table = text[text.index("Relative L2 error by layer") : text.index("Pairwise")]
    rows = [line.split() for line in table.splitlines()[4:]]
    assert [row[0] for row in rows if row] == ["2,64,16", "total"]


def test_one_kernel_has_no_matrix_and_no_kernel_no_table(here):
    assert "Pairwise" not in printed(one_layer(here, "reference.float64"), 80)
    text = printed(one_layer(here, "vllm.marlin.gptq"), 80)
    assert "Error against float64" in text
    assert "Did not run" in text


def test_dispatch_tells_which_layers(crowded):
    rows = tuple(DispatchRow(x, "gptq_marlin", f"vllm.{i}", "because") for i, x in enumerate(LAYERS))
    text = printed(replace(crowded, dispatch=rows), 120)
    assert any("vllm.0" in line and "27.qkv_proj" in line for line in text.splitlines())
    assert any("vllm.1" in line and "27.gate_up_proj" in line for line in text.splitlines())
    assert "all 2" in printed(crowded, 120)
    assert "all 1" not in printed(replace(crowded, dispatch=rows[:1]), 120)


def test_a_long_class_goes_on_below_its_first_kernel(crowded):
    total = crowded.pairs[-1]
    one = replace(crowded, pairs=(*crowded.pairs[:-1], replace(total, classes=(total.keys,))))
    lines = printed(one, 80).splitlines()
    at = lines.index("  bitwise equivalence classes:") + 1
    entry = [line for line in lines[at:] if line.strip()][:2]
    assert entry[0].startswith(f"    A  {total.keys[0]}")
    assert entry[1].startswith("       " + entry[1].strip()[0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (0.5, "0.5"),
        (0.01, "0.01"),
        (0.009996, "1.00e-2"),
        (999.4, "999"),
        (999.9, "1.00e3"),
        (1234.0, "1.23e3"),
        (2.6e-4, "2.60e-4"),
        (1e-300, "1.00e-300"),
    ],
)
def test_numbers(value, text):
    assert terminal.number(value) == text
