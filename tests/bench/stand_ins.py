"""Kernels that answer with a replay of their recipe, on the CPU: what the scripts that need a GPU are tested with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlab.backends.registry import YES, Kernel, Packed, Problem, Support, kernel
from qlab.hardware import Gpu, gpu
from qlab.recipes import recipe
from qlab.replay import replay
from qlab.weights import Int4Weight

H100 = gpu("h100")


class StandIn(Kernel):
    """The kernel ``name`` as its recipe says it computes on ``on``; ``flip`` changes one bit of its first output."""

    def __init__(self, name: str, on: Gpu = H100, *, flip: bool = False, error: str = "") -> None:
        self.real, self.name, self.on, self.flip, self.error = kernel(name), name, on, flip, error
        self.layout, self.source = self.real.layout, self.real.source

    def refusal(self, problem: Problem, capability: tuple[int, int]) -> str:
        return self.real.refusal(problem, capability)

    def supports(self, problem: Problem, device: torch.device) -> Support:
        reason = self.refusal(problem, self.on.capability)
        return Support(False, reason) if reason else YES

    def pack(self, weight: Int4Weight) -> Packed:
        return Packed({"weight": weight}, Problem.of(weight, 0))  # type: ignore[dict-item]

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        return self.answer(packed, x, None)

    def answer(self, packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.error:
            raise RuntimeError(self.error)
        problem = replace(packed.problem, M=len(x), bias=bias is not None)
        y = replay(recipe(self.name, problem, self.on), x, packed.tensors["weight"], bias, seed=1)  # type: ignore[arg-type]
        if self.flip:
            y.view(torch.int16)[0, 0] ^= 1
        return y


def call(kernel: Kernel, packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """In place of ``bench.problems.call``."""
    assert isinstance(kernel, StandIn)
    return kernel.answer(packed, x, bias)
