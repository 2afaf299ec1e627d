"""INT4 dequantisation from the storage of ``w4a16``: ``w^T[n, k] = RN((q[k, n] - z[g, n]) * s[g, n])``, ``g = k // group``.

Storage: as in w4a16.py; w^T [N, K] in the dtype of the scales. Rows stay sorted by group under act-order.

Arithmetic: q - z is exact, the product with s is rounded once, to nearest even. Nothing is summed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from qlab.triton_kernels import launch
from qlab.triton_kernels.spec import Spec, Variant
from qlab.triton_kernels.w4a16 import BLOCK_K, weights
from qlab.triton_kernels.w4a16_launch import Layer
from torch import Tensor

BLOCK_N = 64
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["N", "K", "BLOCKS", "SCALE_ROWS"])
def w4a16_dequantize_kernel(
    p_codes,
    p_scales,
    p_w,
    N,
    K,
    BLOCKS,
    SCALE_ROWS,
    GROUP_BLOCKS: tl.constexpr,
    R: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN_K: tl.constexpr,
    PLAIN: tl.constexpr,
):
    i_k, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_row, o_k = tl.arange(0, 64), tl.arange(0, 128)
    o_n = i_n * 64 + o_row
    PAIRED: tl.constexpr = 2 if SYMMETRIC else 1
    scale_row = i_k // GROUP_BLOCKS if GROUP_BLOCKS > 0 else 0
    p_words = p_codes + (i_n * BLOCKS + i_k) * 1024 + (o_row * 16)[:, None] + tl.arange(0, 16)[None, :]
    p_scale = p_scales + (i_n * SCALE_ROWS + scale_row) * (64 // PAIRED * R)
    o_scale = (tl.arange(0, 64 // PAIRED) * R)[:, None] + tl.arange(0, R)[None, :]
    w = weights(tl.load(p_words), tl.load(p_scale + o_scale), SYMMETRIC, PLAIN, p_w.dtype.element_ty)  # [64, 128]
    m_w = (o_n < N)[:, None]
    if EVEN_K:
        p_row = p_w + (o_n * (K // 128 * 128))[:, None]  # rows known to be 16-byte aligned
    else:
        p_row = p_w + (o_n * K)[:, None]
        m_w = m_w & (i_k * 128 + o_k < K)[None, :]
    tl.store(p_row + i_k * 128 + o_k[None, :], w, mask=m_w)


def w4a16_dequantize(codes: Tensor, scales: Tensor, layer: Layer, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """w^T [N, K] in ``dtype``, that of the scales."""
    launch.check_device(torch.empty(0, dtype=dtype, device=codes.device), w4a16_dequantize_kernel)
    out = launch.output(out, (layer.n, layer.k), dtype, codes.device)
    tiles, blocks = codes.shape[:2]
    with torch.cuda.device_of(codes):  # Triton launches on the current device, wherever the tensors are
        w4a16_dequantize_kernel[blocks, tiles](
            codes,
            scales,
            out,
            layer.n,
            layer.k,
            blocks,
            scales.shape[1],
            GROUP_BLOCKS=layer.group_blocks,
            R=scales.shape[3],
            SYMMETRIC=layer.symmetric,
            EVEN_K=layer.k % BLOCK_K == 0,
            PLAIN=launch.interpreted(w4a16_dequantize_kernel),
            **OPTIONS,
        )
    return out


SPEC = Spec(
    name="w4a16_dequantize",
    kernel=w4a16_dequantize_kernel,
    layout="wgmma_rows",
    arithmetic="w = RN((q - z) * s)",
    variants=tuple(
        Variant(
            f"{dtype} R{r} {'symmetric' if symmetric else 'zero points'}{'' if even else ' tail'}",
            {
                "p_codes": "*i32",
                "p_scales": "*i32",
                "p_w": f"*{dtype}",
                **dict.fromkeys(("N", "K", "BLOCKS", "SCALE_ROWS"), "i32"),
            },
            {"GROUP_BLOCKS": 1, "R": r, "SYMMETRIC": symmetric, "EVEN_K": even, "PLAIN": False},
            ("p_codes", "p_scales", "p_w"),
            OPTIONS,
            architectures=(80, 90, 100),
        )
        for dtype in launch.DTYPES.values()
        for symmetric in (True, False)
        for r, even in ((1, True), (1, False), (2, True), (4, True))
    ),
)
