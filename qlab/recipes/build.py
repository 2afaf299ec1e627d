"""The builds whose arithmetic recipes describe, and what all recipes need to name it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlab.hardware import Gpu
from qlab.recipe import Type

_TYPES: dict[torch.dtype, Type] = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Build:
    """The code that runs: what a compiler or another version would change without any change of the source's formula."""

    vllm: str = "0.20.2"
    """Version of vLLM's extension."""
    triton: str = "3.6.0"
    ptxas: str = "13.0"
    """CUDA version of ptxas, which compiles Triton's PTX, or of the driver that compiles Marlin's."""
    target: str = ""
    """Machine code that a Triton kernel is compiled for, e.g. ``sm_90``; empty for the GPU's own."""

    def capability(self, gpu: Gpu) -> tuple[int, int]:
        """Compute capability of the machine code that runs on ``gpu``."""
        if not self.target:
            return gpu.capability
        digits = self.target.removeprefix("sm_").rstrip("af")
        return int(digits[:-1]), int(digits[-1])


DEFAULT = Build()


def type_name(dtype: torch.dtype) -> Type:
    """``fp16`` for torch.float16, and so on."""
    return _TYPES[dtype]
