"""Launches ``w4a16``: checks its operands, cuts the output into tiles, keeps the workspace of split-K.

A configuration is given with each call and never searched for: slices of K decide the bits, tiles the speed alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
from qlab.triton_kernels import launch
from qlab.triton_kernels.w4a16 import BLOCK_K, w4a16_kernel
from torch import Tensor

from qlab.errors import UnsupportedError

COUNTERS, STREAM_COUNTERS = 1 << 20, 1 << 12
"""Counters allocated together, and those of a stream, at least."""


@dataclass(frozen=True)
class Config:
    """What a thread block computes, and how."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Layer:
    """What the storage of a weight does not say itself."""

    k: int
    n: int
    group_size: int
    symmetric: bool

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.k, BLOCK_K)

    @property
    def group_blocks(self) -> int:
        """Blocks of rows to a row of scales; 0 where there is one row of scales for all."""
        if self.group_size == self.k:
            return 0
        return max(1, self.group_size // BLOCK_K) if self.group_size % BLOCK_K == 0 else 1


class Counters:
    """int32 zeros of one device, which kernels leave zero: a stretch for each stream, and one for each captured call.

    Calls on one stream do not overlap, so that they share theirs; a graph may be replayed on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []
        """What stretches were cut from: graphs hold addresses in them."""
        self.free = 0

    def take(self, count: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32)
        if torch.cuda.is_current_stream_capturing():
            if self.kept and self.free + count <= len(self.kept[-1]):
                return self._cut(count)
            return torch.zeros(count, dtype=torch.int32, device=self.device)  # of the graph, zeroed at every replay
        if not self.kept or self.free + count > 3 * len(self.kept[-1]) // 4:  # what is left is for calls that are captured
            self.kept.append(torch.zeros(max(4 * count, COUNTERS), dtype=torch.int32, device=self.device))
            self.free = 0
            torch.cuda.current_stream(self.device).synchronize()  # other streams will take stretches of it
        stream = torch.cuda.current_stream(self.device).cuda_stream
        held = self.streams.get(stream)
        if held is None or len(held) < count:
            held = self.streams[stream] = self._cut(max(count, STREAM_COUNTERS))
        return held

    def _cut(self, count: int) -> Tensor:
        """A stretch that nobody else gets."""
        start, self.free = self.free, self.free + triton.cdiv(count, 32) * 32
        return self.kept[-1][start : start + count]


@cache
def _counters(device: torch.device) -> Counters:
    return Counters(device)


def default_config(m: int, n: int, wgmma: bool = True) -> Config:
    """Without a table. Where there is no wgmma the weight goes through shared memory, and tiles are small."""
    if not wgmma:
        return Config(16, 64, 4, 4) if m <= 16 else Config(64, 64, 4, 3)
    if m <= 16:
        return Config(16, 128 if n >= 8192 else 64, 4, 4)
    if m <= 64:
        return Config(32 if m <= 32 else 64, 128, 4 if m <= 32 else 8, 4)
    return Config(128, 128, 8, 3) if m <= 128 else Config(256, 128, 8, 3)


@cache
def _wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def w4a16(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    layer: Layer,
    *,
    slices: int = 1,
    config: Config | None = None,
    out: Tensor | None = None,
    compile_only: bool = False,
) -> Tensor:
    """y [M, N] in x's dtype for x [M, K], whose columns are in the order of the weight's rows.

    ``slices`` contiguous slices of K, multiples of 128 rows but for the last; fewer where some would be empty.
    ``compile_only`` leaves y as it is. Raises
    UnsupportedError for any other shape, dtype, device or stride.
    """
    launch.check_device(x, w4a16_kernel)
    launch.check_x(x, layer.k, x.dtype, codes.device)
    if x.dtype not in launch.DTYPES or layer.n % 8 or slices < 1:
        what = f"x is {x.dtype}, N={layer.n}, slices={slices}"
        raise UnsupportedError(f"{what}: x must be fp16 or bf16, N a multiple of 8, slices 1 or more")
    tiles, blocks = codes.shape[:2]
    m = x.shape[0]
    out = launch.output(out, (m, layer.n), x.dtype, x.device)
    if m == 0:
        return out
    plain = launch.interpreted(w4a16_kernel)
    config = config or (_interpreted(m, layer.n) if plain else default_config(m, layer.n, _wgmma(x.device)))
    x = readable(x)
    span = triton.cdiv(blocks, slices)
    slices = triton.cdiv(blocks, span)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(layer.n, config.block_n), slices)
    partials, counters = out, out
    if slices > 1:
        size = grid[0] * slices * config.block_m * config.block_n
        partials, counters = torch.empty(size, dtype=torch.float32, device=x.device), _counters(x.device).take(grid[0])
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        run = partial(w4a16_kernel.warmup, grid=grid) if compile_only else w4a16_kernel[grid]
        run(
            x,
            codes,
            scales,
            out,
            partials,
            counters,
            m,
            layer.n // 8,
            triton.cdiv(layer.k, 8),
            x.stride(0) // 8,
            tiles,
            blocks,
            span,
            scales.shape[1],
            SLICES=slices,
            GROUP_BLOCKS=layer.group_blocks,
            R=scales.shape[3],
            SYMMETRIC=layer.symmetric,
            EVEN_K=layer.k % BLOCK_K == 0,
            PLAIN=plain,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=False,
        )
    return out


def readable(x: Tensor) -> Tensor:
    """x where the kernel can read it in place, rows of a multiple of 8 elements, 16-byte aligned; otherwise a copy, padded."""
    m, k = x.shape
    if k % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(0) >= k and x.data_ptr() % 16 == 0:
        return x
    copy = x.new_zeros(m, triton.cdiv(k, 8) * 8)
    copy[:, :k] = x
    return copy


def _interpreted(m: int, n: int) -> Config:
    """Tiles as large as the interpreter can: each program costs it the same."""
    return Config(max(16, min(triton.next_power_of_2(m), 256)), max(64, min(triton.next_power_of_2(n), 2048)), 4, 1)
