"""The INT4 GEMMs' device code, compiled for the CPU (emulate_int4.cpp): a plan's launches, one after the other."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from qlab.gemm.plan import Plan
from qlab.hardware import Gpu
from qlab.packing.fragments import FragmentTensors, block_words, scale_rows
from tests.gemm import emulated

MMA = ((8, 1, 1), (16, 1, 1), (8, 2, 1), (16, 2, 2), (16, 4, 1), (8, 4, 2), (8, 4, 4))
"""Rows, chains and teams of warps of what is compiled; 64 columns."""
ONE = (16, 4, 1)
"""The only one in a library of one kernel that is to be compiled quickly; of wgmma's it is the first."""
WGMMA = (
    (16, 128, 1, False),
    (128, 256, 1, False),
    (256, 128, 1, False),
    (32, 128, 2, False),
    (32, 64, 4, False),
    (64, 256, 1, True),
    (176, 128, 1, True),
)
"""Rows, columns, chains, running total."""
NAN = 0x7FFF


class Step(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("fraction_bits", "terms", "zero_exponent")]


class Choice(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("rows", "columns", "chains", "total", "teams", "bf16")]


class Arguments(ctypes.Structure):
    """int4_fragments.cuh's."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("blocks", "column_scales", "y", "workspace", "counters", "pieces", "starts")),
        *((name, ctypes.c_int) for name in ("slices", "slice_rows", "tile_columns", "m", "n", "k")),
        *((name, ctypes.c_int) for name in ("block_words", "group_rows", "cut", "cluster")),
        ("join", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("has_zeros", "integer")),
    ]


class Library:
    """The code for Hopper, or for GPUs before it."""

    def __init__(self, folder: Path, hopper: bool, csrc: Path = emulated.CSRC, one: str = "") -> None:
        folder.mkdir(exist_ok=True)
        only = [f"-DQLAB_ONE_VARIANT={1 + (one == 'wgmma')}"] if one else []
        flags = ["-O1", "-pthread", f"-DQLAB_HOPPER={int(hopper)}", *only]  # most of the time is the compiler's
        self.code = emulated.build(folder, csrc, *flags, source="emulate_int4.cpp")
        assert self.code.arguments_size() == ctypes.sizeof(Arguments)
        self.code.run_launch.restype = ctypes.c_char_p

    def run(self, plan: Plan, x: Tensor, t: FragmentTensors, gpu: Gpu, teams: int = 1, seed: int = 0) -> Tensor:
        """y of x [M, K]; ``teams``: of warps, for variants of mma.sync with as many chains."""
        if t.perm.numel():
            x = x.index_select(1, t.perm)
        m, rows = x.shape[0], scale_rows(t.k, t.group_size)
        x = aligned(pad(x, (0, -t.k % 64)))
        y = torch.full((m, t.n), NAN, dtype=torch.int16)
        step = Step(gpu.step.fraction_bits, gpu.step.terms, gpu.step.zero_exponent)
        for launch in plan.launches:
            v = launch.variant
            workspace = torch.full((launch.workspace + 1,), float("nan"))
            counters = torch.zeros(launch.counters + 1, dtype=torch.int32)
            pieces, starts = np.ascontiguousarray(launch.pieces), np.ascontiguousarray(launch.starts)
            blocks = aligned(t.blocks)
            memory = (blocks, t.column_scales, y, workspace, counters)
            given = Arguments(
                x.data_ptr(),
                x.stride(0),
                *(tensor.data_ptr() for tensor in memory),
                *(a.ctypes.data for a in (pieces, starts)),
                *(launch.slices, launch.slice_rows, v.columns),
                *(m, t.n, t.k, block_words(rows, t.symmetric), rows, launch.cut, launch.cluster),
                *(int(launch.join), not t.symmetric, plan.integer),
            )
            choice = Choice(v.rows, v.columns, v.chains, v.total, teams if v.kernel == "mma" else 1, x.dtype == torch.bfloat16)
            wrong = self.code.run_launch(
                *(v.kernel == "wgmma", ctypes.byref(choice), ctypes.byref(step), ctypes.byref(given), launch.blocks, seed)
            )
            assert not wrong, f"{v}: {wrong.decode()}"
            assert not counters.any(), "a counter was not left zero"
        return y.view(x.dtype)


def aligned(tensor: Tensor) -> Tensor:
    """A copy that begins at 128 bytes."""
    size = tensor.numel() * tensor.element_size()
    memory = torch.empty(size + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 128
    found = memory[start : start + size].view(tensor.dtype).view(tensor.shape)
    return found.copy_(tensor)
