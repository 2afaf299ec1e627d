"""The cross-compilation reports what it must: a compiler error, spills, the wrong instructions, k out of order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.cross_compile import Row, fault, instruction, specs, summary

SCRIPT = Path(__file__).resolve().parent.parent / "cross_compile.py"
GOOD = Row("awq_gemm", "fp16", 80, 128, 4096, 0, "mma m16n8k16", instructions={"HMMA.16816.F32": 16, "LDSM": 8, "total": 500})
WGMMA = replace(GOOD, arch=90, tensor_core="wgmma m64n64k16", instructions={"HGMMA.64x64x16.F32": 8, "total": 500})
ARRIVAL = "adds in the order of arrival: RED.E.ADD.F32.FTZ.RN.STRONG.GPU"
TTGIR = "!ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>"


def test_every_kernel_file_has_a_spec():
    files = {p.stem for p in (SCRIPT.parent.parent / "kernels").glob("*.py") if "\n@triton.jit" in p.read_text()}
    assert set(specs()) == files


@pytest.mark.parametrize(
    ("row", "ttgir", "limit", "sentence"),
    [
        (GOOD, TTGIR, 0, ""),
        (replace(GOOD, spills=8), TTGIR, 0, "spills 8 bytes, more than 0"),
        (replace(GOOD, spills=8), TTGIR, 8, ""),
        (replace(GOOD, shared=200000), TTGIR, 0, "needs 200000 bytes of shared memory, more than 166912"),
        (replace(GOOD, shared=200000, arch=90), TTGIR, 0, ""),
        (replace(GOOD, tensor_core=""), TTGIR, 0, "is meant for mma, and its PTX has none"),
        (replace(GOOD, instructions={}), TTGIR, 0, ""),  # not read
        (replace(GOOD, instructions={"FFMA": 64}), TTGIR, 0, "is meant for mma, and its machine code has none"),
        (replace(GOOD, instructions={**GOOD.instructions, "RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 2}), TTGIR, 0, ARRIVAL),
        (replace(GOOD, instructions={**GOOD.instructions, "ATOMG.E.ADD.STRONG.GPU": 2}), TTGIR, 0, ""),  # an integer counter
        (GOOD, TTGIR.replace("2}", "4}"), 0, "kWidth 4: k is not in order"),
    ],
)
def test_faults(row, ttgir, limit, sentence):
    assert fault(row, ttgir, "mma", limit) == sentence


def test_a_kernel_shows_the_instruction_that_it_is_meant_for():
    assert fault(WGMMA, TTGIR, "wgmma", 0) == ""
    assert fault(replace(GOOD, arch=90), TTGIR, "wgmma", 0) == "is meant for wgmma, and its PTX has mma m16n8k16"
    both = replace(WGMMA, tensor_core=f"{GOOD.tensor_core}, {WGMMA.tensor_core}")
    assert fault(both, TTGIR, "wgmma", 0) == f"is meant for wgmma, and its PTX has {both.tensor_core}"
    both = replace(WGMMA, instructions=WGMMA.instructions | GOOD.instructions)
    assert fault(both, TTGIR, "wgmma", 0) == "is meant for wgmma, and its machine code has HMMA and HGMMA"
    assert fault(GOOD, TTGIR, "", 0) == "is meant for no tensor core, and its PTX has mma m16n8k16"


def test_k_is_held_to_the_width_of_the_specialisation():
    assert fault(GOOD, TTGIR.replace("2}", "4}"), "mma", 0, k_width=4) == ""
    assert fault(GOOD, TTGIR, "mma", 0, k_width=4) == "kWidth 2: k is not in order"


def test_instructions_are_read_from_ptx():
    ptx = """mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1}
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r2}
    tcgen05.mma.cta_group::1.kind::f16 [%r3]"""
    assert instruction(ptx) == "mma m16n8k16, tcgen05 mma, wgmma m64n64k16"


def test_summary_takes_the_most_of_each():
    lines = list(summary([GOOD, replace(GOOD, registers=255, shared=1), Row("other", "v", 90)]))
    assert len(lines) == 2
    assert re.search(r"awq_gemm +sm_80 +2 variants: at most 255 registers, +4096 B shared, 0 B spilled; mma m16n8k16", lines[0])


@pytest.mark.parametrize(("index", "status"), [(0, ""), (1, "does not compile")])
def test_one_specialisation_is_compiled(index, status, tmp_path):
    """Index 1 is spoilt: 24 columns are no power of two."""
    code = f"""
import dataclasses
from tests import cross_compile
from qlab.triton_kernels import awq_dequantize as module
good = module.SPEC.variants[0]
bad = dataclasses.replace(good, constants={{**good.constants, "BLOCK_N": 24}})
module.SPEC = dataclasses.replace(module.SPEC, variants=(good, bad))
row = cross_compile.compile_one("awq_dequantize", {index}, 90, 0)
print(row.registers, row.fault, sep="|")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parent.parent, env=environment, capture_output=True, text=True, check=True
    )
    registers, found = run.stdout.strip().splitlines()[-1].split("|")
    assert found.startswith(status)
    assert (int(registers) > 0) == (status == "")
