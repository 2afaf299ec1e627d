"""The rules that every launcher here shares: checks, tiles, and where split-K cuts.

Tiles follow fixed rules and are never tuned: a tuned BLOCK_K or split would change the order of summation from one machine
to the next. BLOCK_M and BLOCK_N change no order, so the interpreter takes them as large as it can.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from qlab.errors import UnsupportedError

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
BLOCK_M_SIZES = (16, 64)
TENSOR_CORE: dict[int, dict[int, str]] = {16: {}, 64: {90: "wgmma"}}
"""By BLOCK_M and architecture the tensor-core instruction that the compiler takes, where that is not mma.sync."""
BLOCK_N = 64
BLOCK_K_SIZES = (32, 64)
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` was decorated under TRITON_INTERPRET=1, and so runs on the CPU."""
    return isinstance(kernel, InterpretedFunction)


def block_k(k: int, groups: int) -> int:
    """Rows of one step: the larger of 32 and 64 that divides the group, so that a step has one scale per column.

    64 for a whole column, whose tail is masked. (128 would spill registers.) Raises UnsupportedError for a group that is
    neither a multiple of 32 nor the whole column, and for groups that do not divide K.
    """
    if k == 0 or k % groups:
        raise UnsupportedError(f"K={k} must be a positive multiple of the {groups} groups that the scales have")
    group = k // groups
    if groups == 1:
        return BLOCK_K_SIZES[-1]
    for size in reversed(BLOCK_K_SIZES):
        if group % size == 0:
            return size
    raise UnsupportedError(f"a group has {group} rows: it must be a multiple of 32 or the whole column")


def tile(m: int, n: int, kernel: Any) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) for m rows and n columns."""
    if interpreted(kernel):
        return min(triton.next_power_of_2(m), 256), min(triton.next_power_of_2(n), 2048)
    return BLOCK_M_SIZES[0] if m <= BLOCK_M_SIZES[0] else BLOCK_M_SIZES[1], BLOCK_N


def split_count(k: int) -> int:
    """The rule for split-K: one slice for each full 128 rows, at most 8."""
    return max(1, min(8, k // 128))


def slices(k: int, split_k: int, step: int) -> tuple[int, int]:
    """(count, rows) of the contiguous slices that ``split_k`` asks for: whole steps each, none of them empty."""
    if split_k < 1:
        raise UnsupportedError(f"split_k={split_k}: the number of slices must be 1 or more")
    rows = triton.cdiv(triton.cdiv(k, split_k), step) * step
    return triton.cdiv(k, rows), rows


def check_device(tensor: Tensor, kernel: Any) -> None:
    """Raise UnsupportedError where ``kernel`` cannot read ``tensor``: no GPU, or bf16 in the interpreter."""
    if interpreted(kernel):
        if tensor.dtype == torch.bfloat16:
            raise UnsupportedError("bfloat16: Triton's interpreter computes it wrongly; use float16 or a GPU")
    elif tensor.device.type != "cuda":
        raise UnsupportedError(
            f"tensors on {tensor.device}: compiled Triton kernels need a CUDA GPU; set TRITON_INTERPRET=1 before Python starts"
        )


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise UnsupportedError unless ``tensor`` is contiguous, of that dtype and shape, on that device."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise UnsupportedError(f"{name} must be {_kind(dtype, shape)}, not {_kind(tensor.dtype, tuple(tensor.shape))}")
    if tensor.device != device:
        raise UnsupportedError(f"{name} is on {tensor.device} and the other tensors on {device}: move it")
    if not tensor.is_contiguous():
        raise UnsupportedError(f"{name} must be contiguous; its strides are {tensor.stride()}")


def check_scales(scales: Tensor) -> None:
    """Raise UnsupportedError unless ``scales`` is fp16 or bf16 [G, N], not empty, N a multiple of 8."""
    if scales.dtype not in DTYPES or scales.ndim != 2 or scales.shape[1] % 8 or not scales.numel():
        raise UnsupportedError(
            f"scales must be float16 or bfloat16 [G, N] with N a multiple of 8, not {_kind(scales.dtype, tuple(scales.shape))}"
        )


def check_x(x: Tensor, k: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise UnsupportedError unless x is ``dtype`` [M, k] on ``device`` with rows of consecutive elements (any row stride)."""
    if x.ndim != 2 or x.shape[1] != k:
        raise UnsupportedError(f"x must be [M, {k}], not {list(x.shape)}")
    if x.dtype != dtype:
        raise UnsupportedError(f"x is {x.dtype} and the scales are {dtype}: cast x")
    if x.device != device:
        raise UnsupportedError(f"x is on {x.device} and the weight on {device}: move x")
    if x.stride(1) != 1:
        raise UnsupportedError(f"x has a last stride of {x.stride(1)}; it must be 1: call x.contiguous()")


def output(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``out`` after a check, or a new tensor."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check_tensor("out", out, dtype, shape, device)
    return out


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
