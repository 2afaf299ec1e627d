"""What a kernel file says about itself, as data: enough to compile every specialisation it launches, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One specialisation of a ``@triton.jit`` kernel: the types and constants that its launcher can pass."""

    label: str
    signature: Mapping[str, str]
    """Run-time arguments in order, by Triton's type names: ``*fp16``, ``*i32``, ``i32``."""
    constants: Mapping[str, int]
    aligned: tuple[str, ...]
    """Arguments known to be multiples of 16 (bytes for a pointer)."""
    options: Mapping[str, int]
    """Compiler options, as the launcher passes them."""
    architectures: tuple[int, ...] = (80, 90)
    """Compute capabilities, times ten, that it is compiled for."""
    k_width: Mapping[int, int] = field(default_factory=dict)
    """By architecture, how many neighbouring k a thread holds of an operand of the tensor cores, where that is not 2."""
    tensor_core: Mapping[int, str] = field(default_factory=dict)
    """By architecture, the tensor-core instruction that it is meant for, where that is not ``mma``: ``wgmma``, ``tcgen05``."""
    spills: int = 0
    """Bytes of registers that a thread spills at most."""


@dataclass(frozen=True)
class Spec:
    """A kernel, the storage it reads and the arithmetic it promises."""

    name: str
    kernel: Any
    layout: str
    """Module of qlab.packing that writes its storage, or ``none``."""
    arithmetic: str
    """One line: rounding of the weights, order and type of the sums."""
    variants: tuple[Variant, ...]
