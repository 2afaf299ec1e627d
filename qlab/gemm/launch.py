"""A plan on the GPU: checks x, gives each launch its memory and starts it on the current stream.

Nothing waits for the GPU and nothing is allocated outside PyTorch's allocator, so that calls can be captured in a CUDA graph;
the first call with a shape copies its plan to the GPU and must come before the capture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlab import hardware
from qlab.backends.registry import Problem
from qlab.errors import UnsupportedError
from qlab.extension import cuda_module
from qlab.gemm.plan import Launch, Plan
from qlab.gemm.tiles import Variant
from qlab.hardware import Gpu
from qlab.packing.fragments import block_words, scale_rows

_cuda, _MISSING = cuda_module("run_int4", "INT4 kernels")

ALIGNMENT, BOX = 16, 64
"""Bytes, and elements of a row; x is read so many at a time."""
COUNTERS, STREAM_COUNTERS = 1 << 20, 1 << 12
"""Counters zeroed at once, and a stream's. A captured call keeps its own, since graphs may be replayed side by side."""


def reason() -> str:
    """Why the kernels' code cannot run here: one sentence, or an empty string when it can."""
    if _MISSING:
        return _MISSING
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA GPU"


@cache
def version() -> str:
    """The compiled module by its sha256; empty where it is missing."""
    if _MISSING:
        return ""
    return f"qlab._cuda sha256 {hashlib.sha256(Path(_cuda.__file__).read_bytes()).hexdigest()[:12]}"


@cache
def variants() -> tuple[Variant, ...]:
    """The compiled variants. Raises UnsupportedError with the reason where there are none."""
    if why := reason():
        raise UnsupportedError(f"the INT4 kernels cannot run: {why}")
    return tuple(Variant(*row) for row in _cuda.int4_variants())


@lru_cache(maxsize=16)
def gpu(device: int) -> Gpu:
    """What qlab knows of a CUDA device. Raises UnsupportedError where it has no tensor cores."""
    with torch.cuda.device(device):
        found = hardware.detect()
    if found is None:
        raise UnsupportedError(f"the INT4 kernels cannot run: CUDA device {device} has no tensor cores")
    return found


@dataclass(frozen=True, eq=False)
class Loaded:
    """A plan on one device. It is never freed: captured graphs hold the addresses of its tensors."""

    plan: Plan
    launches: tuple[tuple[Launch, Tensor, Tensor], ...]
    """Each with its pieces and starts."""


Planner = Callable[[Problem, Gpu, tuple[Variant, ...]], Plan]


@cache
def loaded(planner: Planner, problem: Problem, device: int) -> Loaded:
    """The plan that ``planner`` makes of a problem, on a CUDA device; made once. Raises UnsupportedError while capturing."""
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(f"a call with M={problem.M} was captured in a CUDA graph before it was made once: make it first")
    plan = planner(problem, gpu(device), variants())
    on = torch.device("cuda", device)
    parts = ((torch.from_numpy(x.pieces).to(on), torch.from_numpy(x.starts).to(on)) for x in plan.launches)
    return Loaded(plan, tuple((x, *part) for x, part in zip(plan.launches, parts, strict=True)))


def run(x: Tensor, tensors: Mapping[str, Tensor], problem: Problem, planner: Planner, *, overlap: bool = True) -> Tensor:
    """y [M, N] for x [M, K] and a weight in the ``fragments`` layout (``blocks``, ``column_scales``, ``perm``).

    ``problem`` is the weight's, with M = 0; ``planner`` makes a plan for an M and is hashable. ``overlap``: whether a launch
    may load the weight while the kernel before it still runs, where the GPU can; that kernel must not write it. Raises
    UnsupportedError for an x that does not fit the weight and where the kernels cannot run.
    """
    check_x(x, problem, tensors["blocks"].device)
    m = x.shape[0]
    if m == 0:
        return x.new_empty((0, problem.N))
    device = x.device.index
    with torch.cuda.device(device):
        ready = loaded(planner, _rows(problem, m), device)
        perm = tensors["perm"]
        x = x.index_select(1, perm) if perm.numel() else readable(x)
        if problem.K % BOX:
            x = pad(x, (0, -problem.K % BOX))
        y = torch.empty((m, problem.N), dtype=x.dtype, device=x.device)
        stream = torch.cuda.current_stream().cuda_stream
        early = overlap and gpu(device).capability >= (9, 0)
        rows = scale_rows(problem.K, problem.group_size)
        fixed = (
            *(m, problem.N, problem.K, block_words(rows, problem.symmetric), rows),
            *(x.dtype == torch.bfloat16, not problem.symmetric, ready.plan.integer),
        )
        stride = x.stride(0) if m > 1 else x.shape[1]
        _cuda.set_device(device)
        for launch, pieces, starts in ready.launches:
            workspace = torch.empty(launch.workspace, dtype=torch.float32, device=x.device)
            counters = _counters(launch.counters, device, stream)
            memory = (tensors["blocks"], tensors["column_scales"], y, workspace, counters, pieces, starts)
            operands = _cuda.Int4(x.data_ptr(), stride, *(t.data_ptr() for t in memory), *fixed)
            closed = launch.slices, launch.slice_rows, launch.variant.columns
            how = _cuda.Int4Launch(launch.blocks, launch.cut, launch.cluster, *closed, int(launch.join), early, stream)
            _cuda.run_int4(launch.variant.number, operands, how)
    return y


def written(blocks: Tensor) -> Tensor:
    """``blocks``, once the GPU has written them: later launches load a weight before the kernels ahead of them have ended."""
    if blocks.is_cuda:
        torch.cuda.current_stream(blocks.device).synchronize()
    return blocks


def check_x(x: Tensor, problem: Problem, device: torch.device) -> None:
    """Raise UnsupportedError unless x is [M, K] of the weight's dtype on its device, with rows of consecutive elements."""
    if x.ndim != 2 or x.shape[1] != problem.K:
        raise UnsupportedError(f"x must be [M, {problem.K}], not {list(x.shape)}")
    if x.dtype != problem.dtype:
        raise UnsupportedError(f"x is {x.dtype} and the weight was packed for {problem.dtype}: cast x")
    if x.device != device:
        raise UnsupportedError(f"x is on {x.device} and the weight on {device}: move x")
    if x.stride(1) != 1:
        raise UnsupportedError(f"x has a last stride of {x.stride(1)}; it must be 1: call x.contiguous()")


def readable(x: Tensor) -> Tensor:
    """x, or a copy of it where its rows do not all begin at 16 bytes, or overlap."""
    in_place = x.shape[0] == 1 or (x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % ALIGNMENT == 0)
    return x if in_place and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=4096)
def _rows(problem: Problem, m: int) -> Problem:
    return replace(problem, M=m)


class _Pool:
    """Zeroed counters of one device: a stretch for each stream, and one for each captured call."""

    def __init__(self, device: int) -> None:
        self.device = torch.device("cuda", device)
        self.none = torch.empty(0, dtype=torch.int32, device=self.device)
        self.streams: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []
        """Every tensor that a stretch was cut from: graphs hold addresses in them."""
        self.free = 0

    def take(self, count: int) -> Tensor:
        """A stretch of zeros that nobody else gets."""
        if not self.kept or self.free + count > len(self.kept[-1]):
            if torch.cuda.is_current_stream_capturing():  # of the graph's own memory, zeroed at every replay
                return torch.zeros(count, dtype=torch.int32, device=self.device)
            fresh = torch.zeros(max(count, COUNTERS), dtype=torch.int32, device=self.device)
            torch.cuda.current_stream().synchronize()  # other streams will take stretches of it
            self.kept.append(fresh)
            self.free = 0
        start, self.free = self.free, self.free + -(-count // 32) * 32
        return self.kept[-1][start : start + count]


@cache
def _pool(device: int) -> _Pool:
    return _Pool(device)


def _counters(count: int, device: int, stream: int) -> Tensor:
    """``count`` counters, int32 zeros. Kernels leave them zero, so that calls on one stream share theirs."""
    pool = _pool(device)
    if count == 0:
        return pool.none
    if torch.cuda.is_current_stream_capturing():
        return pool.take(count)
    held = pool.streams.get(stream)
    if held is None or len(held) < count:
        held = pool.streams[stream] = pool.take(max(count, STREAM_COUNTERS))
    return held
