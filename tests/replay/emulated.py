"""The CUDA engine's device code, compiled for the CPU (emulate.cpp), behind the engine's own Python."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qlab.replay import cuda
from qlab.replay.program import Program
from qlab.replay.step import Bits16

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-O2", "-std=c++17", "-shared", "-fPIC", "-frounding-math", "-ffp-contract=off", "-Wno-unknown-pragmas"]


MIDDLE = 0x00080000
"""kMiddle of csrc/replay_arithmetic.cuh."""


class Rule(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "fraction_bits", "terms", "zero_exponent", "half")),
        ("middle", ctypes.c_uint32),
    ]

    @classmethod
    def of(cls, step: Iterable[int]) -> Rule:
        return cls(*(int(v) for v in step), MIDDLE)


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "order", "scales", "group", "bias")),
        *((name, ctypes.c_int32) for name in ("k", "n", "is_bf16")),
    ]


def build(folder: Path, name: str = "emulate.cpp") -> ctypes.CDLL:
    """The device code as a library for this machine; skips the test where there is no C++ compiler."""
    if not (compiler := shutil.which("g++")):
        pytest.skip("there is no g++ to compile the device code for the CPU")
    target, source = folder / f"{name}.so", Path(__file__).with_name(name)
    ran = subprocess.run([compiler, *FLAGS, f"-I{ROOT / 'csrc'}", source, "-o", target], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ctypes.CDLL(str(target))


def tiles(library: ctypes.CDLL) -> list[tuple[int, int]]:
    """Rows and columns of each shape of tile, the plain one last."""
    sizes = []
    for shape in range(library.shapes() + 1):
        size = (ctypes.c_int * 2)()
        library.shape_size(shape, size)
        sizes.append((size[0], size[1]))
    return sizes


def pointer(a: NDArray[Any]) -> int:
    return int(a.ctypes.data)


def run(
    library: ctypes.CDLL,
    program: Program,
    x: Bits16,
    w: Bits16,
    scales: Bits16,
    group: NDArray[np.int32],
    bias: Bits16,
    bf16: bool,
    sms: int = 1,
    raw: bool = False,
) -> NDArray[np.unsignedinteger]:
    """What qlab.replay.cuda.run does, kernel by kernel on the CPU; bits of the outputs, or of fp32 values with ``raw``."""
    (m, k), n = x.shape, w.shape[1]
    cuda.check_program(program, m, k, n)
    rules = [Rule.of(s[:5]) for s in program.steps]
    fast = [bool(library.is_fast(ctypes.byref(r), bf16)) for r in rules]
    flat, batches = cuda.lay_out(program, tiles(library), fast, sms)
    data = np.concatenate([program.order.ravel(), program.ops.ravel(), flat])
    y = np.zeros((m, n), np.uint32 if raw else np.uint16)
    problem = Problem(pointer(x), pointer(w), pointer(data), pointer(scales), pointer(group), pointer(bias), k, n, bf16)
    ops = data[program.order.size :]
    for batch in batches:
        results = np.full(batch.results, np.nan, np.float32)
        for launch in batch.chains:
            rule, own = Rule.of(launch.step), data[launch.tiles]
            library.chains(
                launch.shape, ctypes.byref(problem), ctypes.byref(rule), pointers(own), launch.count, pointers(results)
            )
        arrays = (pointers(ops), pointers(data[batch.join]), batch.join_count, pointers(results), pointers(y))
        library.join(ctypes.byref(problem), *arrays, int(raw))
    return y


def pointers(a: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(pointer(a))
