"""What the machine code of ``w4a16`` for sm_90 is made of, without a GPU: for test_w4a16.py, in a process of its own."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from typing import Any

import triton
from qlab.triton_kernels import w4a16
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.machine_code import cuobjdump, read_cubin

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
    code = read_cubin(built.asm["cubin"], f"sm_{arch}")
    loop = main_loop(disassembly(built.asm["cubin"]))
    return {
        "registers": code.registers,
        "spills": code.local,
        "shared": built.metadata.shared,
        "k_widths": sorted(set(re.findall(r"kWidth = (\d+)", built.asm["ttgir"]))),
        "loop": dict(Counter(_kind(op) for op, _ in loop)),
        "overwritten": overwritten(loop),
    }


def disassembly(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, operation, operands) of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = cuobjdump("--dump-sass", file.name)
    return [(int(address, 16), op, rest) for address, op, rest in LINE.findall(text)]


def main_loop(code: list[tuple[int, str, str]]) -> list[tuple[str, str]]:
    """The operations of the longest loop with a tensor-core instruction, and their operands."""
    best: list[tuple[str, str]] = []
    for i, (address, op, rest) in enumerate(code):
        target = re.search(r"(0x[0-9a-f]+)\s*$", rest.strip())
        if op.startswith("BRA") and target and int(target[1], 16) < address:
            body = [(o, r) for a, o, r in code[: i + 1] if a >= int(target[1], 16)]
            if any("GMMA" in o or "HMMA" in o for o, _ in body) and len(body) > len(best):
                best = body
    return best


def overwritten(loop: list[tuple[str, str]]) -> list[str]:
    """Instructions that write a register which a wgmma, of this step or the one before, may still have to read.

    A wgmma is asynchronous: its left operand's registers are free when a wait leaves fewer groups pending than were committed
    (``gsb0``) since its own, that one included. The loop is followed once around from each wgmma.
    """
    found = []
    for i, (op, rest) in enumerate(loop):
        left = re.match(r"\s*R\d+, R(\d+), gdesc", rest)
        if not op.startswith("HGMMA") or not left:
            continue
        operand = range(int(left[1]), int(left[1]) + 4)
        committed = int("gsb0" in rest)
        for later, operands in (*loop[i + 1 :], *loop[: i + 1]):
            if later.startswith("WARPGROUP.DEPBAR"):
                if committed > int(operands.rpartition("0x")[2], 16):
                    break
            elif later.startswith("HGMMA"):
                committed += "gsb0" in operands
            elif any(r in operand for r in _written(later, operands)):
                found.append(f"{later}{operands}")
                break
        else:
            found.append(f"no wait for {op}{rest}")
    return found


def _written(op: str, operands: str) -> range:
    """Registers that an instruction writes: of its first operand, or of its second where the first is a predicate."""
    target = re.match(r"\s*(?:U?P(?:\d|T), )?R(\d+)\b", operands)
    if target is None or "SETP" in op or op.startswith(("ST", "LDGSTS", "BAR", "RED")):
        return range(0)
    width = 4 if ".128" in op or op.endswith(".4") else 2 if ".64" in op or "WIDE" in op or op.endswith(".2") else 1
    return range(int(target[1]), int(target[1]) + width)


def _kind(op: str) -> str:
    """The operation, with its modifiers where they tell a width or a shape."""
    base = op.split(".")[0]
    return op if base in ("HGMMA", "HMMA", "LDGSTS", "LDG", "LDS", "LDSM", "STS") else base
