"""What is made of the layers' file: means, targets, tables, the figure, merged files; from made-up speeds, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import gpu_state, layer_figure, layer_summary, layer_tables, readme, readme_layers
from bench.layer_results import Result, merge
from bench.layer_tables import layers, memory_share, ratio, targets
from bench.model_layers import BLOCK, MODELS
from qlab.errors import QlabError
from tests.bench import layer_file

R = layer_file.result()


def without(r: Result, kernel: str, layer: str) -> Result:
    cells = [
        replace(c, entries=tuple(e for e in c.entries if e.kernel != kernel)) if f"{c.model}.{c.layer}" == layer else c
        for c in r.cells
    ]
    return replace(r, cells=tuple(cells))


def test_a_mean_is_geometric_and_says_what_it_leaves_out() -> None:
    best = ratio(layers(R, 16), ("cuda.*", "triton.w4a16*"), ("vllm.marlin.*", "vllm.machete.*", "vllm.gptq_gemm"))
    assert best is not None
    assert (round(best.value, 9), best.layers, best.missing) == (round(0.85 / 0.625, 9), 12, 0)
    twice = [
        replace(
            c, entries=tuple(replace(e, median=4 * e.median) if e.kernel == "cuda.split" and i == 0 else e for e in c.entries)
        )
        for i, c in enumerate(layers(R, 16))
    ]
    mean = ratio(twice, ("cuda.*",), ("vllm.marlin.gptq",))
    assert mean is not None
    assert mean.value == pytest.approx(1.7 / 4 ** (1 / 12))
    assert (mean.lowest, mean.lowest_layer) == (pytest.approx(1.7 / 4), "llama-3-8b.qkv")
    fewer = ratio(layers(without(R, "cuda.split", "llama-70b.o"), 16), ("cuda.*",), ("cublas",))
    assert fewer is not None
    assert (fewer.layers, fewer.missing) == (11, 1)
    assert ratio(layers(R, 16), ("cuda.none",), ("cublas",)) is None


def test_the_memory_share_is_of_the_layers_of_30_to_70_megabytes() -> None:
    share = memory_share(R, 1, ("cuda.*",))
    assert share is not None
    assert (share.layers, share.missing) == (5, 0)
    assert share.value == pytest.approx(0.85, rel=1e-3)
    names = [f"{c.model}.{c.layer}" for c in layers(R, 1) if 30e6 <= layer_tables.weight_bytes(R, c) <= 70e6]
    assert names == ["llama-3-8b.gate_up", "llama-3-8b.down", "qwen2.5-7b.down", "llama-70b.qkv", "llama-70b.o"]


def test_targets_are_reached_or_not() -> None:
    found = {(t.what, t.rows): t for t in targets(R)}
    met = {key: t.met for key, t in found.items()}
    assert sum(met.values()) == 10
    assert not met["best of ours against cuBLAS fp16", (256,)]
    assert found["best of ours against cuBLAS fp16", (1024, 4096)].reached == pytest.approx(0.85)
    none = targets(replace(R, cells=tuple(c for c in R.cells if c.M == 1)))
    assert [t.met for t in none if t.rows == (64,)] == [False, False]
    assert all(t.reached is None and t.note == "not measured" for t in none if t.rows == (64,))
    slow = without(without(R, "cuda.split", "qwen2.5-7b.o"), "triton.w4a16", "qwen2.5-7b.o")
    (t,) = (t for t in targets(slow) if t.rows == (16,) and t.aim == 1.3)
    assert "11 layers, 1 without a speed" in t.note


def test_files_merge_and_a_later_cell_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    first = replace(R, cells=R.cells[:3])
    newer = replace(R.cells[2], entries=R.cells[2].entries[:2])
    second = replace(R, cells=(newer, R.cells[9]))
    both = merge([first, second])
    assert [(c.key, c.run) for c in both.cells] == [
        *((c.key, 0) for c in R.cells[:2]),
        (R.cells[2].key, 1),
        (R.cells[9].key, 1),
    ]
    assert both.cells[2].entries == newer.entries
    assert len(both.runs) == 2
    both.write(tmp_path / "x.json")
    assert Result.read(tmp_path / "x.json") == both
    with pytest.raises(QlabError, match="differ in dtype"):
        merge([first, replace(second, symmetric=False)])
    other = replace(R.runs[0], environment=replace(R.runs[0].environment, gpu="NVIDIA A100"))
    with pytest.raises(QlabError, match="different GPUs: NVIDIA A100 and NVIDIA H200"):
        merge([first, replace(second, runs=(other,))])


def test_markdown_holds_every_table() -> None:
    text = layer_summary.markdown(R)
    for line in (
        "| best of ours / best of Marlin, Machete, ExLlama | 1.36 | 1.36 | 1.36 | 1.36 | 1.36 | 1.36 |",
        "| `cuda.split` | 85% | 85% | 67% |",
        "| llama-3-8b | 1 | 30.8 | 41.9 | 101.5 | 1.36 | 3.29 |",
        "not compiled or tuned within 90 s",
        "Left out: llama-70b.o M=2: no time left.",
        "copy 4.30 TB/s",
    ):
        assert line in text
    assert text.count("## ") == 5 + 12 + 3
    assert "**2.4**" in text


def test_the_figure_and_the_command(tmp_path: Path) -> None:
    file, page, plot, joined = (tmp_path / name for name in ("r.json", "r.md", "r.svg", "all.json"))
    R.write(file)
    app = typer.Typer()
    app.command()(layer_summary.main)
    options = ["--markdown", str(page), "--plot", str(plot), "--json", str(joined)]
    done = CliRunner().invoke(app, [str(file), *options])
    assert done.exit_code == 0, done.output
    assert page.read_text() == layer_summary.markdown(R)
    assert b"<svg" in plot.read_bytes()[:1000]
    assert Result.read(joined) == R
    assert "not reached" in done.stdout
    bad = CliRunner().invoke(app, [str(tmp_path / "none.json")])
    assert (bad.exit_code, "cannot read" in bad.stderr) == (2, True)
    with pytest.raises(QlabError, match="nothing to plot"):
        layer_figure.roofline(replace(R, cells=tuple(c for c in R.cells if c.layer == BLOCK)), tmp_path / "x.png")


def test_readme_takes_its_tables_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    R.write(tmp_path / "r.json")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    text = "<!-- layer-speed: r.json -->\nold\n<!-- end -->\n<!-- layer-speed: r.json llama-70b.down -->\n<!-- end -->\n"
    filled = readme.filled(text)
    assert "| best of ours / cuBLAS | 3.29 |" in filled
    assert "µs on llama-70b down, K = 28672, N = 8192" in filled
    assert readme.filled(filled) == filled
    with pytest.raises(QlabError, match="has no table 'x'"):
        readme_layers.layer_speed(tmp_path / "r.json", "x")


def test_every_layer_of_the_models_is_in_the_made_up_file() -> None:
    assert {(c.model, c.layer) for c in R.cells if c.layer != BLOCK} == {(x.model, x.name) for v in MODELS.values() for x in v}


def test_nvidia_smi_is_read() -> None:
    fields = (*gpu_state.FIELDS, gpu_state.REASONS[0])
    assert gpu_state.parse("1980 MHz, 3201 MHz, 688.10 W, 700.00 W, 61, 0x0000000000000004", fields) == {
        "clocks.sm": "1980 MHz",
        "clocks.mem": "3201 MHz",
        "power.draw": "688.10 W",
        "power.limit": "700.00 W",
        "temperature.gpu": "61",
        "clocks lowered by": "power cap",
    }
    assert gpu_state.parse('Field "clocks_event_reasons.active" is not a valid field to query.', fields) == {}
    assert [gpu_state.decode(x) for x in ("0x0", "0x44", "[N/A]", "0x1000")] == [
        "nothing",
        "power cap, thermal (hardware)",
        "[N/A]",
        "0x1000",
    ]
