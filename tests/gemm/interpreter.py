"""A plan executed in numpy, piece by piece as the kernels' comments define them, with the replay's fused dot-add.

Nothing of it is shared with the recipes: it knows arrays of pieces, not schemes. Memory that a kernel must not read holds NaN,
thread blocks run in a random interleaving, and what is written twice or never is an error.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qlab.gemm.plan import Launch, Plan
from qlab.gemm.tiles import Variant
from qlab.hardware import Gpu
from qlab.replay.step import fused_dot_add

CHUNK = 32

VARIANTS = tuple(
    Variant(*row, number, 2 if row[0] == "wgmma" and row[1] <= 64 and row[2:4] == (128, 1) else 1)
    for number, row in enumerate(
        [
            *(("mma", rows, 64, chains, False) for rows in (8, 16) for chains in (1, 2, 4)),
            *(("wgmma", rows, columns, 1, False) for columns in (256, 128) for rows in (16, 32, 64, 128)),
            ("wgmma", 256, 128, 1, False),
            *(("wgmma", rows, columns, 2, False) for rows in (32, 64) for columns in (256, 128)),
            *(("wgmma", rows, 64, 4, False) for rows in (32, 64)),
            ("wgmma", 64, 256, 1, True),
            ("wgmma", 128, 128, 1, True),
            ("wgmma", 176, 128, 1, True),
        ]
    )
)
"""Those of csrc/int4_mma.cu and csrc/int4_wgmma.cu."""


@dataclass
class Machine:
    """Operands and y of one call."""

    x: np.ndarray
    """uint16 [M, K], bits."""
    w: np.ndarray
    """uint16 [N, K], bits: rounded weights, or integers."""
    gpu: Gpu
    dtype: torch.dtype
    sums: np.ndarray
    """float32 [M, N]: what is left before the output's rounding."""
    written: np.ndarray
    """int [M, N]: how often."""


def interpret(plan: Plan, x: Tensor, w: Tensor, scales: Tensor, gpu: Gpu, seed: int = 0) -> Tensor:
    """y [M, N] of a plan for x [M, K] and w [K, N] as the kernels' tensor cores take it; scales [N] for integers."""
    m, n = x.shape[0], w.shape[1]
    machine = Machine(bits(x), bits(w.t()), gpu, x.dtype, np.full((m, n), np.nan, np.float32), np.zeros((m, n), int))
    for launch in plan.launches:
        run(launch, machine, random.Random(seed))
    assert (machine.written == 1).all(), "an output was written twice or never"
    y = torch.from_numpy(machine.sums).to(x.dtype)
    return (y.float() * scales.float()).to(x.dtype) if plan.integer else y


def run(launch: Launch, machine: Machine, order: random.Random) -> None:
    """One launch: its thread blocks interleaved at random, each with its pieces in turn."""
    v = launch.variant
    if launch.cluster > 1:
        return run_clusters(launch, machine)
    workspace = np.full((launch.partials, v.rows, v.columns), np.nan, np.float32)
    counters = np.zeros(launch.counters, int)
    ahead = [list(range(a, b)) for a, b in zip(launch.starts[:-1], launch.starts[1:], strict=True)]
    assert all(ahead), "a thread block has nothing to do"
    while ahead:
        block = order.choice(ahead)
        execute(launch, launch.pieces[block.pop(0)].tolist(), machine, workspace, counters)
        if not block:
            ahead.remove(block)
    assert not counters.any(), "a counter was not left zero"


def run_clusters(launch: Launch, machine: Machine) -> None:
    """Thread blocks in clusters, each with one piece of the cluster's tile, at the place of its rank."""
    assert launch.starts.tolist() == list(range(len(launch.pieces) + 1))
    assert len(launch.pieces) % launch.cluster == 0
    for i in range(0, len(launch.pieces), launch.cluster):
        members = launch.pieces[i : i + launch.cluster].tolist()
        row, rows, column = members[0][:3]
        columns = min(launch.variant.columns, machine.w.shape[0] - column)
        assert all(p[:3] == [row, rows, column] for p in members)
        assert [p[7] for p in members] == [rank << 16 | launch.cluster for rank in range(launch.cluster)]
        ends = (row, row + rows), (column, column + columns)
        total, *others = (piece_sum(launch, machine, *ends, (p[3], p[4])) for p in members)
        for other in others:
            total = total + other
        put(machine, *ends, total)


def put(machine: Machine, rows: tuple[int, int], columns: tuple[int, int], sums: np.ndarray) -> None:
    place = slice(*rows), slice(*columns)
    machine.sums[place] = sums
    machine.written[place] += 1


def execute(launch: Launch, piece: list[int], machine: Machine, workspace: np.ndarray, counters: np.ndarray) -> None:
    row, rows, column, k_begin, k_end, tile, first, place = piece
    rank, count = place >> 16, place & 0xFFFF
    v = launch.variant
    assert 1 <= rows <= v.rows
    columns = min(v.columns, machine.w.shape[0] - column)
    sums = piece_sum(launch, machine, (row, row + rows), (column, column + columns), (k_begin, k_end))
    if count > 1:
        slot = workspace[first + rank]
        assert np.isnan(slot).all(), "two pieces have one place in the workspace"
        slot[:] = 0
        slot[:rows, :columns] = sums
        counters[tile] += 1
        if counters[tile] < count:
            return
        counters[tile] = 0
        total = workspace[first].copy()
        for r in range(1, count):
            total = total + workspace[first + r]
        sums = total[:rows, :columns]
    put(machine, (row, row + rows), (column, column + columns), sums)


def piece_sum(
    launch: Launch, machine: Machine, rows: tuple[int, int], columns: tuple[int, int], ks: tuple[int, int]
) -> np.ndarray:
    """float32 [rows, columns]: the chains of a piece, joined; with a cut a running total over them."""
    assert ks[0] % CHUNK == 0
    assert ks[1] % CHUNK == 0
    if launch.variant.kernel == "wgmma":
        assert ks[0] % 64 == 0
        assert ks[1] % 64 == 0 or ks[1] == machine.x.shape[1]
    if not launch.cut:
        return chained(launch, machine, rows, columns, ks)
    assert launch.variant.total
    assert launch.cut % 128 == 0
    places = [k for k in range(*ks, CHUNK) if k == ks[0] or k % launch.cut == 0]
    parts = [chained(launch, machine, rows, columns, part) for part in zip(places, [*places[1:], ks[1]], strict=True)]
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return total


def chained(
    launch: Launch, machine: Machine, rows: tuple[int, int], columns: tuple[int, int], ks: tuple[int, int]
) -> np.ndarray:
    """float32 [rows, columns]: accumulator r takes the chunks whose number is r, by turns; joined as Marlin's warp rows."""
    count = launch.variant.chains
    sums = []
    for r in range(count):
        k = [
            k
            for chunk in range(ks[0] // CHUNK, ks[1] // CHUNK)
            if chunk % count == r
            for k in range(32 * chunk, 32 * chunk + 32)
        ]
        a, b = machine.x[slice(*rows)][:, k], machine.w[slice(*columns)][:, k]
        height, width = len(a), len(b)
        left, right = np.repeat(a, width, 0), np.tile(b, (height, 1))
        start = np.zeros(height * width, np.uint32)
        found = fused_dot_add(left, right, start, machine.gpu.step, machine.dtype) if k else start
        sums.append(found.view(np.float32).reshape(height, width))
    if count == 1:
        return sums[0]
    if count == 2:
        return sums[0] + sums[1]
    return sums[0] + (sums[1] + (sums[3] + sums[2]))


def bits(t: Tensor) -> np.ndarray:
    return t.contiguous().view(torch.int16).numpy().view(np.uint16)
