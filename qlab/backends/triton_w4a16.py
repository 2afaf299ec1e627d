"""qlab's Triton INT4 GEMM of its own storage (qlab.packing.wgmma_rows) in the registry, fused and through memory."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

from qlab import hardware
from qlab.backends.registry import Packed, Problem, register
from qlab.backends.triton import TritonKernel, launchers
from qlab.packing import wgmma_rows
from qlab.recipes import tuned
from qlab.weights import Int4Weight

ELSEWHERE = "h200"
"""The GPU whose table the interpreter reads."""


class WgmmaRows(TritonKernel):
    """What both kernels of the layout share: it holds every weight."""

    layout = "wgmma_rows"

    def cannot_hold(self, problem: Problem) -> str:
        return ""

    def pack(self, weight: Int4Weight) -> Packed:
        t = wgmma_rows.pack(weight)
        return Packed({"codes": t.codes, "scales": t.scales, "perm": t.perm}, Problem.of(weight, 0))


class W4A16(WgmmaRows):
    """Tensor cores take the decoded weight from registers; slices of K are joined by the last thread block of a tile."""

    name = "triton.w4a16"
    note = "as many slices as are fastest; fp32 sums of slices of K, joined in fp32 in order, rounded once"

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        p = packed.problem
        return self.run_as(x, packed, tuned.choice(self.name, gpu_key(x.device), len(x), p.K, p.N))

    def run_as(self, x: Tensor, packed: Packed, choice: tuned.Choice, *, compile_only: bool = False) -> Tensor:
        """y by a choice that is not the table's, or the kernel compiled for it alone: for a tuner, and for tests."""
        code, p, t = _code(), packed.problem, packed.tensors
        launchers().check_x(x, p.K, p.dtype, t["codes"].device)
        ordered, tile = _ordered(x, t["perm"]), config(choice, len(x), p.N)
        sliced = {"slices": choice.slices, "config": tile, "compile_only": compile_only}
        return code.w4a16(ordered, t["codes"], t["scales"], _layer(packed), **sliced)


class W4A16Dequantize(WgmmaRows):
    """The weight decoded to memory, then PyTorch's matmul: for many rows of x."""

    name = "triton.w4a16.dequantize"
    note = "decodes to memory, then torch.matmul"

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        p, t = packed.problem, packed.tensors
        launchers().check_x(x, p.K, p.dtype, t["codes"].device)
        w = _code().w4a16_dequantize(t["codes"], t["scales"], _layer(packed), p.dtype)
        return _ordered(x, t["perm"]) @ w.t()


def config(choice: tuned.Choice, m: int, n: int) -> object:
    """The tile of the table's choice, or None where it names none or the interpreter runs, which takes large ones."""
    code = _code()
    if not choice.config or code.interpreted:
        return None
    usual = code.default_config(m, n)
    return code.Config(*(int(choice.get(name, getattr(usual, name))) for name in ("block_m", "block_n", "warps", "stages")))


@lru_cache(maxsize=16)
def gpu_key(device: torch.device) -> str:
    """The GPU's key in qlab.hardware."""
    if device.type != "cuda":
        return ELSEWHERE
    with torch.cuda.device(device):
        found = hardware.detect()
    return found.key if found else ELSEWHERE


def _ordered(x: Tensor, perm: Tensor) -> Tensor:
    """x with its columns as the weight's rows are sorted."""
    return x.index_select(1, perm) if perm.numel() else x


def _layer(packed: Packed) -> object:
    p = packed.problem
    return _code().Layer(p.K, p.N, p.group_size, p.symmetric)


@lru_cache(maxsize=1)
def _code() -> SimpleNamespace:
    """The launchers, imported after the interpreter was chosen or not."""
    interpreted = launchers().interpreted
    from qlab.triton_kernels import w4a16_dequantize, w4a16_launch

    return SimpleNamespace(
        w4a16=w4a16_launch.w4a16,
        Layer=w4a16_launch.Layer,
        Config=w4a16_launch.Config,
        default_config=w4a16_launch.default_config,
        w4a16_dequantize=w4a16_dequantize.w4a16_dequantize,
        interpreted=interpreted,
    )


for _kernel in (W4A16(), W4A16Dequantize()):
    register(_kernel)
