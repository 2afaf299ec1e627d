"""Join the fp32 partial sums of split-K in a fixed order.

Maths: ``out[m, n] = RN(((P[0] + P[1]) + P[2]) + ...)``, S slices.
Storage: partials fp32 [S, M, N] and out [M, N] in fp16 or bf16, both row-major, taken as S and 1 rows of M*N elements.
Accumulation: fp32, round to nearest, s ascending from P[0]; rounded once to the output. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from qlab.triton_kernels.launch import DTYPES, OPTIONS, interpreted
from qlab.triton_kernels.spec import Spec, Variant
from torch import Tensor

BLOCK = 1024


@triton.jit
def join_partials_kernel(p_partials, p_out, SIZE, SLICES, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    total = tl.load(p_partials + o, mask=m, other=0.0)  # [BLOCK]
    for _ in range(1, SLICES):
        p_partials += SIZE
        total += tl.load(p_partials + o, mask=m, other=0.0)
    tl.store(p_out + o, total.to(p_out.dtype.element_ty), mask=m)


def join_partials(partials: Tensor, out: Tensor) -> Tensor:
    """Sum ``partials`` fp32 [S, M, N] over S into ``out`` [M, N], S at least 2 and M at least 1; returns ``out``."""
    size = out.numel()
    block = min(triton.next_power_of_2(size), 1 << 16) if interpreted(join_partials_kernel) else BLOCK
    grid = (triton.cdiv(size, block),)
    join_partials_kernel[grid](partials, out, size, partials.shape[0], BLOCK=block, **OPTIONS)
    return out


SPEC = Spec(
    name="join_partials",
    kernel=join_partials_kernel,
    layout="none",
    arithmetic="fp32 sum of the slices, s ascending, rounded once",
    variants=tuple(
        Variant(
            f"{dtype} {label}",
            {"p_partials": "*fp32", "p_out": f"*{dtype}", "SIZE": "i32", "SLICES": "i32"},
            {"BLOCK": BLOCK},
            aligned,
            OPTIONS,
        )
        for dtype in DTYPES.values()
        for label, aligned in (("aligned", ("p_partials", "p_out", "SIZE")), ("ragged", ("p_partials", "p_out")))
    ),
)
