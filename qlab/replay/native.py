"""The compiled CPU engine: a program over the bits of x and of the decoded weight, on all cores (csrc/replay.hpp)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qlab.errors import QlabError, UnsupportedError
from qlab.replay import step
from qlab.replay.program import Program
from qlab.replay.step import Bits16, Bits32

Int32 = NDArray[np.int32]
Isa = Literal["auto", "portable", "avx2", "avx512"]


def reason() -> str:
    """Why the engine cannot run here: one sentence, or an empty string when it can."""
    if step.native_reason() or hasattr(step._native, "execute"):
        return step.native_reason()
    return "qlab's compiled module is older than its sources; `pip install -e .` in the repository builds it again"


def isas() -> tuple[str, ...]:
    """Instruction sets that the engine can use on this processor, the fastest first; none where it cannot run."""
    return () if reason() else tuple(step._native.isas())


def run(
    program: Program,
    x: Bits16,
    w: Bits16,
    scales: Bits16,
    group: Int32,
    bias: Bits16,
    *,
    bf16: bool = False,
    threads: int = 0,
    isa: Isa = "auto",
) -> Bits16:
    """y uint16 [M, N], bits; zero where the program has no region. The arguments are those of :func:`execute`."""
    y = np.zeros((x.shape[0], w.shape[1]), np.uint16)
    arrays = (program.order, program.steps, program.ops, program.regions)
    execute(x, w, scales, group, bias, *arrays, bf16, y, threads=threads, isa=isa)
    return y


def execute(
    x: Bits16,
    w: Bits16,
    scales: Bits16,
    group: Int32,
    bias: Bits16,
    order: Int32,
    steps: Int32,
    ops: Int32,
    regions: Int32,
    bf16: bool,
    y: Bits16 | Bits32,
    *,
    threads: int = 0,
    isa: Isa = "auto",
) -> None:
    """Writes the outputs of a program's regions into y [M, N]: uint16, bits of the dtype of x, or uint32, bits of fp32.

    ``x`` [M, K], ``w`` [K, N], ``scales`` [G, N] (G may be 0) and ``bias`` [N] or [0]: uint16, bits of fp16, or of bf16 with
    ``bf16``; ``group`` int32 [K] or [0]; ``order``, ``steps``, ``ops`` and ``regions`` as in :class:`Program`, whose regions
    must not overlap. A uint32 ``y`` takes what the programs leave as it is, not rounded to the dtype of x. ``threads`` 0 takes
    every core. Neither ``threads`` nor ``isa`` changes a bit. Raises QlabError for arrays or programs that do not fit together,
    UnsupportedError where the engine is missing.
    """
    if missing := reason():
        raise UnsupportedError(missing)
    halves = {"x": x, "w": w, "scales": scales, "bias": bias, "y": y}
    integers = {"group": group, "order": order, "steps": steps, "ops": ops, "regions": regions}
    for name, array in (halves | integers).items():
        kind = "int32" if name in integers else "uint32" if name == "y" and array.dtype == np.uint32 else "uint16"
        if array.dtype != kind:
            raise QlabError(f"{name} must be {kind}, not {array.dtype}")
    if not (y.flags.c_contiguous and y.flags.writeable):
        raise QlabError("y must be contiguous and writeable")
    a = {name: np.ascontiguousarray(array) for name, array in (halves | integers).items() if name != "y"}
    try:
        step._native.execute(**a, bf16=bf16, y=y, threads=threads, isa=isa)
    except ValueError as error:
        raise QlabError(f"replay program refused: {error}") from None
