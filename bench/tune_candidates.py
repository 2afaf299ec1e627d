"""What bench/tune.py tries: slices of K and tiles for each kernel that has a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from torch import Tensor

from qlab.backends.registry import Packed, kernel
from qlab.gemm.plan import MOST_CLUSTER, TOTAL_ROWS
from qlab.hardware import Gpu
from qlab.recipes import tuned
from qlab.recipes.tuned import Choice, Value

Tiles = TypeVar("Tiles")
Run = Callable[[Tensor, Packed], Tensor]
SLICES = (1, 2, 3, 4, 6, 8, 12, 16)
TOTAL_SLICES = (2, 3, 4, 6, 8)
LEAST_ROWS = 256
"""Rows of K that a slice keeps at least, where there is more than one."""
MOST_WAVES = 6
"""Thread blocks for each multiprocessor beyond which more slices are not tried."""
TRITON = {
    16: ((16, 64, 4, 4), (16, 64, 4, 6), (16, 128, 4, 3), (16, 128, 4, 4), (16, 128, 4, 5), (16, 128, 8, 4)),
    32: ((32, 64, 4, 4), (32, 128, 4, 4), (32, 128, 8, 4)),
    64: ((64, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3)),
    128: ((128, 64, 4, 4), (128, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 3), (128, 128, 8, 3)),
    256: ((128, 128, 4, 3), (256, 64, 4, 3), (128, 128, 8, 3), (256, 128, 8, 3), (128, 256, 8, 3), (128, 64, 4, 4)),
}
"""Up to so many rows, and beyond: block_m, block_n, warps, stages."""
USUAL = {16: (16, 64, 4, 4), 32: (32, 64, 4, 4), 128: (64, 128, 4, 4), 129: (128, 128, 4, 3)}
"""Of those the ones that are taken unseen."""
WASTE = 1.04
"""Waves of thread blocks over those that are needed, from which stripes are taken unseen."""
WGMMA = {
    16: ((16, 128), (16, 256)),
    32: ((32, 128), (32, 256), (16, 256)),
    64: ((64, 128), (64, 256), (32, 256)),
    128: ((128, 128), (128, 256), (64, 256)),
    256: ((256, 128), (128, 256), (128, 128)),
}
"""Up to so many rows, and beyond: tile rows and columns."""
TOTAL = {128: ((64, 256), (128, 128)), 256: ((128, 128), (176, 128))}
"""The same of tiles that take all slices in turn, for more rows than TOTAL_ROWS."""
PER_SM, MOST_FEW_ROWS, FEW_ROWS_SLICES = 4, 32, 5
"""Of mma.sync's kernel: thread blocks of an SM, rows of x for which it is tried, numbers of slices that are."""


def up_to(table: Mapping[int, Tiles], m: int) -> Tiles:
    """What a table by the most rows says of m, and its last entry beyond."""
    return table[next((most for most in table if m <= most), max(table))]


def candidates(name: str, m: int, k: int, n: int, gpu: Gpu) -> Iterator[Choice]:
    """What is worth timing on one shape, the likeliest first."""
    yield from triton(m, k, n, gpu) if name == "triton.w4a16" else cuda(name, m, k, n, gpu)


def triton(m: int, k: int, n: int, gpu: Gpu) -> Iterator[Choice]:
    found = []
    for block_m, block_n, warps, stages in up_to(TRITON, m):
        config = {"block_m": block_m, "block_n": block_n, "warps": warps, "stages": stages}
        tiles = -(-m // block_m) * -(-n // block_n)
        found += [(place, Choice(slices, tuple(config.items()))) for place, slices in enumerate(counts(k, tiles, gpu))]
    yield from (choice for _, choice in sorted(found, key=lambda pair: pair[0]))


def cuda(name: str, m: int, k: int, n: int, gpu: Gpu) -> Iterator[Choice]:
    """Variants by kernel, tile rows and columns; the launcher takes the nearest that it has, so some may be the same."""
    if m <= MOST_FEW_ROWS:
        yield from _few_rows(name, m, k, n, gpu)
    if m < 8 or gpu.capability != (9, 0):
        return
    for rows, width in up_to(WGMMA, m):
        config: dict[str, Value] = {"kernel": "wgmma", "rows": rows, "columns": width}
        tiles = -(-m // rows) * -(-n // width)
        if name == "cuda.split" and tiles % gpu.sms:
            for per_sm in (2, 1) if rows <= 64 and width == 128 else (1,):
                yield Choice(1, (*config.items(), ("striped", per_sm)))
        for slices in counts(k, tiles, gpu):
            yield Choice(slices, tuple(config.items()))
            if 2 < slices <= 4 and m <= 128:
                yield Choice(slices, (*config.items(), ("cluster", slices)))
    if m > TOTAL_ROWS:
        for rows, width in up_to(TOTAL, m):
            for slices in (s for s in TOTAL_SLICES if k // s >= LEAST_ROWS):
                yield Choice(slices, (("columns", width), ("kernel", "wgmma"), ("rows", rows), ("total", 1)))


def _few_rows(name: str, m: int, k: int, n: int, gpu: Gpu) -> Iterator[Choice]:
    """mma.sync: slices that keep :data:`PER_SM` thread blocks on every SM, in one wave first; joined by a cluster or not."""
    rows = 8 if m <= 8 else 16
    config: dict[str, Value] = {"kernel": "mma", "rows": rows, "columns": 64}
    tiles, room = -(-m // rows) * -(-n // 64), PER_SM * gpu.sms
    found = {len(tuned.ranges(k, s)) for s in range(1, 17) if s == 1 or k // s >= LEAST_ROWS}
    for slices in sorted(found, key=lambda s: (tiles * s > room, abs(room - tiles * s)))[:FEW_ROWS_SLICES]:
        for cluster in (0, slices) if 1 < slices <= MOST_CLUSTER else (0,):
            yield Choice(slices, (*config.items(), ("cluster", cluster)))
    if name == "cuda.split":
        yield Choice(1, (*config.items(), ("striped", PER_SM)))


def untried(name: str, m: int, k: int, n: int, slices: int = 0) -> Choice:
    """What a table says where time allowed too few candidates: the usual tile, and slices by the shape alone unless given."""
    found = slices or (1 if m >= 1024 else tuned.heuristic(m, k, n).slices)
    config: dict[str, Value] = {}
    if name == "triton.w4a16":
        block_m, block_n, warps, stages = up_to(USUAL, m)
        config = {"block_m": block_m, "block_n": block_n, "warps": warps, "stages": stages}
    elif m > 64 and slices > 1:  # in turn, by tiles that have room for a total
        config = {"kernel": "wgmma", "rows": 128 if m <= 256 else 176, "columns": 128, "total": 1}
    elif m > 64:
        rows, columns = (128, 256) if m <= 128 else (256, 128)
        config = {"kernel": "wgmma", "rows": rows, "columns": columns}
        waves = -(-m // rows) * -(-n // columns) / tuned.MANY_BLOCKS
        if name == "cuda.split" and -(-waves // 1) > WASTE * waves:
            config["striped"] = 1
    return Choice(found, tuple(config.items()))


def counts(k: int, tiles: int, gpu: Gpu) -> list[int]:
    """Numbers of slices that leave each enough rows and not too many thread blocks in all, those that fill the GPU first."""
    found = [s for s in SLICES if s == 1 or (k // s >= LEAST_ROWS and tiles * s <= MOST_WAVES * gpu.sms)]
    distinct = {len(tuned.ranges(k, s)) for s in found}
    return sorted(distinct, key=lambda s: abs(tiles * s - 2 * gpu.sms))


def compile_all(name: str, choices: Sequence[Choice], x: Tensor, packed: Packed) -> None:
    """Compile a Triton kernel for all choices, side by side; what does not compile says so when it is run."""
    if name != "triton.w4a16":
        return
    compile_one = partial(kernel(name).run_as, x, packed, compile_only=True)  # type: ignore[attr-defined]
    compile_one(choices[0])  # alone: the first call in a process prepares the compiler
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(compile_one, choice) for choice in choices[1:]]:
            future.exception()


def _triton(choice: Choice) -> Run:
    return lambda x, packed: kernel("triton.w4a16").run_as(x, packed, choice)  # type: ignore[attr-defined]


def _cuda(name: str, choice: Choice) -> Run:
    from qlab.gemm import launch
    from qlab.gemm.planner import Planner

    planner = Planner(name, choice)
    return lambda x, packed: launch.run(x, packed.tensors, packed.problem, planner)


FAMILIES: Mapping[str, Callable[[Choice], Run]] = {
    "triton.w4a16": _triton,
    "cuda.split": partial(_cuda, "cuda.split"),
    "cuda.batch_invariant": partial(_cuda, "cuda.batch_invariant"),
}
"""What runs a choice, by the kernel's name."""
