"""One tensor-core instruction of this machine's GPU on given bits: what the replayed step is proved against."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qlab.errors import QlabError, UnsupportedError
from qlab.hardware import Step
from qlab.replay import cuda

Shape = Literal["m16n8k16", "m16n8k8"]
Accumulator = Literal["fp32", "fp16"]
DEPTHS: dict[Shape, int] = {"m16n8k16": 16, "m16n8k8": 8}


def mma(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    shape: Shape = "m16n8k16",
    accumulator: Accumulator = "fp32",
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """d = a @ b + c by ``mma.sync`` for a batch of tiles, on bits: as c, on c's GPU.

    ``a`` [R, 16, K] and ``b`` [R, K, 8]: int16 or uint16 bits of ``dtype``, K 16 or 8 as ``shape`` says; ``c`` [R, 16, 8]:
    int32 or uint32 bits of fp32, or 16-bit ones for ``accumulator`` fp16, which takes fp16 inputs only.
    """
    _check(a, b, c, shape, accumulator, dtype)
    with torch.cuda.device(c.device):
        cuda.module().set_device(c.device.index)
        a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
        d = torch.empty_like(c)
        addresses = (a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        cuda.module().run_mma(DEPTHS[shape], dtype == torch.bfloat16, accumulator == "fp16", *addresses, len(a), stream)
    return d


def replayed(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    step: Step,
    shape: Shape = "m16n8k16",
    accumulator: Accumulator = "fp32",
    dtype: torch.dtype = torch.float16,
    fast: bool = True,
) -> tuple[Tensor, int]:
    """The same by the CUDA replay engine's arithmetic for any ``step``, and how many fused sums took its fast form."""
    _check(a, b, c, shape, accumulator, dtype)
    half, k = accumulator == "fp16", DEPTHS[shape]
    zero = step.zero_exponent_fp16 if half else step.zero_exponent
    with torch.cuda.device(c.device):
        cuda.module().set_device(c.device.index)
        a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
        d, count = torch.empty_like(c), torch.zeros(1, dtype=torch.int64, device=c.device)
        row = cuda.module().StepRow(0, step.fraction_bits, step.terms, zero, int(half))
        addresses = (a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), count.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        cuda.module().run_replayed_mma(k, row, dtype == torch.bfloat16, fast, *addresses, len(a), stream)
        return d, int(count)


def _check(a: Tensor, b: Tensor, c: Tensor, shape: Shape, accumulator: Accumulator, dtype: torch.dtype) -> None:
    if missing := cuda.reason():
        raise UnsupportedError(f"the probe cannot run: {missing}")
    if shape not in DEPTHS or accumulator not in ("fp32", "fp16") or dtype not in (torch.float16, torch.bfloat16):
        raise QlabError(f"no probe of {shape} with {accumulator} accumulators for {dtype}")
    if accumulator == "fp16" and dtype != torch.float16:
        raise QlabError("fp16 accumulators take float16 inputs only")
    k, rows = DEPTHS[shape], len(a)
    sizes = {"a": (a, (rows, 16, k), 2), "b": (b, (rows, k, 8), 2), "c": (c, (rows, 16, 8), 4 if accumulator == "fp32" else 2)}
    for name, (t, size, width) in sizes.items():
        if t.shape != size or t.element_size() != width or t.device != c.device or not t.is_cuda:
            found = f"{list(t.shape)} {t.dtype} on {t.device}"
            raise QlabError(f"{name} must be {list(size)} of {width} bytes on c's GPU, not {found}")
