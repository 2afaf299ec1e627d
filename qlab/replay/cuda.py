"""The CUDA engine: executes a program bit for bit on a GPU, whichever GPU's arithmetic it replays.

Each chain of a region is computed tile by tile into a buffer of fp32 results, so that the chains of one output run side by
side; a second kernel joins them by the region's program. Nothing uses a tensor core.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlab.errors import QlabError, UnsupportedError
from qlab.extension import cuda_module
from qlab.replay.program import MAX_DEPTH, Kind, Op, Program
from qlab.replay.step import MAX_FRACTION_BITS, MAX_TERMS

_cuda, _MISSING = cuda_module("run_chains", "the replay engine")

Int32 = NDArray[np.int32]
RESULTS = 1 << 27
"""fp32 results of chains held at once (512 MiB)."""
JOIN_ROWS, JOIN_COLUMNS = 8, 128
PLANS = 64
WORTH_SPLITTING = 2
"""The smallest shape that larger ones are split into so that there is work for every multiprocessor."""


def reason() -> str:
    """Why the engine cannot run here: one sentence, or an empty string when it can."""
    if _cuda is None:
        return _MISSING
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    return "" if capability >= (8, 0) else f"it needs compute capability 8.0 and this GPU has {capability[0]}.{capability[1]}"


def module() -> Any:
    """qlab._cuda. Raises UnsupportedError with the reason where it cannot run."""
    if missing := reason():
        raise UnsupportedError(f"the CUDA engine cannot run: {missing}")
    return _cuda


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
    """y [M, N] of a program for x [M, K], w [K, N], scales [G, N], int32 group [K] and bias [N], all on one GPU.

    The operands are fp16 or bf16, or their bits as int16 or uint16 with ``dtype`` saying which of the two they are; y is as x,
    or with ``raw`` float32: what the programs leave, not rounded to the dtype of x. Scales, group and bias may be empty where
    no step needs them. Outputs outside of the program's regions are zero.
    Raises UnsupportedError where the engine cannot run and QlabError for operands that do not fit the program.
    """
    engine = module()
    is_bf16 = _is_bf16(x, dtype)
    bits, group = checked(program, x, w, scales, group, bias)
    (m, k), n = x.shape, w.shape[1]
    with torch.cuda.device(x.device):
        engine.set_device(x.device.index)
        plan = _plan(program, m, k, n, is_bf16)
        kind = torch.float32 if raw else torch.int16
        y = (torch.empty if plan.covers else torch.zeros)((m, n), dtype=kind, device=x.device)
        parts = [bits[0], bits[1], plan.part(plan.order), bits[2], group, bits[3]]
        operands = engine.Operands(*(t.data_ptr() for t in parts), k, n, is_bf16)
        stream = torch.cuda.current_stream().cuda_stream
        results = torch.empty(max((b.results for b in plan.batches), default=0), dtype=torch.float32, device=x.device)
        for batch in plan.batches:
            for launch in batch.chains:
                tiles = plan.part(launch.tiles)
                step = engine.StepRow(*launch.step)
                engine.run_chains(launch.shape, operands, step, tiles.data_ptr(), launch.count, results.data_ptr(), stream)
            tiles, ops = plan.part(batch.join), plan.part(plan.ops)
            addresses = (ops.data_ptr(), tiles.data_ptr(), batch.join_count, results.data_ptr(), y.data_ptr())
            engine.run_join(operands, *addresses, raw, stream)
    return y if raw else y.view(x.dtype)


def checked(program: Program, x: Tensor, w: Tensor, scales: Tensor, group: Tensor, bias: Tensor) -> tuple[list[Tensor], Tensor]:
    """x, w, scales and bias, and group, as kernels take them. Raises QlabError where they do not fit the program."""
    bits = [_bits(name, t, x) for name, t in (("x", x), ("w", w), ("scales", scales), ("bias", bias))]
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise QlabError(f"x must be [M, K] and w [K, N], not {list(x.shape)} and {list(w.shape)}")
    (m, k), n = x.shape, w.shape[1]
    if max(m * k, k * n) >= 1 << 32:
        raise QlabError("the CUDA engine numbers elements with 32 bits; split x or w")
    group = group.to(device=x.device, dtype=torch.int32).contiguous()
    _check_operands(program, k, n, scales, group, bias)
    return bits, group


@dataclass(frozen=True)
class Launch:
    """Tiles of one step and one shape."""

    shape: int
    step: tuple[int, ...]
    tiles: slice
    count: int


@dataclass(frozen=True)
class Batch:
    """Regions whose results are held at once."""

    chains: tuple[Launch, ...]
    join: slice
    join_count: int
    results: int


@dataclass(frozen=True, eq=False)
class Plan:
    """A program cut into tiles, its arrays one after another on the GPU."""

    source: Program
    data: Tensor
    order: slice
    ops: slice
    batches: tuple[Batch, ...]
    covers: bool

    def part(self, place: slice) -> Tensor:
        return self.data[place]


_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


def _plan(program: Program, m: int, k: int, n: int, is_bf16: bool) -> Plan:
    """The plan of a program on the current device; programs that share their arrays and have equal regions share it."""
    arrays = (id(program.order), id(program.steps), id(program.ops), program.regions.tobytes())
    key = (arrays, m, k, n, is_bf16, torch.cuda.current_device())
    if key not in _plans:
        _plans[key] = _make_plan(program, m, k, n, is_bf16)
        if len(_plans) > PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return _plans[key]


def _make_plan(program: Program, m: int, k: int, n: int, is_bf16: bool) -> Plan:
    check_program(program, m, k, n)
    sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    fast = [bool(_cuda.is_fast(_cuda.StepRow(*(int(v) for v in s[:5])), is_bf16)) for s in program.steps]
    flat, batches = lay_out(program, _cuda.chain_tiles(), fast, sms)
    areas = (program.regions[:, 1] - program.regions[:, 0]) * (program.regions[:, 3] - program.regions[:, 2]).astype(np.int64)
    order, ops = slice(0, program.order.size), slice(program.order.size, program.order.size + program.ops.size)
    data = torch.from_numpy(np.concatenate([program.order.ravel(), program.ops.ravel(), flat])).cuda()
    return Plan(program, data, order, ops, batches, int(areas.sum()) == m * n)


def lay_out(program: Program, shapes: list[tuple[int, int]], fast: list[bool], sms: int) -> tuple[Int32, tuple[Batch, ...]]:
    """Every tile of a program and the batches that they are launched in; slices count behind ``order`` and ``ops``.

    ``shapes``: rows and columns of the kernels' tiles, the largest first and the one for any step last; ``fast``: which steps
    the others take; ``sms``: multiprocessors to fill.
    """
    largest = largest_shape(program, shapes, sms)
    parts: list[Int32] = []
    position = program.order.size + program.ops.size

    def append(tiles: list[Int32]) -> tuple[slice, int]:
        nonlocal position
        joined = np.concatenate(tiles)
        parts.append(joined.ravel())
        start, position = position, position + joined.size
        return slice(start, position), len(joined)

    batches: list[Batch] = []
    for bands in _batches(program):
        chains: dict[tuple[int, int], list[Int32]] = {}
        join: list[Int32] = []
        results = 0
        for band in bands:
            m0, m1, n0, n1, first, last = band
            columns, area = n1 - n0, (m1 - m0) * (n1 - n0)
            ops = program.ops[first:last]
            leaves = ops[ops[:, 0] == Op.CHAIN]
            for i, (_, step, start, stop) in enumerate(leaves.tolist()):
                shape = max(largest, choose_shape(m1 - m0, shapes)) if fast[step] else len(shapes) - 1
                tiles = _tiles(m0, m1, n0, n1, *shapes[shape], results + i * area)
                chain = np.broadcast_to(np.array([start, stop], np.int32), (len(tiles), 2))
                row_size = np.full((len(tiles), 1), columns, np.int32)
                chains.setdefault((step, shape), []).append(np.hstack([tiles[:, :4], chain, tiles[:, 4:], row_size]))
            tiles = _tiles(m0, m1, n0, n1, JOIN_ROWS, JOIN_COLUMNS, results)
            rest = np.broadcast_to(np.array([columns, area], np.int32), (len(tiles), 2))
            program_rows = np.broadcast_to(np.array([first, last], np.int32), (len(tiles), 2))
            join.append(np.hstack([tiles[:, :4], program_rows, tiles[:, 4:], rest]))
            results += area * len(leaves)
        launches = []
        for (step, shape), tiles_of in chains.items():
            place, count = append(tiles_of)
            launches.append(Launch(shape, tuple(int(v) for v in program.steps[step, :5]), place, count))
        place, count = append(join)
        batches.append(Batch(tuple(launches), place, count, results))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32), tuple(batches)


def choose_shape(rows: int, shapes: list[tuple[int, int]]) -> int:
    """The smallest fast tile that holds all rows, or the largest."""
    return max((i for i, (r, _) in enumerate(shapes[:-1]) if r >= rows), default=0)


def largest_shape(program: Program, shapes: list[tuple[int, int]], sms: int) -> int:
    """The largest tile of which a program has two for each multiprocessor; smaller ones cost more per product."""
    for i in range(WORTH_SPLITTING):
        rows, columns = shapes[i]
        r = program.regions.astype(np.int64)
        chains = np.array([(program.ops[a:b, 0] == Op.CHAIN).sum() for a, b in r[:, 4:]], np.int64)
        tiles = -(-(r[:, 1] - r[:, 0]) // rows) * -(-(r[:, 3] - r[:, 2]) // columns) * chains
        if int(tiles.sum()) >= 2 * sms:
            return i
    return WORTH_SPLITTING


def _tiles(m0: int, m1: int, n0: int, n1: int, rows: int, columns: int, results: int) -> Int32:
    """[T, 5]: m0, m1, n0, n1 of each tile and the place of its first result."""
    grid = np.meshgrid(np.arange(m0, m1, rows), np.arange(n0, n1, columns), indexing="ij")
    m, n = grid[0].ravel(), grid[1].ravel()
    place = results + (m - m0) * (n1 - n0) + n - n0
    return np.stack([m, np.minimum(m + rows, m1), n, np.minimum(n + columns, n1), place], axis=1).astype(np.int32)


def _batches(program: Program) -> Iterator[list[tuple[int, ...]]]:
    """Regions in bands of rows, as many at a time as RESULTS holds."""
    batch: list[tuple[int, ...]] = []
    held = 0
    for m0, m1, n0, n1, first, last in program.regions.tolist():
        if m0 >= m1 or n0 >= n1:
            continue
        row = (n1 - n0) * int((program.ops[first:last, 0] == Op.CHAIN).sum())
        height = max(1, RESULTS // row)
        for start in range(m0, m1, height):
            stop = min(start + height, m1)
            if batch and held + (stop - start) * row > RESULTS:
                yield batch
                batch, held = [], 0
            batch.append((start, stop, n0, n1, first, last))
            held += (stop - start) * row
    if batch:
        yield batch


def check_program(program: Program, m: int, k: int, n: int) -> None:
    """Raise QlabError for a program that would read or write outside of its operands."""
    order, steps, ops, regions = program.order, program.steps, program.ops, program.regions
    if order.size and (int(order.min()) < 0 or int(order.max()) >= k):
        raise QlabError(f"the program's order goes beyond K={k}")
    for kind, fraction_bits, terms, *_ in steps.tolist():
        if kind == Kind.TENSOR_CORE and not (1 <= terms <= MAX_TERMS and 0 <= fraction_bits <= MAX_FRACTION_BITS):
            raise QlabError(f"a step holds 1 to {MAX_TERMS} terms and 0 to {MAX_FRACTION_BITS} fraction bits")
    low, high = (regions[:, :4].min(axis=0), regions[:, :4].max(axis=0)) if len(regions) else (np.zeros(4), np.zeros(4))
    if low.min() < 0 or max(high[0], high[1]) > m or max(high[2], high[3]) > n:
        raise QlabError(f"the program's regions go beyond the output [{m}, {n}]")
    for first, last in {(int(r[4]), int(r[5])) for r in regions}:
        depth = 0
        for code, step, start, stop in ops[first:last].tolist():
            if code == Op.CHAIN:
                if not 0 <= step < len(steps) or not 0 <= start <= stop <= order.size:
                    raise QlabError("a chain of the program names a step or a slice that is not there")
                if (stop - start) % max(1, steps[step, 5]):
                    raise QlabError(f"a chain over {stop - start} k does not divide into steps of {steps[step, 5]}")
            depth += {Op.CHAIN: 1, Op.ADD: -1}.get(code, 0)
            if not 1 <= depth <= MAX_DEPTH:
                raise QlabError(f"the program needs a stack of {depth} values, and an engine has 1 to {MAX_DEPTH}")
        if depth != 1:
            raise QlabError(f"a region's program leaves {depth} values")


def _check_operands(program: Program, k: int, n: int, scales: Tensor, group: Tensor, bias: Tensor) -> None:
    codes, kinds = set(program.ops[:, 0].tolist()), set(program.steps[:, 0].tolist())
    scaled = bool(codes & {Op.SCALE, Op.SCALE_BIAS}) or Kind.HALF_DOT in kinds
    if scaled and (scales.ndim != 2 or scales.shape[0] < 1 or scales.shape[1] != n):
        raise QlabError(f"the program scales, and scales must be [G, {n}], not {list(scales.shape)}")
    if codes & {Op.BIAS, Op.SCALE_BIAS} and bias.shape != (n,):
        raise QlabError(f"the program adds a bias, which must be [{n}], not {list(bias.shape)}")
    if Kind.HALF_DOT in kinds:
        if group.shape != (k,):
            raise QlabError(f"the program scales groups of k, and group must be [{k}], not {list(group.shape)}")
        if k and (int(group.min()) < 0 or int(group.max()) >= scales.shape[0]):
            raise QlabError(f"group names rows beyond scales' {scales.shape[0]}")


def _is_bf16(x: Tensor, dtype: torch.dtype | None) -> bool:
    kind = dtype if dtype is not None else x.dtype
    if kind not in (torch.float16, torch.bfloat16):
        raise QlabError(f"x must be float16 or bfloat16, or its bits with dtype naming one of them, not {kind}")
    return kind == torch.bfloat16


def _bits(name: str, t: Tensor, x: Tensor) -> Tensor:
    if not t.is_cuda or t.device != x.device:
        raise QlabError(f"the operands must be on one GPU; x is on {x.device} and {name} on {t.device}")
    if t.dtype != x.dtype and t.numel():
        raise QlabError(f"the operands must be of one dtype; x is {x.dtype} and {name} {t.dtype}")
    return t.contiguous()
