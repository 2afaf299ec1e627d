"""The tensor-core engine: executes a program on this GPU's own tensor cores, at their speed.

Its bits are the recipe's where the GPU's instructions compute the recipe's step: an H100 executes Marlin's recipe for any
number of SMs, hybrids, and L = 8 by m16n8k8, but no step of an A100, which the ``cuda`` engine emulates. Where there is a tile
for every multiprocessor, a thread block executes a region's whole program; otherwise the chains of one output run side by
side and are joined by a second kernel, as in the ``cuda`` engine.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlab import hardware
from qlab.errors import UnsupportedError
from qlab.replay import cuda, native_steps
from qlab.replay.cuda import Batch, Launch
from qlab.replay.program import Int32, Op, Program

COST = (1.0, 1.0, 1.2, 1.6, 2.6)
"""Time of a product in a tile of each shape, in that of the largest."""
OCCUPIED = 0.75
"""Share of the multiprocessors that must have a tile for whole programs to be worth while."""
PLAIN = 5
"""The emulation's shape for any step (``chain_tiles``)."""
DEPTHS = {"k16": 16, "k8": 8}
GATHERED = 1 << 29
"""Values of x at most that are copied into the order of the walks (1 GiB)."""


def reason() -> str:
    """Why the engine cannot run here: one sentence, or an empty string when it can."""
    return cuda.reason()


def refusal(program: Program, is_bf16: bool) -> str:
    """Why this GPU's own instructions do not compute a program; empty where they do."""
    here = hardware.detect()
    return "PyTorch finds no GPU with tensor cores" if here is None else native_steps.refusal(program, is_bf16, here)


def run(
    program: Program,
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    group: Tensor,
    bias: Tensor,
    *,
    dtype: torch.dtype | None = None,
    raw: bool = False,
) -> Tensor:
    """y [M, N], as :func:`qlab.replay.cuda.run` takes and returns it, with the same bits.

    Raises UnsupportedError where the engine cannot run, or names the step that this GPU does not compute; QlabError for
    operands that do not fit the program.
    """
    engine = cuda.module()
    is_bf16 = cuda._is_bf16(x, dtype)
    bits, group = cuda.checked(program, x, w, scales, group, bias)
    (m, k), n = x.shape, w.shape[1]
    with torch.cuda.device(x.device):
        engine.set_device(x.device.index)
        plan = _plan(program, m, k, n, is_bf16, raw)
        kind = torch.float32 if raw else torch.int16
        y = (torch.empty if plan.covers else torch.zeros)((m, n), dtype=kind, device=x.device)
        addresses = [t.data_ptr() for t in (bits[1], plan.data[plan.order], bits[2], group, bits[3])]
        operands = own = engine.Operands(bits[0].data_ptr(), *addresses, k, n, is_bf16)
        columns = bits[0]
        if plan.access.gathered:
            columns = bits[0].index_select(1, plan.data[plan.order])
            own = engine.Operands(columns.data_ptr(), *addresses, columns.shape[1], n, is_bf16)
        fits = columns.data_ptr() % 16 == 0 and bits[1].data_ptr() % 16 == 0
        stream, ops = torch.cuda.current_stream().cuda_stream, plan.data[plan.ops].data_ptr()

        def multiply(launch: Launch, levels: int, scratch: int, out: int) -> None:
            depth, half = kernel(launch, is_bf16, plan.gpu)
            blocks = plan.sms * resident(launch.shape, depth, is_bf16, half)
            access = plan.access.aligned and fits, plan.access.gathered
            how = engine.Planned(launch.shape, depth, half, levels > 0, *access, max(0, levels - 1), blocks)
            engine.run_planned(how, own, ops, plan.data[launch.tiles].data_ptr(), launch.count, scratch, out, stream)

        scratch = torch.empty(plan.scratch, dtype=torch.float32, device=x.device)
        for one in plan.whole:
            multiply(one.launch, one.levels, scratch.data_ptr(), y.data_ptr())
        results = torch.empty(max((b.results for b in plan.batches), default=0), dtype=torch.float32, device=x.device)
        for batch in plan.batches:
            for launch in batch.chains:
                tiles, out = plan.data[launch.tiles].data_ptr(), results.data_ptr()
                if launch.shape < len(COST):
                    multiply(launch, 0, 0, out)
                elif plan.dot_rows:
                    dot = native_steps.instruction(launch.step, is_bf16, plan.gpu)[0] == "dot"
                    engine.run_dots(plan.dot_rows, dot, launch.step[2], operands, tiles, launch.count, out, stream)
                else:
                    engine.run_chains(PLAIN, operands, engine.StepRow(*launch.step), tiles, launch.count, out, stream)
            join = plan.data[batch.join].data_ptr()
            engine.run_join(operands, ops, join, batch.join_count, results.data_ptr(), y.data_ptr(), raw, stream)
    return y if raw else y.view(x.dtype)


def kernel(launch: Launch, is_bf16: bool, gpu: hardware.Gpu) -> tuple[int, bool]:
    """k of a launch's instruction, and whether its accumulators are fp16."""
    name = native_steps.instruction(launch.step, is_bf16, gpu)[0]
    return DEPTHS[str(name)], bool(launch.step[4])


@lru_cache(maxsize=64)
def resident(shape: int, depth: int, is_bf16: bool, half: bool) -> int:
    """Blocks of a kernel that a multiprocessor of this GPU holds at once."""
    return int(cuda.module().planned_blocks(shape, depth, is_bf16, half))


@dataclass(frozen=True)
class Access:
    """How the kernel reads its operands."""

    aligned: bool
    """In copies of 16 bytes; otherwise value by value."""
    gathered: bool
    """x is copied first, with a column for each place of the program's order."""


@dataclass(frozen=True)
class Whole:
    """Tiles of regions whose programs are executed at once, with the most values that their stacks hold."""

    launch: Launch
    levels: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A program cut into tiles, its arrays one after another on the GPU: order, ops, tiles."""

    source: Program
    gpu: hardware.Gpu
    sms: int
    data: Tensor
    order: slice
    ops: slice
    whole: tuple[Whole, ...]
    batches: tuple[Batch, ...]
    scratch: int
    dot_rows: int
    """Rows of the tiles of CUDA cores; 0 where the emulation's kernel takes them."""
    access: Access
    covers: bool


_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


def _plan(program: Program, m: int, k: int, n: int, is_bf16: bool, raw: bool) -> Plan:
    """As the cuda engine's: programs that share their arrays and have equal regions share a plan."""
    arrays = (id(program.order), id(program.steps), id(program.ops), program.regions.tobytes())
    key = (arrays, m, k, n, is_bf16, raw, torch.cuda.current_device())
    if key not in _plans:
        _plans[key] = _make_plan(program, m, k, n, is_bf16, raw)
        if len(_plans) > cuda.PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return _plans[key]


def _make_plan(program: Program, m: int, k: int, n: int, is_bf16: bool, raw: bool) -> Plan:
    cuda.check_program(program, m, k, n)
    gpu = hardware.detect()
    assert gpu is not None  # cuda.module() has run
    if why := native_steps.refusal(program, is_bf16, gpu):
        raise UnsupportedError(f"the tensor-core engine does not compute this recipe: {why}; the cuda engine emulates it")
    engine = cuda.module()
    sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    sizes = [(int(r), int(c)) for r, c in engine.planned_tile_sizes()]
    found = None if raw else whole_tiles(program, sizes, is_bf16, sms)
    batches: tuple[Batch, ...] = ()
    launches: tuple[Whole, ...] = ()
    dot_rows = 0
    if found is None:
        small = [*engine.dot_tile_sizes(), engine.chain_tiles()[PLAIN]]
        flat, batches, dot_rows = chain_tiles(program, sizes, small, is_bf16, gpu, sms)
    else:
        flat, launches = found

    def scratch(one: Whole) -> int:
        depth, half = kernel(one.launch, is_bf16, gpu)
        blocks = min(one.launch.count, sms * resident(one.launch.shape, depth, is_bf16, half))
        return blocks * (one.levels - 1) * math.prod(sizes[one.launch.shape])

    order, ops = slice(0, program.order.size), slice(program.order.size, program.order.size + program.ops.size)
    data = torch.from_numpy(np.concatenate([program.order.ravel(), program.ops.ravel(), flat])).cuda()
    regions = program.regions.astype(np.int64)
    covers = int(((regions[:, 1] - regions[:, 0]) * (regions[:, 3] - regions[:, 2])).sum()) == m * n
    most = max(map(scratch, launches), default=0)
    return Plan(program, gpu, sms, data, order, ops, launches, batches, most, dot_rows, access(program, m, k, n), covers)


def access(program: Program, m: int, k: int, n: int) -> Access:
    """Columns of x are gathered where the walks do not lie in whole eighths and the copy is of bearable size."""
    columns = n % 8 == 0 and not bool((program.regions[:, 2] % 8).any())
    if not columns or native_steps.aligned(program.order, program, k):
        return Access(columns, False)
    places = np.arange(program.order.size, dtype=np.int32)
    gathered = m * program.order.size <= GATHERED and native_steps.aligned(places, program, program.order.size)
    return Access(gathered, gathered)


def whole_tiles(
    program: Program, sizes: list[tuple[int, int]], is_bf16: bool, sms: int
) -> tuple[Int32, tuple[Whole, ...]] | None:
    """Tiles that execute their regions' whole programs, behind order and ops; None where chains must run side by side.

    ``sizes``: rows and columns of the kernels' tiles, the largest first.
    """
    regions = [r for r in program.regions.tolist() if r[0] < r[1] and r[2] < r[3]]
    known = {(r[4], r[5]): native_steps.whole(program, r[4], r[5], is_bf16) for r in regions}
    if not regions or None in known.values():
        return None
    best: tuple[float, dict[tuple[int, int], list[Int32]], dict[tuple[int, int], int]] | None = None
    for largest in range(len(sizes)):
        groups: dict[tuple[int, int], list[Int32]] = {}
        levels: dict[tuple[int, int], int] = {}
        for m0, m1, n0, n1, first, last in regions:
            step, depth = known[first, last] or (0, 0)
            shape = max(largest, max(i for i, (rows, _) in enumerate(sizes) if rows >= m1 - m0 or i == 0))
            tiles = cuda._tiles(m0, m1, n0, n1, *sizes[shape], 0)
            tiles[:, 4:] = 0
            ops = np.broadcast_to(np.array([first, last], np.int32), (len(tiles), 2))
            rest = np.zeros((len(tiles), 2), np.int32)
            groups.setdefault((step, shape), []).append(np.hstack([tiles[:, :4], ops, rest]))
            levels[step, shape] = max(levels.get((step, shape), 0), depth)
        counts = {at: sum(map(len, found)) for at, found in groups.items()}
        # A wave takes as long as one tile, several small ones beside each other as long as one of their common size.
        cost = sum(_waves(counts[at], sizes[at[1]], sizes[0], sms) * COST[at[1]] for at in groups)
        if sum(counts.values()) >= OCCUPIED * sms and (best is None or cost < best[0]):
            best = cost, groups, levels
    if best is None:
        return None
    position = program.order.size + program.ops.size
    parts: list[Int32] = []
    launches: list[Whole] = []
    for (step, shape), found in best[1].items():
        tiles = np.concatenate(found)
        place = slice(position, position + tiles.size)
        position += tiles.size
        row = tuple(int(v) for v in program.steps[step, :5])
        launches.append(Whole(Launch(shape, row, place, len(tiles)), best[2][step, shape]))
        parts.append(tiles.ravel())
    return np.concatenate(parts), tuple(launches)


def _waves(count: int, size: tuple[int, int], largest: tuple[int, int], sms: int) -> float:
    """Time of ``count`` tiles of one size, in that of one of the largest on a multiprocessor."""
    beside = max(1, largest[0] * largest[1] // (size[0] * size[1]))
    full, rest = divmod(count, sms * beside)
    return full + -(-rest // sms) / beside


def chain_tiles(
    program: Program,
    sizes: list[tuple[int, int]],
    small: list[tuple[int, int]],
    is_bf16: bool,
    gpu: hardware.Gpu,
    sms: int,
) -> tuple[Int32, tuple[Batch, ...], int]:
    """Tiles of single chains and of their join, as the cuda engine's ``lay_out``, and the rows of CUDA cores' tiles.

    ``small``: sizes of the CUDA cores' tiles, that of the emulation's kernel for any step last.
    """
    kinds = [native_steps.instruction(row, is_bf16, gpu)[0] for row in program.steps]
    used = {kinds[int(step)] for _, step, *_ in program.ops[program.ops[:, 0] == Op.CHAIN]}
    rows = int((program.regions[:, 1] - program.regions[:, 0]).max(initial=0))
    *dots, plain = small
    last = plain if "plain" in used else min((d for d in dots if d[0] >= rows), default=max(dots))
    shapes = [*sizes[1:], last]  # the widest tile fills too few multiprocessors here
    flat, batches = cuda.lay_out(program, shapes, [kind in DEPTHS for kind in kinds], sms)
    moved = tuple(
        Batch(tuple(Launch(c.shape + 1, c.step, c.tiles, c.count) for c in b.chains), b.join, b.join_count, b.results)
        for b in batches
    )
    return flat, moved, 0 if "plain" in used else shapes[-1][0]
