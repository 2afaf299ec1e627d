"""Maps in words, tables and figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console

from qlab import environment
from qlab.attribution.map_result import Map, Range
from qlab.attribution.maps import map_recipes
from qlab.backends.registry import Problem
from qlab.errors import QlabError
from qlab.hardware import gpu
from qlab.report import map_colours, map_words, maps

HERE = environment.collect(details=False)


def made(*kernels: str, axis: Any = "M", values: Any = range(1, 261), on: str = "h100", k: int = 4096, n: int = 4096) -> Map:
    problem = Problem(1, k, n, 128, torch.float16, symmetric=True, act_order=False)
    return map_recipes(kernels, axis, tuple(values), problem, gpu(on), environment=HERE)


@pytest.fixture(scope="module")
def marlin() -> Map:
    return made("vllm.marlin.awq", k=1024, n=1024, values=range(1, 141))


@pytest.fixture(scope="module")
def several() -> Map:
    return made("vllm.machete.awq", "vllm.awq_gemm", "awq", "gptq", "awq_marlin:vllm", values=(1, 16, 17, 50, 51, 128, 256))


def said(m: Map, width: int = 100) -> str:
    out = io.StringIO()
    maps.show(m, Console(file=out, width=width))
    return out.getvalue()


def test_the_sentence(several: Map) -> None:
    where = "on h100, K=4096, N=4096: row 0 has"
    assert [map_words.sentence(several, s) for s in several.strips] == [
        f"machete.awq {where} 3 classes for M = 1 to 256; alone it keeps its bits up to M = 16",
        f"awq_gemm {where} one class for M = 1 to 256; its bits do not depend on M",
        f"awq {where} 2 classes for M = 1 to 256; alone it keeps its bits up to M = 128; "
        "for M = 256 the sum is opaque: cuBLAS GEMM of torch.matmul",
        f"gptq {where} 2 classes for M = 1 to 256; for M = 1 to 50 atomics add in any order, so that its bits are not fixed "
        "even alone; for M = 51 to 256 the sum is opaque: cuBLAS cublasHgemm in fp16",
        f"awq_marlin:vllm {where} 3 classes for M = 1 to 256; alone it keeps its bits up to M = 16",
    ]


def test_sentences_of_the_other_axes() -> None:
    def one(kernel: str, axis: str, *values: int, on: str = "h100") -> str:
        m = made(kernel, axis=axis, values=values, on=on)
        return map_words.sentence(m, m.strips[0]).partition(": ")[2]

    two = "row 0 has 2 classes for sms = 108 to 132; it has the bits of sms = 132"
    assert one("vllm.marlin.awq", "sms", 108, 132) == f"{two} at no other sms"
    assert one("vllm.marlin.awq", "sms", 108, 128, 132) == f"{two} for 128 to 132"
    assert one("vllm.awq_gemm", "sms", 108).endswith("its bits do not depend on the number of SMs")
    assert one("vllm.awq_gemm", "K", 128, 1024) == (
        "the sum of row 0 has 2 forms for K = 128 to 4096; that of K = 4096 holds for 1024 to 4096"
    )
    assert one("awq", "M", 256).endswith("for M = 256 the sum is opaque: cuBLAS GEMM of torch.matmul")
    assert one("vllm.marlin.awq", "M", 64, 65, 128).endswith("it keeps the bits of M = 64 up to M = 65")
    assert one("vllm.marlin.awq", "M", 64, 128).endswith("it keeps the bits of M = 64 at no larger M")
    refused = made("vllm.machete.awq", values=(1, 2), on="a100")
    assert "it does not run for M = 1 to 2: vllm.machete.awq does not run" in map_words.sentence(refused, refused.strips[0])


def test_bits_that_come_back_are_named() -> None:
    m = made("vllm.machete.awq", values=(17, 32, 33, 65))
    assert map_words.sentence(m, m.strips[0]).endswith("it keeps the bits of M = 17 for M = 17 to 32, 65")


def test_spans() -> None:
    found = [Range(i, i + i % 2, 0) for i in range(1, 7)]
    assert map_words.spans(found, most=2) == "1 to 2, 2 and 4 more ranges"
    assert map_words.spans(found, most=5).endswith("5 to 6 and 1 more range")


def test_the_terminal_shows_sentence_ranges_and_strip(marlin: Map) -> None:
    text = said(marlin)
    lines = text.splitlines()
    assert lines[0].startswith("marlin.awq on h100, K=1024, N=1024: row 0 has")
    assert "padding included" in text
    strip = next(line for line in lines if line.startswith("marlin.awq A"))
    assert set(strip.removeprefix("marlin.awq ")) >= {"A", "B"}
    assert len(strip) <= 100
    for line in lines[1:]:
        assert len(line) <= 100


def test_each_range_is_a_row(several: Map) -> None:
    rows = map_words.range_rows(several, several.strips[3])
    assert rows == [
        ["gptq", "1 to 50", "A", "not fixed", "0", "32", "100.00%", "gptq_gemm; atomics: not repeatable"],
        ["gptq", "51 to 256", "B", "-", "-", "-", "0", "gptq_gemm; opaque: cuBLAS cublasHgemm in fp16"],
    ]
    machete = map_words.range_rows(several, several.strips[0])
    assert machete[1] == ["machete.awq", "17", "B", "no", "46.88%", "4 to 5", "0", ""]
    for m in (several, made("vllm.machete.awq", values=(1,), on="a100"), made("vllm.awq_gemm", axis="K", values=(200,))):
        for s in m.strips:
            assert all(len(row) == len(map_words.header(m)) for row in map_words.range_rows(m, s))


def test_a_strip_fits_any_width(several: Map, marlin: Map) -> None:
    few, many = several.strips[0], marlin.strips[0]
    assert maps.letters(few, 7).plain == "AABCCBC"
    assert maps.letters(few, 21).plain == "AAAAAABBBCCCCCCBBBCCC"
    assert len(maps.letters(few, 13)) == 7
    assert len(maps.letters(many, 60)) == 60
    refused = made("vllm.machete.awq", values=(1,), on="a100").strips[0]
    assert maps.letters(refused, 3).plain == "---"


def test_gpus_of_one_recipe() -> None:
    m = made("vllm.marlin.awq", axis="sms", values=(108,))
    rows = {row[0]: row[1:] for row in map_words.gpu_rows(m.strips[0])}
    assert rows["h100, h200"] == ["132", "A", "marlin.awq"]
    assert rows["rtx4090"] == ["128", "A", "marlin.awq"]
    assert rows["v100"] == ["80", "-", "Marlin needs compute capability 7.5"]
    assert "h100, h200" in said(m)
    assert "| h100, h200 | 132 | A | marlin.awq |" in maps.markdown(m)


def test_markdown(several: Map) -> None:
    text = maps.markdown(several)
    assert text.startswith("* machete.awq on h100")
    assert "| `awq_gemm` | 1 to 256 | A | yes | 0 | 8 | 100.00% |  |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures(marlin: Map, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"map.{suffix}"
    maps.plot(marlin, path)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_other_maps_give_other_figures(marlin: Map, several: Map, tmp_path: Path) -> None:
    other = made("vllm.awq_gemm", k=1024, n=1024, values=range(1, 141))
    refused = made("vllm.machete.awq", values=(1, 2), on="a100")
    along_k = made("vllm.gptq_gemm", axis="K", values=(128, 200, 512))
    images = []
    for i, m in enumerate((marlin, other, several, refused, along_k)):
        maps.plot(m, tmp_path / f"{i}.png")
        images.append(matplotlib.image.imread(tmp_path / f"{i}.png"))
        assert images[-1].std() > 0.05
    assert images[0].shape != images[1].shape or (images[0] != images[1]).mean() > 0.01


def test_another_suffix_is_refused(marlin: Map, tmp_path: Path) -> None:
    with pytest.raises(QlabError, match=r"map\.jpg: 'jpg' is no image format here; name a \.png"):
        maps.plot(marlin, tmp_path / "map.jpg")
    assert not list(tmp_path.iterdir())


def test_colours_keep_classes_apart() -> None:
    m = made("vllm.machete.awq", axis="sms", values=range(64, 150, 2))
    strip = m.strips[0]
    colours = [map_colours.colour(strip, i) for i in range(len(strip.functions))]
    assert len(colours) > 30
    assert len(set(colours)) == len(colours)
    assert colours[0] == map_colours.BASE
    assert {map_colours.ink("#ffffff"), map_colours.ink("#000000")} == {"#000000", "#ffffff"}
