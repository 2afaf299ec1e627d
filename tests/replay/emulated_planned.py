"""The planned GEMM's device code, compiled for the CPU (emulate_planned.cpp), behind the engine's own Python."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlab import hardware
from qlab.replay import cuda, native_steps, tensor_cores
from qlab.replay.program import Program
from qlab.replay.step import Bits16
from tests.replay import emulated
from tests.replay.emulated import Problem, Rule, pointer, pointers


class Libraries:
    """The planned GEMM, and the emulation's kernels, from which the join is."""

    def __init__(self, folder: Path) -> None:
        self.planned = emulated.build(folder, "emulate_planned.cpp")
        self.emulation = emulated.build(folder)

    def sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of the tensor cores' tiles."""
        return [self._size(self.planned.planned_size, i) for i in range(self.planned.planned_shapes())]

    def small(self) -> list[tuple[int, int]]:
        """The same of the CUDA cores', the kernel for any step last."""
        return [*(self._size(self.planned.dot_size, few) for few in (0, 1)), emulated.tiles(self.emulation)[-1]]

    @staticmethod
    def _size(function: ctypes._CFuncPtr, which: int) -> tuple[int, int]:
        size = (ctypes.c_int * 2)()
        function(which, size)
        return size[0], size[1]


def run(
    libraries: Libraries,
    program: Program,
    x: Bits16,
    w: Bits16,
    scales: Bits16,
    group: NDArray[np.int32],
    bias: Bits16,
    bf16: bool,
    gpu: hardware.Gpu,
    sms: int = 1,
    raw: bool = False,
    blocks: int = 3,
    shapes: tuple[int, ...] | None = None,
) -> tuple[NDArray[np.unsignedinteger], bool]:
    """What qlab.replay.tensor_cores.run does, kernel by kernel on the CPU, and whether whole programs were executed at once.

    ``shapes``: the only ones that whole programs may take, for the sizes that the others have.
    """
    (m, k), n = x.shape, w.shape[1]
    cuda.check_program(program, m, k, n)
    x, w = aligned_copy(x), aligned_copy(w)
    sizes = libraries.sizes()
    found = None if raw else tensor_cores.whole_tiles(program, sizes, bf16, sms)
    batches: tuple[cuda.Batch, ...] = ()
    whole: tuple[tensor_cores.Whole, ...] = ()
    dot_rows = 0
    if found is None:
        flat, batches, dot_rows = tensor_cores.chain_tiles(program, sizes, libraries.small(), bf16, gpu, sms)
    else:
        flat, whole = found
    data = np.concatenate([program.order.ravel(), program.ops.ravel(), flat])
    y = np.zeros((m, n), np.uint32 if raw else np.uint16)
    rest = [pointer(w), pointer(data), pointer(scales), pointer(group), pointer(bias)]
    problem = own = Problem(pointer(x), *rest, k, n, bf16)
    access = tensor_cores.access(program, m, k, n)
    columns = x
    if access.gathered:
        columns = aligned_copy(x[:, program.order])
        own = Problem(pointer(columns), *rest, columns.shape[1], n, bf16)
    ops = data[program.order.size :]

    def multiply(launch: cuda.Launch, levels: int, out: NDArray[np.generic]) -> None:
        depth, half = tensor_cores.kernel(launch, bf16, gpu)
        count = min(blocks, launch.count)
        scratch = np.full(max(1, count * (levels - 1) * math.prod(sizes[launch.shape])), np.nan, np.float32)
        arrays = (pointers(ops), pointers(data[launch.tiles]), launch.count, count, pointers(scratch), pointers(out))
        how = (max(0, levels - 1), int(levels > 0), int(access.aligned), int(access.gathered))
        rule = Rule.of(launch.step)
        libraries.planned.planned(launch.shape, depth, int(half), ctypes.byref(rule), ctypes.byref(own), *arrays, *how)

    for one in whole:
        multiply(one.launch, one.levels, y)
    for batch in batches:
        results = np.full(batch.results, np.nan, np.float32)
        for launch in batch.chains:
            tiles = pointers(data[launch.tiles])
            if launch.shape < len(sizes):
                multiply(launch, 0, results)
            elif dot_rows:
                dot = native_steps.instruction(launch.step, bf16, gpu)[0] == "dot"
                arguments = (ctypes.byref(problem), launch.step[2], tiles, launch.count, pointers(results))
                libraries.planned.dots(dot_rows, int(dot), *arguments)
            else:
                rule = Rule.of(launch.step)
                plain = libraries.emulation.shapes()
                arguments = (ctypes.byref(problem), ctypes.byref(rule), tiles, launch.count, pointers(results))
                libraries.emulation.chains(plain, *arguments)
        arrays = (pointers(ops), pointers(data[batch.join]), batch.join_count, pointers(results), pointers(y))
        libraries.emulation.join(ctypes.byref(problem), *arrays, int(raw))
    return y, found is not None


def aligned_copy(a: Bits16) -> Bits16:
    """The same values from an address that is a multiple of 16, as the GPU's allocations are."""
    room = np.zeros(a.size + 8, a.dtype)
    first = -pointer(room) % 16 // a.itemsize
    copy = room[first : first + a.size].reshape(a.shape)
    copy[:] = a
    return copy
