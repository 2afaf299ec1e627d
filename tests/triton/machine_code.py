"""What the machine code of ``w4a16`` for sm_90 is made of, without a GPU: for test_w4a16.py, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from qlab.triton_kernels import w4a16
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.cross_compile import resource_usage

LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)([^;]*);")


def facts(
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    *,
    dtype: str = "fp16",
    symmetric: bool = False,
    r: int = 1,
    slices: int = 4,
    arch: int = 90,
) -> dict[str, Any]:
    """Registers, shared memory, spilled bytes, kWidths and the instructions of the main loop, by kind."""
    kernel = w4a16.w4a16_kernel
    pointers = {"p_x": f"*{dtype}", "p_codes": "*i32", "p_scales": "*i32", "p_y": f"*{dtype}", "p_partials": "*fp32"}
    pointers["p_counters"] = "*i32"
    integers = dict.fromkeys(("M", "N8", "K8", "STRIDE8", "TILES", "BLOCKS", "SPAN", "SCALE_ROWS"), "i32")
    constants = {"SLICES": slices, "GROUP_BLOCKS": 1, "R": r, "SYMMETRIC": symmetric, "EVEN_K": True, "PLAIN": False}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
    names, signature = kernel.arg_names, pointers | integers
    source = ASTSource(
        kernel,
        {n: signature.get(n, "constexpr") for n in names},
        constants,
        {(names.index(n),): [["tt.divisibility", 16]] for n in pointers},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = resource_usage(built.asm["cubin"])
    return {
        "registers": registers,
        "spills": spills,
        "shared": built.metadata.shared,
        "k_widths": sorted(set(re.findall(r"kWidth = (\d+)", built.asm["ttgir"]))),
        "loop": dict(Counter(_kind(op) for op in main_loop(disassembly(built.asm["cubin"])))),
    }


def disassembly(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, operation, operands) of every instruction."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), op, rest) for address, op, rest in LINE.findall(text)]


def main_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """The operations of the longest loop with a tensor-core instruction."""
    best: list[str] = []
    for i, (address, op, rest) in enumerate(code):
        target = re.search(r"(0x[0-9a-f]+)\s*$", rest.strip())
        if op.startswith("BRA") and target and int(target[1], 16) < address:
            body = [o for a, o, _ in code[: i + 1] if a >= int(target[1], 16)]
            if any("GMMA" in o or "HMMA" in o for o in body) and len(body) > len(best):
                best = body
    return best


def _kind(op: str) -> str:
    """The operation, with its modifiers where they tell a width or a shape."""
    base = op.split(".")[0]
    return op if base in ("HGMMA", "HMMA", "LDGSTS", "LDG", "LDS", "LDSM", "STS") else base
