// The `fragments` layout (qlab/packing/fragments.py) on the device: pieces of work, and how a thread decodes its codes.
//
// A block holds 64 columns and 128 rows of K: codes, scales, zero points. One word is a thread's part of one 16 x 16 operand A
// of a tensor core, columns of the weight along its rows: nibbles 0 and 4 are register 0, nibbles 2 and 6 register 1, nibbles
// 1 and 5 register 2, nibbles 3 and 7 register 3. Registers 0 and 2 belong to the column lane / 4 of the 16, 1 and 3 to the
// column 8 further.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef __CUDACC__
#include "int4_instructions.cuh"
#endif

namespace qlab::int4 {

constexpr int kBlockColumns = 64, kBlockRows = 128, kCodeWords = 1024;
constexpr int kChunk = 32;  // rows of K that one warp takes at a time: two steps of 16

// One output tile over a contiguous range of K (qlab/gemm/plan.py).
struct Piece {
    int row, rows, column, k_begin, k_end, tile, first, place;  // place: rank * 65536 + count

    __device__ int rank() const { return place >> 16; }
    __device__ int count() const { return place & 0xffff; }
};

// Who joins the pieces of a tile: the thread block that comes last; all of them, each some of the sums, where every thread block has
// one piece; or the one with the first rows of K, for which it is the last piece, and which keeps its sums in registers. Those who
// wait for others need them to run side by side.
enum class Join : int { kLast, kShared, kFirst };

struct Arguments {
    const std::uint16_t* x;
    long long x_stride;
    const std::uint32_t* blocks;
    const std::uint16_t* column_scales;
    std::uint16_t* y;
    float* workspace;
    int* counters;
    const Piece* pieces;
    const int* starts;
    int slices, slice_rows, tile_columns;  // where a thread block's piece follows from its number (piece_of); slice_rows 0: nowhere
    int m, n, k;
    int block_words, group_rows;  // words of a block; rows of scales in it
    int cut;                      // rows of K after which a thread block begins a new chain; 0: never
    int cluster;                  // thread blocks whose pieces make one tile, in the order of joining; 1: joined by workspace
    Join join;
    bool has_zeros, integer;
};

// Slice b % slices of the column tile b / slices, of all rows of x: known before any memory is read.
__device__ __forceinline__ Piece piece_of(const Arguments& a, int i) {
    if (a.slice_rows == 0) return a.pieces[i];
    const int tile = i / a.slices, rank = i - tile * a.slices, k = rank * a.slice_rows;
    return {0, a.m, tile * a.tile_columns, k, min(k + a.slice_rows, a.k), tile, tile * a.slices, rank << 16 | a.slices};
}

__device__ __forceinline__ int first_piece(const Arguments& a) { return a.slice_rows ? blockIdx.x : a.starts[blockIdx.x]; }
__device__ __forceinline__ int behind_pieces(const Arguments& a) { return a.slice_rows ? blockIdx.x + 1 : a.starts[blockIdx.x + 1]; }

struct Fp16 {
    using Pair = __half2;
    static constexpr bool kIsBf16 = false;
    static constexpr std::uint32_t kMagicByte = 0x64646464u, kOnes = 0x3c003c00u;  // 0x6400 | q is 1024 + q

    static __device__ Pair pair(std::uint32_t bits) { return reinterpret_cast<const __half2&>(bits); }
    static __device__ std::uint32_t bits(Pair p) { return reinterpret_cast<const std::uint32_t&>(p); }
    static __device__ std::uint16_t rounded(float v) { return __half_as_ushort(__float2half_rn(v)); }
    static __device__ std::uint16_t product(std::uint16_t a, std::uint16_t b) {
        return __half_as_ushort(__hmul(__ushort_as_half(a), __ushort_as_half(b)));
    }
};

struct Bf16 {
    using Pair = __nv_bfloat162;
    static constexpr bool kIsBf16 = true;
    static constexpr std::uint32_t kMagicByte = 0x43434343u, kOnes = 0x3f803f80u;  // 0x4300 | q is 128 + q

    static __device__ Pair pair(std::uint32_t bits) { return reinterpret_cast<const __nv_bfloat162&>(bits); }
    static __device__ std::uint32_t bits(Pair p) { return reinterpret_cast<const std::uint32_t&>(p); }
    static __device__ std::uint16_t rounded(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
    static __device__ std::uint16_t product(std::uint16_t a, std::uint16_t b) {
        return __bfloat16_as_ushort(__hmul(__ushort_as_bfloat16(a), __ushort_as_bfloat16(b)));
    }
};

// Scale and zero point of a thread's two columns, each twice in a word; the zero point with the magic number added.
struct Group {
    std::uint32_t scale[2], zero[2];

    // From the pairs of a layout's row: of each 16 columns, r and r + 8 lie side by side.
    template <class T>
    __device__ void set(std::uint32_t scales, std::uint32_t zeros, const Arguments& a) {
        const std::uint32_t s = a.integer ? T::kOnes : scales, z = a.has_zeros ? zeros : 0x0808u;
        scale[0] = __byte_perm(s, s, 0x1010);
        scale[1] = __byte_perm(s, s, 0x3232);
        zero[0] = __byte_perm(z, T::kMagicByte, 0x4040);
        zero[1] = __byte_perm(z, T::kMagicByte, 0x4141);
    }
};

// RN((q - z) * s) of one word: q - z is exact, the product is rounded once. A scale of one leaves the integer.
__device__ __forceinline__ void decode(Fp16, std::uint32_t word, const Group& g, std::uint32_t (&a)[4]) {
    const std::uint32_t low = 0x000f000fu, high = 0x00f000f0u, magic = 0x64006400u, later = word >> 8;
    const __half2 sixteenth = Fp16::pair(0x2c002c00u), middle = Fp16::pair(0x63806380u);  // 1/16, 960
    const __half2 z0 = Fp16::pair(g.zero[0]), z1 = Fp16::pair(g.zero[1]);
    const __half2 s0 = Fp16::pair(g.scale[0]), s1 = Fp16::pair(g.scale[1]);
    // A high nibble is 1024 + 16 q; a sixteenth of it less 64 + z is exact as well.
    const __half2 h0 = __hsub2(middle, z0), h1 = __hsub2(middle, z1);
    a[0] = Fp16::bits(__hmul2(__hsub2(Fp16::pair(and_or(word, low, magic)), z0), s0));
    a[1] = Fp16::bits(__hmul2(__hsub2(Fp16::pair(and_or(later, low, magic)), z1), s1));
    a[2] = Fp16::bits(__hmul2(__hfma2(Fp16::pair(and_or(word, high, magic)), sixteenth, h0), s0));
    a[3] = Fp16::bits(__hmul2(__hfma2(Fp16::pair(and_or(later, high, magic)), sixteenth, h1), s1));
}

__device__ __forceinline__ void decode(Bf16, std::uint32_t word, const Group& g, std::uint32_t (&a)[4]) {
    const std::uint32_t low = 0x000f000fu, magic = 0x43004300u;
    const auto value = [&](int shift, int column) {
        const __nv_bfloat162 q = Bf16::pair(and_or(word >> shift, low, magic));
        return Bf16::bits(__hmul2(__hsub2(q, Bf16::pair(g.zero[column])), Bf16::pair(g.scale[column])));
    };
    a[0] = value(0, 0);
    a[1] = value(8, 1);
    a[2] = value(4, 0);
    a[3] = value(12, 1);
}

// Two rows of x by 16 columns of the weight, as a tensor core leaves them, to y: v[e] is x row 2 * (lane % 4) + e % 2 and column
// lane / 4 + 8 * (e / 2). The 8 x 8 halves are transposed between the lanes, so that each stores two neighbouring columns.
template <class T>
__device__ __forceinline__ void store(const Arguments& a, int row, int end_row, int column, const float (&v)[4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        std::uint16_t r0 = T::rounded(v[2 * half]), r1 = T::rounded(v[2 * half + 1]);
        if (a.integer) {
            const int n = column + lane / 4 + 8 * half;
            const std::uint16_t s = a.column_scales[n < a.n ? n : 0];
            r0 = T::product(r0, s);
            r1 = T::product(r1, s);
        }
        std::uint32_t pair = r0 | static_cast<std::uint32_t>(r1) << 16;
        pair = transposed(pair);
        const int m = row + lane / 4, n = column + 8 * half + 2 * (lane % 4);
        if (m < end_row && n < a.n) *reinterpret_cast<std::uint32_t*>(a.y + static_cast<long long>(m) * a.n + n) = pair;
    }
}

}  // namespace qlab::int4
