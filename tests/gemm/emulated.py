"""Device code compiled for the CPU, and the hardware-invariant GEMM's (emulate_hardware_invariant.cpp)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlab.backends.registry import Packed
from qlab.packing.fragments import block_words, scale_rows
from qlab.recipes.hardware_invariant import slice_blocks

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
TILES = ((1, 16), (1, 32), (2, 16), (2, 32), (4, 16), (4, 32), (8, 32), (8, 64), (16, 32), (16, 64))
NAN = 0x7FFF
"""What outputs that nothing writes hold."""


def build(folder: Path, csrc: Path = CSRC, *more: str, source: str = "emulate_hardware_invariant.cpp") -> ctypes.CDLL:
    """Device code as a library for this machine; skips the test where no compiler makes one."""
    if not (compiler := shutil.which("g++")):
        pytest.skip("there is no g++ to compile the device code for the CPU")
    target, include = folder / "emulated.so", [f"-I{csrc}", f"-I{HERE / 'on_host'}"]
    command = [compiler, *FLAGS, *more, *include, str(HERE / source), "-o", str(target)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if "_Float16" in ran.stderr:
        pytest.skip("this g++ has no _Float16")
    assert ran.returncode == 0, ran.stderr
    return ctypes.CDLL(str(target))


def run(library: ctypes.CDLL, tile: tuple[int, int], x: Tensor, packed: Packed) -> Tensor:
    """y of a tile; rows of x may lie apart."""
    p, blocks, perm = packed.problem, packed.tensors["blocks"], packed.tensors["perm"]
    if perm.numel():
        x = x.index_select(1, perm)
    y = torch.full((x.shape[0], p.N), NAN, dtype=torch.int16).view(x.dtype)
    rows = scale_rows(p.K, p.group_size)
    numbers = (x.shape[0], p.N, p.K, block_words(rows, p.symmetric), rows, not p.symmetric, x.dtype == torch.bfloat16)
    library.run_tile(
        *tile,
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(x.stride(0)),
        ctypes.c_void_p(blocks.data_ptr()),
        ctypes.c_void_p(y.data_ptr()),
        *map(int, numbers),
        slice_blocks(p.K),
    )
    return y
