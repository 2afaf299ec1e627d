"""AWQ INT4 dequantisation: ``w[k, n] = RN((q[k, n] - z[g, n]) * s[g, n])``, ``g = k // group``.

Storage (AutoAWQ's gemm order):
    qweight  int32 [K, N/8]: column n lies in int32 n // 8, bits 4p to 4p+3 with p = [0, 4, 1, 5, 2, 6, 3, 7][n % 8]
    qzeros   int32 [G, N/8], the same order; the true zero point, 0 to 15
    scales   [G, N] fp16 or bf16
    w        [K, N] in the dtype of the scales

Arithmetic: q - z is an exact integer; the product with s is rounded once, to nearest even. Nothing is summed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from qlab.triton_kernels import launch
from qlab.triton_kernels.spec import Spec, Variant
from torch import Tensor


@triton.jit(do_not_specialize=["K", "GROUP"])
def awq_dequantize_kernel(
    p_qweight,
    p_qzeros,
    p_scales,
    p_w,
    N,
    K,
    GROUP,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_k, i_n = tl.program_id(0), tl.program_id(1)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    o_word = i_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)  # [BN/8]
    o_column = tl.arange(0, 8)
    shift = 4 * (o_column // 2 + 4 * (o_column % 2))  # [8]
    m_k, m_n, m_word = o_k < K, o_n < N, o_word < N // 8

    p_words = p_qweight + o_k[:, None].to(tl.int64) * (N // 8) + o_word[None, :]
    words = tl.load(p_words, mask=m_k[:, None] & m_word[None, :], other=0)  # [BK, BN/8]
    q = tl.reshape((words[:, :, None] >> shift[None, None, :]) & 15, [BLOCK_K, BLOCK_N])

    g = i_k * BLOCK_K // GROUP
    words = tl.load(p_qzeros + g * (N // 8) + o_word, mask=m_word, other=0)  # [BN/8]
    z = tl.reshape((words[:, None] >> shift[None, :]) & 15, [BLOCK_N])
    s = tl.load(p_scales + g * N + o_n, mask=m_n, other=0.0)  # [BN]

    b_w = (q - z[None, :]).to(s.dtype) * s[None, :]  # [BK, BN]
    tl.store(p_w + o_k[:, None].to(tl.int64) * N + o_n[None, :], b_w, mask=m_k[:, None] & m_n[None, :])


def awq_dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, out: Tensor | None = None) -> Tensor:
    """w [K, N] in the scales' dtype; shapes as above. Raises UnsupportedError for any other shape, dtype or device."""
    launch.check_scales(scales)
    launch.check_device(scales, awq_dequantize_kernel)
    (groups, n), k, device = scales.shape, qweight.shape[0], scales.device
    launch.check_tensor("qweight", qweight, torch.int32, (k, n // 8), device)
    launch.check_tensor("qzeros", qzeros, torch.int32, (groups, n // 8), device)
    launch.check_tensor("scales", scales, scales.dtype, (groups, n), device)
    block_k = launch.block_k(k, groups)
    out = launch.output(out, (k, n), scales.dtype, device)
    block_n = launch.tile(1, n, awq_dequantize_kernel)[1]
    grid = (triton.cdiv(k, block_k), triton.cdiv(n, block_n))
    with torch.cuda.device_of(qweight):  # Triton launches on the current device, wherever the tensors are
        awq_dequantize_kernel[grid](
            qweight, qzeros, scales, out, n, k, k // groups, BLOCK_N=block_n, BLOCK_K=block_k, **launch.OPTIONS
        )
    return out


SPEC = Spec(
    name="awq_dequantize",
    kernel=awq_dequantize_kernel,
    layout="awq",
    arithmetic="w = RN((q - z) * s)",
    variants=tuple(
        Variant(
            f"{dtype} k{block_k}, {label}",
            {
                "p_qweight": "*i32",
                "p_qzeros": "*i32",
                "p_scales": f"*{dtype}",
                "p_w": f"*{dtype}",
                **dict.fromkeys(("N", "K", "GROUP"), "i32"),
            },
            {"BLOCK_N": launch.BLOCK_N, "BLOCK_K": block_k},
            ("p_qweight", "p_qzeros", "p_scales", "p_w", *integers),
            launch.OPTIONS,
        )
        for dtype in launch.DTYPES.values()
        for block_k in launch.BLOCK_K_SIZES
        for label, integers in (("aligned", ("N",)), ("ragged", ()))
    ),
)
