"""The command, its files and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qlab.backends.registry import Problem
from qlab.hardware import gpu
from qlab.reveal import Asked, Revealed, reveal
from qlab.reveal.__main__ import app
from qlab.reveal.figure import draw
from qlab.reveal.subject import kernel_name
from qlab.reveal.text import revealed_text

PNG = b"\x89PNG\r\n"


def test_text_file_and_figure(tmp_path: Path) -> None:
    out, image = tmp_path / "found.json", tmp_path / "tree.png"
    ran = CliRunner().invoke(
        app, ["marlin_gptq", "--shape", "1,512,256", "--hw", "h100", "--replay", "--json", str(out), "--plot", str(image)]
    )
    assert ran.exit_code == 0, ran.output
    assert "equals the kernel's recipe" in ran.output
    assert "a replay of its recipe for NVIDIA H100" in ran.output.replace("\n", " ")
    assert "3 x, k -128 each: (k 320:352 + k 352:384 + k 288:320 + k 256:288)" in ran.output
    found = Revealed.read(out)
    assert (found.kernel, found.native, found.gpu) == ("vllm.marlin.gptq", False, "h100")
    assert found.ordered
    assert found.exact
    assert found.comparison is not None
    assert found.comparison.identical
    assert revealed_text(found) == ran.output.rstrip("\n")
    assert image.read_bytes().startswith(PNG)


def test_a_kernel_that_runs_here_is_asked_itself() -> None:
    found = reveal(Asked("torch.matmul", 2, 64, 8, 64, torch.float16))
    assert found.native
    assert found.comparison is None
    assert found.exact
    assert sum((b - a) * (d - c) for a, b, c, d in found.alike) >= 1
    assert "no recipe to compare with" in revealed_text(found)


@pytest.mark.parametrize("kernel", ["gptq", "awq_gemm", "marlin_gptq.atomic"])
def test_figures_of_other_trees(kernel: str, tmp_path: Path) -> None:
    found = reveal(Asked(kernel, 1, 512, 256, 128, torch.float16, hw="h100", replay=True))
    assert found.comparison is not None
    assert found.comparison.equal
    draw(found, tmp_path / "tree.svg")
    assert "</svg>" in (tmp_path / "tree.svg").read_text()


def test_names() -> None:
    problem = Problem(1, 4096, 4096, 128, torch.float16, symmetric=True, act_order=False)
    named = {
        text: kernel_name(text, problem, gpu("h100"))
        for text in ("marlin_awq", "marlin_gptq.fp16", "awq_triton", "gptq_marlin", "gptq", "vllm.awq_gemm", "triton_awq_gemm")
    }
    assert list(named.values()) == [
        "vllm.marlin.awq",
        "vllm.marlin.gptq.fp16",
        "vllm.awq_triton",
        "vllm.machete.gptq",
        "vllm.gptq_gemm",
        "vllm.awq_gemm",
        "triton.awq_gemm",
    ]
    assert kernel_name("gptq_marlin", problem, gpu("a100")) == "vllm.marlin.gptq"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["marlin", "--shape", "1,128,64"], "unknown kernel 'marlin'; known: torch.matmul, awq,"),
        (["marlin_gptq", "--shape", "1,128"], "--shape '1,128' is not M,K,N"),
        (["marlin_gptq", "--shape", "1,2,64"], "K must be at least 4"),
        (["marlin_gptq", "--shape", "1,128,64", "--group", "96"], "--group 96 does not divide K=128"),
        (["marlin_gptq", "--shape", "1,128,64", "--row", "1"], "is not an element of the 1 x 64 output"),
        (["marlin_gptq", "--shape", "1,128,64", "--dtype", "fp32"], "--dtype 'fp32' is not one of"),
        (["marlin_gptq", "--shape", "1,128,64", "--hw", "h1000"], "unknown GPU 'h1000'"),
        (["marlin_gptq", "--shape", "1,128,65", "--hw", "h100"], "Marlin needs N to be a multiple of 64"),
        (["awq", "--shape", "300,128,128", "--hw", "h100", "--replay"], "its recipe is opaque: cuBLAS"),
        (["torch.matmul", "--shape", "1,128,64", "--replay"], "has no recipe to replay"),
        (["marlin_gptq", "--shape", "1,128,64", "--plot", "tree.txt"], "name a .png, .svg or .pdf file"),
        (["marlin_gptq", "--shape", "1,128,64", "--json", "absent/found.json"], "does not exist; make it first"),
    ],
)
def test_refusals(arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 2
    assert said in ran.stderr
    assert ran.stderr.startswith("qlab.reveal: ")
    assert ran.stderr.count("\n") == 1
