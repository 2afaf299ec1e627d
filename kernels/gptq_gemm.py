"""GPTQ INT4 GEMM: ``y = x @ w`` with ``w[k, n] = RN((q[k, n] - z[g, n]) * s[g, n])``, ``g = g_idx[k]`` or ``k // group``.

Storage (AutoGPTQ's):
    x        [M, K] fp16 or bf16, rows of consecutive elements, any row stride
    qweight  int32 [K/8, N]: row k lies in int32 row k // 8, bits 4p to 4p+3 with p = k % 8
    qzeros   int32 [G, N/8]: column n lies in int32 n // 8, bits 4p to 4p+3 with p = n % 8; version 1 stores z - 1, so z is
             1 to 16, version 2 stores z, 0 to 15
    scales   [G, N] in x's dtype
    g_idx    int32 [K], the group of each row (act-order), or None where row k is in group k // group
    y        [M, N] in x's dtype
With act-order the rows stay where they are and each gathers its own zero point and scale.

Arithmetic: q - z is an exact integer, the product with s is rounded once to x's dtype. Products are added in fp32 by
``tl.dot``: BLOCK_K rows a step, k ascending, one accumulator per output; on a GPU one chain of tensor-core instructions of
16 k each, in Triton's interpreter numpy's dot of each BLOCK_K followed by one fp32 addition. The sum is rounded once to y.
The order is that of ``awq_gemm``, so both give the same bits for the same weight without act-order.

Split-K: slice s takes the contiguous rows [s * SPAN, (s + 1) * SPAN), SPAN a multiple of BLOCK_K, and writes its fp32 sum
to a workspace [S, M, N]; ``join_partials`` adds s = 0, 1, 2, ... in fp32 and rounds once. No atomics, so both repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from qlab.triton_kernels import launch
from qlab.triton_kernels.join_partials import join_partials
from qlab.triton_kernels.spec import Spec, Variant
from torch import Tensor

from qlab.errors import UnsupportedError

ZERO_OFFSET = {1: 1, 2: 0}


@triton.jit(do_not_specialize=["M", "K", "GROUP", "SPAN", "ZERO_OFFSET"])
def gptq_gemm_kernel(
    p_x,
    p_qweight,
    p_qzeros,
    p_scales,
    p_g_idx,
    p_out,
    M,
    N,
    K,
    GROUP,
    SPAN,
    ZERO_OFFSET,
    STRIDE_X,
    ACT_ORDER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_m, i_n, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BM]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    o_word = i_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)  # [BN/8]
    shift = 4 * tl.arange(0, 8)  # [8]
    m_m, m_n, m_word = o_m < M, o_n < N, o_word < N // 8

    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    k_end = tl.minimum(K, (i_s + 1) * SPAN)
    for k in range(i_s * SPAN, k_end, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)  # [BK]
        o_row = k // 8 + tl.arange(0, BLOCK_K // 8)  # [BK/8]
        m_k, m_row = o_k < K, o_row < K // 8
        b_x = tl.load(p_x + o_m[:, None] * STRIDE_X + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
        p_words = p_qweight + o_row[:, None].to(tl.int64) * N + o_n[None, :]
        words = tl.load(p_words, mask=m_row[:, None] & m_n[None, :], other=0)  # [BK/8, BN]
        q = tl.reshape((words[:, None, :] >> shift[None, :, None]) & 15, [BLOCK_K, BLOCK_N])

        if ACT_ORDER:
            g = tl.load(p_g_idx + o_k, mask=m_k, other=0)  # [BK]
            words = tl.load(p_qzeros + g[:, None] * (N // 8) + o_word[None, :], mask=m_word[None, :], other=0)  # [BK, BN/8]
            z = tl.reshape((words[:, :, None] >> shift[None, None, :]) & 15, [BLOCK_K, BLOCK_N])
            s = tl.load(p_scales + g[:, None] * N + o_n[None, :], mask=m_n[None, :], other=0.0)  # [BK, BN]
        else:
            g = k // GROUP
            words = tl.load(p_qzeros + g * (N // 8) + o_word, mask=m_word, other=0)  # [BN/8]
            z = tl.reshape((words[:, None] >> shift[None, :]) & 15, [BLOCK_N])[None, :]
            s = tl.load(p_scales + g * N + o_n, mask=m_n, other=0.0)[None, :]  # [1, BN]

        b_w = (q - (z + ZERO_OFFSET)).to(s.dtype) * s  # [BK, BN]
        if not EVEN_K:  # a row past K decodes to -z * s, which may be infinite: x's zero would not silence it
            b_w = tl.where(m_k[:, None], b_w, 0.0)
        acc = tl.dot(b_x, b_w, acc)

    p_y = p_out + i_s.to(tl.int64) * M * N + o_m[:, None] * N + o_n[None, :]
    tl.store(p_y, acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def gptq_gemm(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    version: int = 1,
    split_k: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] in x's dtype for x [M, K]; shapes as above. ``split_k`` 1 is the sequential order.

    ``version`` is the convention of the stored zero points. Every entry of ``g_idx`` must be below G; it is not checked
    here, for that would wait for the GPU. More slices than K has steps of BLOCK_K are reduced to as many as can be full.
    Raises UnsupportedError for any other shape, dtype, device or stride.
    """
    launch.check_scales(scales)
    launch.check_device(scales, gptq_gemm_kernel)
    (groups, n), k, device = scales.shape, 8 * qweight.shape[0], scales.device
    if version not in ZERO_OFFSET:
        raise UnsupportedError(f"GPTQ version {version} is unknown: use 1 (zero point stored minus one) or 2 (as it is)")
    launch.check_tensor("qweight", qweight, torch.int32, (k // 8, n), device)
    launch.check_tensor("qzeros", qzeros, torch.int32, (groups, n // 8), device)
    launch.check_tensor("scales", scales, scales.dtype, (groups, n), device)
    if g_idx is not None:
        launch.check_tensor("g_idx", g_idx, torch.int32, (k,), device)
    launch.check_x(x, k, scales.dtype, device)
    block_k = launch.block_k(k, groups)
    m = x.shape[0]
    out = launch.output(out, (m, n), x.dtype, device)
    if m == 0:
        return out
    count, span = launch.slices(k, split_k, block_k)
    target = out if count == 1 else torch.empty((count, m, n), dtype=torch.float32, device=device)
    block_m, block_n = launch.tile(m, n, gptq_gemm_kernel)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n), count)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        gptq_gemm_kernel[grid](
            x,
            qweight,
            qzeros,
            scales,
            qzeros if g_idx is None else g_idx,  # an unused pointer still needs a tensor
            target,
            m,
            n,
            k,
            k // groups,
            span,
            ZERO_OFFSET[version],
            x.stride(0),
            ACT_ORDER=g_idx is not None,
            EVEN_K=k % block_k == 0,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            **launch.OPTIONS,
        )
        return out if count == 1 else join_partials(target, out)


def _variants() -> tuple[Variant, ...]:
    integers = dict.fromkeys(("M", "N", "K", "GROUP", "SPAN", "ZERO_OFFSET", "STRIDE_X"), "i32")
    weight = ("p_qweight", "p_qzeros", "p_scales", "p_g_idx", "p_out")
    return tuple(
        Variant(
            f"{dtype} to {out}, m{block_m} k{block_k}{'' if even else ' tail'}{' act-order' if act_order else ''}, {label}",
            {
                "p_x": f"*{dtype}",
                "p_qweight": "*i32",
                "p_qzeros": "*i32",
                "p_scales": f"*{dtype}",
                "p_g_idx": "*i32",
                "p_out": f"*{out}",
                **integers,
            },
            {
                "ACT_ORDER": act_order,
                "EVEN_K": even,
                "BLOCK_M": block_m,
                "BLOCK_N": launch.BLOCK_N,
                "BLOCK_K": block_k,
            },
            aligned,
            launch.OPTIONS,
            tensor_core=launch.TENSOR_CORE[block_m],
        )
        for dtype in launch.DTYPES.values()
        for out in (dtype, "fp32")
        for block_m in launch.BLOCK_M_SIZES
        for block_k, even, act_order in (
            *((size, True, act_order) for size in launch.BLOCK_K_SIZES for act_order in (False, True)),
            (64, False, False),
        )
        for label, aligned in (("aligned", ("p_x", *weight, "N", "STRIDE_X")), ("ragged", weight))
    )


SPEC = Spec(
    name="gptq_gemm",
    kernel=gptq_gemm_kernel,
    layout="gptq",
    arithmetic="w = RN((q - z) * s); fp32, k ascending; split-K joined in fp32, s ascending; rounded once",
    variants=_variants(),
)
