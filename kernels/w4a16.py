"""INT4 GEMM on tensor cores that take the weight from registers: ``y = x @ w``, computed as ``y^T = w^T x^T``.

``w[k, n] = RN((q[k, n] - z[g, n]) * s[g, n])``, ``g = k // group``; an act-order weight comes with its rows sorted by group and
x with its columns in the same order.

Storage (qlab.packing.wgmma_rows), T = ceil(N/64) tiles of 64 columns, B = ceil(K/128) blocks of rows:
    x        [M, K] fp16 or bf16, rows of consecutive elements, K and the row stride multiples of 8, 16-byte aligned
    codes    int32 [T, B, 64, 16]: the 128 rows of one column in 64 consecutive bytes. Bits of the row k within a block, from
             the lowest: i0, c (two), C, B, A, i1; the code is in int32 4c + 2 i1 + A, nibble 2B + C + 4 i0
    scales   [T, S, 64, R], R scales of a column in a block: 1, 2 or 4; S = B, or for R = 1 one for each group. fp16 or bf16 for
             a symmetric weight (z = 8), else int32: the scale in the low half, -(1024 + z) or -(128 + z) in the high half
    y        [M, N] in x's dtype
Thread 4r + c of a warp reads with one 16-byte load what it holds of column r in the left operand of eight tensor-core
instructions: of each 16 rows those numbered 2c, 2c + 1, 2c + 8 and 2c + 9. Codes become numbers in registers: a code in the low
bits of 1024 (bf16: 128) is 1024 + q, from which 1024 + z is subtracted exactly; the product with s is rounded once.

Arithmetic: products are added in fp32 by ``tl.dot``, 128 rows a step, k ascending, one accumulator per output: one chain of
tensor-core instructions of 16 k each (wgmma on sm_90, 16 consecutive k), in Triton's interpreter numpy's dot. With SLICES > 1
slice s takes the blocks [s * SPAN, (s + 1) * SPAN) and writes its fp32 sum to a workspace; the last thread block of a tile to
finish, as a counter tells, adds s = 0, 1, 2, ... in fp32. The sum is rounded once to y. Counters are zero before and after.
"""

from __future__ import annotations

import triton
import triton.language as tl
from qlab.triton_kernels.launch import DTYPES
from qlab.triton_kernels.spec import Spec, Variant

BLOCK_K = 128
"""Rows of one block of the storage and of one step."""
GROUP_M = tl.constexpr(8)
"""Tiles along M that run side by side, so that they share the weight in L2."""


# Two int32 of codes, $8 and $9 (A = 0 and 1), to $0 to $7, each two weights; $10 and $12 hold their scales in the low half and,
# unless the weight is symmetric, -(1024 + z) or -(128 + z) in the high half. In fp16 nibbles 1 and 3 stay where they are, which
# makes 1024 + 16 q; times 1/16, less 64 + z. bf16 has no bits for that, and before sm_90 no instruction but fma: d * 1 - z and
# d * s + -0 round as difference and product do.
def _asm(body: str, eight: int, symmetric: bool) -> tl.constexpr:
    text = ".reg .b32 t, s0, s1, z0, z1, h0, h1, one, minus;"
    for a, word in ((0, "$10"), (1, "$12")):
        text += f"prmt.b32 s{a}, {word}, {word}, 0x1010;"
        text += f"mov.b32 z{a}, {eight};" if symmetric else f"prmt.b32 z{a}, {word}, {word}, 0x3232;"
    return tl.constexpr(f"{{{text}{body}}}")


def _fp16(symmetric: bool) -> tl.constexpr:
    body = "mov.b32 one, 0x63806380;" + "".join(f"add.rn.f16x2 h{a}, z{a}, one;" for a in (0, 1)) + "mov.b32 one, 0x2c002c00;"
    for j in range(8):
        a, nibble, word = j // 4, j % 4, f"${8 + j // 4}"
        body += f"shr.u32 t, {word}, 8;" if nibble == 2 else ""
        mask = "0x00f000f0" if nibble % 2 else "0x000f000f"
        body += f"lop3.b32 ${j}, {'t' if nibble > 1 else word}, {mask}, 0x64006400, 0xea;"
        body += f"fma.rn.f16x2 ${j}, ${j}, one, h{a};" if nibble % 2 else f"add.rn.f16x2 ${j}, ${j}, z{a};"
        body += f"mul.rn.f16x2 ${j}, ${j}, s{a};"
    return _asm(body, 0xE408E408, symmetric)


def _bf16(symmetric: bool) -> tl.constexpr:
    body = "mov.b32 one, 0x3f803f80; mov.b32 minus, 0x80008000;"
    for j in range(8):
        a, nibble, word = j // 4, j % 4, f"${8 + j // 4}"
        body += f"shr.u32 t, {word}, {4 * nibble};" if nibble else ""
        body += f"lop3.b32 ${j}, {'t' if nibble else word}, 0x000f000f, 0x43004300, 0xea;"
        body += f"fma.rn.bf16x2 ${j}, ${j}, one, z{a}; fma.rn.bf16x2 ${j}, ${j}, s{a}, minus;"
    return _asm(body, 0xC308C308, symmetric)


_FP16_EIGHT, _FP16_ZEROS, _BF16_EIGHT, _BF16_ZEROS = _fp16(True), _fp16(False), _bf16(True), _bf16(False)
_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r")


@triton.jit
def _nibbles(words, j: tl.constexpr):
    """[BN, 8] to [BN, 16]: nibbles j and j + 4 side by side."""
    low, high = (words >> (4 * j)) & 15, (words >> (4 * j + 16)) & 15
    return tl.reshape(tl.join(low, high), [words.shape[0], 16])


@triton.jit
def _decoded(words, scales0, scales1, SYMMETRIC: tl.constexpr, PLAIN: tl.constexpr, d: tl.constexpr):
    """Eight [BN, 16] of w: the j-th, j = 4A + 2B + C, has in place (n, 4c + 2 i1 + i0) what int32 (n, 4c + 2 i1 + A) holds.

    scales0, scales1: for A = 0 and 1, int32 [BN, 16] alike for i0 = 0 and 1, or [BN, 1].
    """
    if PLAIN:  # in integers, for the interpreter
        even, odd = tl.split(tl.reshape(words, [words.shape[0], 8, 2]))
        s0 = (scales0 & 0xFFFF).to(tl.int16).to(d, bitcast=True)
        s1 = (scales1 & 0xFFFF).to(tl.int16).to(d, bitcast=True)
        z0, z1 = (8, 8) if SYMMETRIC else ((scales0 >> 16) & 31, (scales1 >> 16) & 31)
        a0, a1 = (_nibbles(even, 0) - z0).to(d) * s0, (_nibbles(even, 1) - z0).to(d) * s0
        a2, a3 = (_nibbles(even, 2) - z0).to(d) * s0, (_nibbles(even, 3) - z0).to(d) * s0
        a4, a5 = (_nibbles(odd, 0) - z1).to(d) * s1, (_nibbles(odd, 1) - z1).to(d) * s1
        a6, a7 = (_nibbles(odd, 2) - z1).to(d) * s1, (_nibbles(odd, 3) - z1).to(d) * s1
    else:
        if SYMMETRIC:
            asm: tl.constexpr = _FP16_EIGHT if d == tl.float16 else _BF16_EIGHT
        else:
            asm: tl.constexpr = _FP16_ZEROS if d == tl.float16 else _BF16_ZEROS
        a0, a1, a2, a3, a4, a5, a6, a7 = tl.inline_asm_elementwise(
            asm, _REGISTERS, [words, scales0, scales1], (d.value,) * 8, True, 2
        )
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def weights(words, scales, SYMMETRIC: tl.constexpr, PLAIN: tl.constexpr, DTYPE: tl.constexpr):
    """w^T [BN, 128] of one block from its words [BN, 16] and its scales: int32 [BN, R], or [BN/2, R] of a symmetric weight.

    The compiler carries the layout of the dot's operand up to the loads, through what needs no exchange between threads.
    """
    n: tl.constexpr = words.shape[0]
    R: tl.constexpr = scales.shape[1]
    if SYMMETRIC:  # columns r and r + 8 of each 16 share an int32
        scales = tl.reshape(tl.join(scales, scales >> 16), [n // 16, 8, R, 2])
        scales = tl.reshape(tl.permute(scales, [0, 3, 1, 2]), [n, R])
    if R == 4:
        s0, s1 = tl.split(tl.reshape(scales, [n, 2, 2]))
    else:
        s0, s1 = scales, scales
    if R > 1:  # one for each i1
        s0 = tl.reshape(tl.broadcast_to(s0[:, None, :, None], [n, 4, 2, 2]), [n, 16])
        s1 = tl.reshape(tl.broadcast_to(s1[:, None, :, None], [n, 4, 2, 2]), [n, 16])
    d0, d1, d2, d3, d4, d5, d6, d7 = _decoded(words, s0, s1, SYMMETRIC, PLAIN, DTYPE)
    w = tl.join(tl.join(tl.join(d0, d4), tl.join(d2, d6)), tl.join(tl.join(d1, d5), tl.join(d3, d7)))  # ... A B C
    w = tl.permute(tl.reshape(w, [n, 4, 2, 2, 2, 2, 2]), [0, 2, 4, 5, 6, 1, 3])  # n c i1 i0 A B C to n i1 A B C c i0
    return tl.reshape(w, [n, 128])


@triton.jit(do_not_specialize=["M", "N8", "K8", "STRIDE8", "TILES", "BLOCKS", "SPAN", "SCALE_ROWS"])
def w4a16_kernel(
    p_x,
    p_codes,
    p_scales,
    p_y,
    p_partials,
    p_counters,
    M,
    N8,
    K8,
    STRIDE8,
    TILES,
    BLOCKS,
    SPAN,
    SCALE_ROWS,
    SLICES: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    R: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    EVEN_K: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dtype: tl.constexpr = p_x.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N8 * 8, BLOCK_N)
    i_tile, i_s = tl.program_id(0), tl.program_id(1)
    band = i_tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - band, GROUP_M)
    i_m = band + i_tile % (GROUP_M * tiles_n) % height
    i_n = i_tile % (GROUP_M * tiles_n) // height

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    o_k = tl.arange(0, 128)
    o_word = tl.arange(0, 16)
    m_m, m_n = o_m < M, o_n < N8 * 8
    tile, row = tl.minimum(o_n // 64, TILES - 1).to(tl.int64), o_n % 64  # columns beyond the storage read its last tile
    first, last = i_s * SPAN, tl.minimum(BLOCKS, (i_s + 1) * SPAN)

    p_words = p_codes + ((tile * BLOCKS + first) * 1024 + row * 16)[:, None] + o_word[None, :]
    p_row = p_x + (o_m.to(tl.int64) * (STRIDE8 * 8))[:, None] + o_k[None, :]
    PAIRED: tl.constexpr = 2 if SYMMETRIC else 1
    o_scale = i_n * (BLOCK_N // PAIRED) + tl.arange(0, BLOCK_N // PAIRED)
    o_scale = tl.minimum(o_scale // (64 // PAIRED), TILES - 1) * SCALE_ROWS * (64 // PAIRED) + o_scale % (64 // PAIRED)
    p_scale = p_scales + o_scale.to(tl.int64)[:, None] * R + tl.arange(0, R)[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(first, last):
        words = tl.load(p_words, eviction_policy="evict_first")  # [BN, 16]
        m_x = m_m[:, None]
        if not EVEN_K:
            m_x = m_x & (block * 128 + o_k < K8 * 8)[None, :]
        b_x = tl.load(p_row + block * 128, mask=m_x, other=0.0)  # [BM, 128]
        scale_row = block // GROUP_BLOCKS if GROUP_BLOCKS > 0 else 0
        scales = tl.load(p_scale + scale_row * (64 // PAIRED * R))
        w = weights(words, scales, SYMMETRIC, PLAIN, dtype)
        acc = tl.dot(w, tl.trans(b_x), acc)
        # Left in flight, wgmma would read w from registers that the next step already fills: ptxas does not look beyond one
        # step. A sum that something uses is waited for, once a step.
        if not PLAIN:
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], tl.float32, True, 1)
        p_words += 1024

    acc = tl.trans(acc)  # [BM, BN]
    p_out = p_y + (o_m.to(tl.int64) * (N8 * 8))[:, None] + o_n[None, :]
    m_out = m_m[:, None] & m_n[None, :]
    if SLICES == 1:
        tl.store(p_out, acc.to(dtype), mask=m_out)
    else:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        o_sum = (tl.arange(0, BLOCK_M) * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
        p_sum = p_partials + (i_tile * SLICES).to(tl.int64) * SIZE + o_sum
        tl.store(p_sum + i_s * SIZE, acc, mask=m_m[:, None])
        tl.debug_barrier()  # every thread's part is written before one thread says so
        arrived = tl.atomic_add(p_counters + i_tile, 1, sem="acq_rel")
        if arrived == SLICES - 1:
            total = tl.load(p_sum, mask=m_m[:, None], other=0.0, cache_modifier=".cg")
            if SIZE <= 4096:
                for s in tl.static_range(1, SLICES):
                    total += tl.load(p_sum + s * SIZE, mask=m_m[:, None], other=0.0, cache_modifier=".cg")
            else:
                for s in range(1, SLICES):
                    total += tl.load(p_sum + s * SIZE, mask=m_m[:, None], other=0.0, cache_modifier=".cg")
            tl.store(p_out, total.to(dtype), mask=m_out)
            tl.store(p_counters + i_tile, 0)


def _variants() -> tuple[Variant, ...]:
    """What the launcher can pass: with the smallest tile symmetric and not, every R, with and without slices and the end of a
    ragged K; with the others the least and the most that a thread has to hold.
    """
    some = ((True, 1, 4, True), (False, 4, 4, True), (False, 1, 1, False))  # symmetric, R, slices, even K
    every = (*((s, r, 4, True) for s in (True, False) for r in (1, 2, 4)), (False, 1, 1, True), (True, 1, 1, False))
    integers = dict.fromkeys(("M", "N8", "K8", "STRIDE8", "TILES", "BLOCKS", "SPAN", "SCALE_ROWS"), "i32")
    return tuple(
        Variant(
            f"{dtype} m{block_m} n{block_n}, {_kind(symmetric, r)}, {slices} slices{'' if even else ' tail'}",
            {
                "p_x": f"*{dtype}",
                "p_codes": "*i32",
                "p_scales": "*i32",
                "p_y": f"*{dtype}",
                "p_partials": "*fp32",
                "p_counters": "*i32",
                **integers,
            },
            {
                "SLICES": slices,
                "GROUP_BLOCKS": 1,
                "R": r,
                "SYMMETRIC": symmetric,
                "EVEN_K": even,
                "PLAIN": False,
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
            },
            ("p_x", "p_codes", "p_scales", "p_y", "p_partials", "p_counters"),
            {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
            architectures=(80, 90, 100) if block_n == 64 else (90,),
            k_width={80: 4 if symmetric or EVERY_JOIN else 2},
            tensor_core={90: "wgmma", 100: "tcgen05"},
            spills=SPILLS.get((block_m, slices > 1), 0),
        )
        for dtype in DTYPES.values()
        for block_m, block_n, warps, stages in TILES
        for symmetric, r, slices, even in (every if (block_m, block_n) == (16, 64) else some)
    )


def _kind(symmetric: bool, r: int) -> str:
    return f"{'symmetric' if symmetric else 'zero points'} R{r}"


EVERY_JOIN = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Whether the compiler deals k to mma.sync by kWidth 4 for every weight that was joined, or for symmetric ones alone."""
SPILLS = {(256, True): 24}
"""Bytes that a thread spills, by BLOCK_M and whether there are slices: addresses of the workspace, outside the loop over K."""
TILES = (
    (16, 64, 4, 4),
    (64, 64, 4, 3),
    (16, 128, 4, 4),
    (32, 128, 4, 4),
    (64, 128, 8, 4),
    (128, 128, 8, 3),
    (256, 128, 8, 3),
)
"""BLOCK_M, BLOCK_N, warps and stages that are compiled ahead, to be looked at: with 64 columns for every GPU, for without wgmma
the launcher takes no others, with 128 for Hopper."""
SPEC = Spec(
    name="w4a16",
    kernel=w4a16_kernel,
    layout="wgmma_rows",
    arithmetic="w = RN((q - z) * s); fp32, k ascending; slices joined in fp32, s ascending; rounded once",
    variants=_variants(),
)
