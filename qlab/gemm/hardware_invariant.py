"""Launches the hardware-invariant GEMM (csrc/hardware_invariant.cuh); its order is qlab.recipes.hardware_invariant's.

The tile, rows of x by columns of the weight that a thread block takes, decides speed alone. Nothing is allocated but y, and
nothing waits for the GPU, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.extension import cuda_module
from qlab.gemm.launch import check_x, readable
from qlab.packing.fragments import scale_rows
from qlab.recipes.hardware_invariant import slice_blocks

_cuda, _MISSING = cuda_module("run_hardware_invariant", "this kernel")

Tile = tuple[int, int]
"""Rows of x and columns of the weight."""
ROUNDS = {
    (1, 16): (1, 2.7),
    (1, 32): (2, 9.0),
    (2, 16): (1, 3.2),
    (2, 32): (1, 6.0),
    (4, 16): (1, 5.2),
    (4, 32): (1, 7.5),
    (8, 32): (2, 22.0),
    (8, 64): (1, 20.0),
    (16, 32): (2, 40.0),
    (16, 64): (1, 36.5),
}
"""Of a tile: thread blocks that a multiprocessor works on together, and microseconds that those take over K = 4096 (H200)."""


def reason() -> str:
    """Why the kernel's code cannot run here: one sentence, or an empty string when it can."""
    if _MISSING:
        return _MISSING
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA GPU"


@lru_cache(maxsize=1)
def tiles() -> tuple[Tile, ...]:
    """The compiled tiles. Raises UnsupportedError with the reason where there are none."""
    if why := reason():
        raise UnsupportedError(f"cuda.hardware_invariant cannot run: {why}")
    return tuple(_cuda.hardware_invariant_tiles())


def cost(tile: Tile, m: int, n: int, sms: int) -> float:
    """Time of the busiest multiprocessor, as far as tiles compare by it."""
    together, time = ROUNDS[tile]
    blocks = -(-m // tile[0]) * -(-n // tile[1])
    return -(-blocks // (together * sms)) * time


@lru_cache(maxsize=4096)
def choose(m: int, n: int, sms: int, among: tuple[Tile, ...]) -> int:
    """The place of the fastest tile for x [m, K] and a weight [K, n] on a GPU with ``sms`` multiprocessors."""
    return min(range(len(among)), key=lambda i: cost(among[i], m, n, sms))


def run(
    x: Tensor, tensors: Mapping[str, Tensor], problem: Problem, *, tile: int | None = None, overlap: bool | None = None
) -> Tensor:
    """y [M, N] for x [M, K] and a weight in the ``fragments`` layout (``blocks``, ``perm``).

    ``problem`` is the weight's, with M = 0. ``tile``: a place in :func:`tiles`; any gives the same bits. ``overlap``: whether
    the launch may load weights while the kernel before it still runs; by default where the GPU can. Raises UnsupportedError for
    an x that does not fit the weight and where the kernel cannot run.
    """
    check_x(x, problem, tensors["blocks"].device)
    among, m = tiles(), x.shape[0]
    if m == 0:
        return x.new_empty((0, problem.N))
    device = x.device.index
    with torch.cuda.device(device):
        perm = tensors["perm"]
        x = x.index_select(1, perm) if perm.numel() else readable(x)
        y = torch.empty((m, problem.N), dtype=x.dtype, device=x.device)
        properties = torch.cuda.get_device_properties(device)
        at = choose(m, problem.N, properties.multi_processor_count, among) if tile is None else tile
        can = properties.major >= 9
        gemm = _cuda.HardwareInvariant(
            x.data_ptr(),
            tensors["blocks"].data_ptr(),
            y.data_ptr(),
            x.stride(0) if m > 1 else problem.K,
            m,
            problem.N,
            problem.K,
            scale_rows(problem.K, problem.group_size),
            not problem.symmetric,
            x.dtype == torch.bfloat16,
            slice_blocks(problem.K),
            can if overlap is None else overlap and can,
        )
        _cuda.set_device(device)
        _cuda.run_hardware_invariant(at, gemm, torch.cuda.current_stream().cuda_stream)
    return y
