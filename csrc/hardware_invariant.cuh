// y = x w by IEEE fp32 fused multiply-adds in one order, which no GPU, number of SMs, or number of rows changes.
//
// The order of one output: K is cut into slices of whole blocks of 128 rows; in a slice, chain c of four walks k = 2c and 2c + 1
// of every 8, ascending, each product by fma(x, w, sum) from +0; chains join (c0 + c1) + (c2 + c3), slices ascending, all in
// fp32, and the total is rounded once. x is widened exactly, w = RN((q - z) * s) in its 16-bit type, then widened exactly.
//
// That is the order in which the storage layout (qlab/packing/fragments.py) hands a weight to the lanes of a warp: lane 4 g + c
// holds those k of columns g and g + 8 of every 16. So a warp takes Tile::rows of x by Tile::columns of w over one slice, each
// lane one chain of every output; a thread block holds the slices of one tile, its warps taking them in turn, and joins them in
// shared memory. A weight is decoded once for all rows of the tile. How large the tile is decides speed alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qlab::hardware_invariant {

constexpr int kMaxSlices = 16;
constexpr int kBlockColumns = 64, kBlockRows = 128;  // of the storage layout
constexpr int kChunk = 32, kBlockChunks = 4;         // rows that are loaded together, and how many of those a block has
constexpr int kCodeWords = 1024, kScaleWords = 32, kZeroWords = 16;  // of a block: codes, then rows of scales, then of zeros

struct Operands {
    const std::uint16_t* x;  // [M, x_stride]
    std::int64_t x_stride;
    const std::uint32_t* blocks;  // [ceil(N / 64), ceil(K / 128), block_words]
    std::uint16_t* y;             // [M, N]
    int m, n, k;                  // k a multiple of 32
    int block_words, scale_rows;  // rows of scales in a block: 1, 2 or 4, each for 1 << scale_shift chunks, scale_mask + 1
    int scale_shift, scale_mask;
    bool has_zeros;
    int slice_blocks, slices;  // blocks of 128 rows in a slice, and how many slices
};

// Rows by columns of a thread block's part of the output. Few rows want many warps with little each, to have enough loads
// under way; many rows want few warps with many registers.
template <int Rows, int Columns>
struct Tile {
    static constexpr int rows = Rows, columns = Columns;
    static constexpr bool few = Rows <= 4;
    static constexpr int warps = few ? 16 : 8;
    static constexpr int blocks_per_sm = Rows * Columns <= 32 || Rows * Columns == 256 || Columns == 2 * Rows ? 2 : 1;
    static constexpr int ahead = few ? 4 : 1;                            // chunks whose codes are loaded before they are used
    static constexpr int x_chunks = few ? 4 : 16 / Rows;                 // chunks whose x are staged at a time
    static constexpr int row_pairs = x_chunks * (kChunk / 2);            // pairs of x in a staged row
    static constexpr int x_pairs = Rows * row_pairs / 32;                // those that a lane stages
    static constexpr int tiles = Columns / 16;                           // of 16 columns: two to a lane
    static constexpr int sums = Rows * 2 * tiles;                        // of a lane
    static constexpr int stage = Rows * row_pairs * 2;                   // floats of x that a warp stages
    static int shared(int warps_launched, int slices) {
        return static_cast<int>(sizeof(float)) * (warps_launched * stage + slices * rows * columns);
    }
};

template <unsigned Mask, unsigned Magic>
__device__ __forceinline__ std::uint32_t masked_or(std::uint32_t word) {
#ifdef __CUDA_ARCH__
    std::uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(word), "n"(Mask), "n"(Magic));  // in one instruction
    return d;
#else
    return (word & Mask) | Magic;
#endif
}

__device__ __forceinline__ std::uint32_t twice(std::uint32_t word, int half) {  // one 16-bit half, in both
    return __byte_perm(word, 0, half ? 0x3232 : 0x1010);
}

// One column's scale and zero point as a lane multiplies with them, and words of eight codes to fp32 weights.
template <bool IsBf16>
struct Column;

template <>
struct Column<false> {
    __half2 scale, zero, high_zero;

    __device__ __forceinline__ void set_scale(std::uint32_t both) { scale = *reinterpret_cast<const __half2*>(&both); }
    __device__ __forceinline__ void set_zero(std::uint32_t z) {  // both as 1024 + z and 64 + z
        const std::uint32_t bits = 0x64006400 + z * 0x10001;
        zero = *reinterpret_cast<const __half2*>(&bits);
        high_zero = __hsub2(zero, __float2half2_rn(960.0f));
    }
};

template <>
struct Column<true> {
    __nv_bfloat162 scale, zero;

    __device__ __forceinline__ void set_scale(std::uint32_t both) { scale = *reinterpret_cast<const __nv_bfloat162*>(&both); }
    __device__ __forceinline__ void set_zero(std::uint32_t z) {  // 128 + z
        const std::uint32_t bits = 0x43004300 + z * 0x10001;
        zero = *reinterpret_cast<const __nv_bfloat162*>(&bits);
    }
};

// 1024 + q, or 1024 + 16 q where the code stands four bits higher: q - z is exact either way, its product with s rounded once.
__device__ __forceinline__ void widen(std::uint32_t bits, const Column<false>& c, bool high, float* w) {
    const __half2 code = *reinterpret_cast<const __half2*>(&bits);
    const __half2 q = high ? __hfma2(code, __float2half2_rn(0.0625f), __hneg2(c.high_zero)) : __hsub2(code, c.zero);
    const float2 pair = __half22float2(__hmul2_rn(q, c.scale));
    w[0] = pair.x, w[1] = pair.y;
}

__device__ __forceinline__ void widen(std::uint32_t bits, const Column<true>& c, float* w) {
    const __nv_bfloat162 code = *reinterpret_cast<const __nv_bfloat162*>(&bits);
    const __nv_bfloat162 product = __hmul2_rn(__hsub2(code, c.zero), c.scale);
    const std::uint32_t both = *reinterpret_cast<const std::uint32_t*>(&product);
    w[0] = __uint_as_float(both << 16), w[1] = __uint_as_float(both & 0xFFFF0000);
}

// w[0..3] are k0, k0 + 1, k0 + 8, k0 + 9 of the first column, w[4..7] of the second.
__device__ __forceinline__ void decode(std::uint32_t word, const Column<false> (&c)[2], float (&w)[8]) {
    widen(masked_or<0x000F000F, 0x64006400>(word), c[0], false, w);
    widen(masked_or<0x00F000F0, 0x64006400>(word), c[0], true, w + 2);
    word >>= 8;
    widen(masked_or<0x000F000F, 0x64006400>(word), c[1], false, w + 4);
    widen(masked_or<0x00F000F0, 0x64006400>(word), c[1], true, w + 6);
}

__device__ __forceinline__ void decode(std::uint32_t word, const Column<true> (&c)[2], float (&w)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) widen(masked_or<0x000F000F, 0x43004300>(word >> 4 * i), c[i / 2], w + 2 * i);
}

__device__ __forceinline__ uint2 load_codes(const std::uint32_t* p) {
#ifdef __CUDA_ARCH__
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
#else
    return {p[0], p[1]};
#endif
}

template <bool IsBf16>
__device__ __forceinline__ float2 widen_x(std::uint32_t pair) {
    if constexpr (IsBf16) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000));
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// With little work to a loop, what comes from here stays in its register; the compiler would compute it anew to save that.
template <class T, class V>
__device__ __forceinline__ V kept(V value) {
#ifdef __CUDA_ARCH__
    if constexpr (T::few && sizeof(V) == 8) asm("mov.b64 %0, %0;" : "+l"(value));
    if constexpr (T::few && sizeof(V) == 4) asm("mov.b32 %0, %0;" : "+r"(value));
#endif
    return value;
}

// What one warp holds of a tile, and sums over one slice after the other. Loads run a block or a chunk ahead; behind the last
// rows of a slice they read those again.
template <class T, bool IsBf16>
struct Warp {
    const Operands& o;
    float2* staged;        // x of some chunks, fp32 [rows, 16 k at a time, lane % 4, the 4 of its k]: this lane's first pair
    const float4* mine;    // the four of the first 16 k that this lane multiplies
    int lane, rows, column;         // rows of the tile that x has; its first column
    int chunks;                     // of the slice
    const std::uint16_t* x;         // first row of the tile, first row of the slice
    const std::uint32_t *codes, *next_codes;  // this lane's in the block at hand, and in the next
    int scale_place, zero_place;    // of this lane's first scales and zero points in a block, from its codes, in bytes

    uint2 words[T::ahead][T::tiles];
    std::uint32_t next_x[T::x_pairs], next_scales[T::tiles], next_zeros[T::tiles];
    Column<IsBf16> columns[T::tiles][2];
    float sum[T::rows][2 * T::tiles];

    __device__ __forceinline__ Warp(const Operands& operands, float* stage, int row, int column)
        : o(operands), lane(threadIdx.x % 32), rows(min(T::rows, operands.m - row)), column(column) {
        staged = kept<T>(reinterpret_cast<float2*>(stage) + lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2);
        mine = kept<T>(reinterpret_cast<const float4*>(stage) + lane % 4);
        const int in_block = column % kBlockColumns, code_place = 4 * (in_block * 4 + lane * 2);
        scale_place = kept<T>(4 * (kCodeWords + in_block / 2 + lane / 4) - code_place);
        zero_place = kept<T>(4 * (kCodeWords + kScaleWords * o.scale_rows) + 2 * (in_block / 2 + lane / 4) - code_place);
    }

    __device__ __forceinline__ void begin(int row, int slice) {
        const int first = slice * o.slice_blocks, blocks = (o.k + kBlockRows - 1) / kBlockRows;
        chunks = kept<T>(min(o.slice_blocks * kBlockChunks, o.k / kChunk - first * kBlockChunks));
        x = kept<T>(o.x + row * o.x_stride + first * kBlockRows);
        codes = kept<T>(o.blocks + (static_cast<std::int64_t>(column / kBlockColumns) * blocks + first) * o.block_words +
                     column % kBlockColumns * 4 + lane * 2);
#pragma unroll
        for (int c = 0; c < T::ahead; ++c) fetch_codes(codes, c, words[c]);
        fetch_scales(codes, 0);
#pragma unroll
        for (int t = 0; t < T::tiles; ++t) columns[t][0].set_zero(8), columns[t][1].set_zero(8);
#pragma unroll
        for (int r = 0; r < T::rows; ++r)
#pragma unroll
            for (int i = 0; i < 2 * T::tiles; ++i) sum[r][i] = 0.0f;
    }

    __device__ __forceinline__ void fetch_codes(const std::uint32_t* from, int c, uint2 (&to)[T::tiles]) const {
#pragma unroll
        for (int t = 0; t < T::tiles; ++t) to[t] = load_codes(from + c * (kCodeWords / kBlockChunks) + 64 * t);
    }

    __device__ __forceinline__ void fetch_scales(const std::uint32_t* from, int row) {
        const char* block = reinterpret_cast<const char*>(from);
        const auto* scales = reinterpret_cast<const std::uint32_t*>(block + scale_place + 4 * kScaleWords * row);
#pragma unroll
        for (int t = 0; t < T::tiles; ++t) next_scales[t] = __ldg(scales + 8 * t);
        if (!o.has_zeros) return;
        const auto* zeros = reinterpret_cast<const std::uint16_t*>(block + zero_place + 4 * kZeroWords * row);
#pragma unroll
        for (int t = 0; t < T::tiles; ++t) next_zeros[t] = __ldg(zeros + 8 * t);
    }

    __device__ __forceinline__ void use_scales() {
#pragma unroll
        for (int t = 0; t < T::tiles; ++t) {
            columns[t][0].set_scale(twice(next_scales[t], 0)), columns[t][1].set_scale(twice(next_scales[t], 1));
            if (o.has_zeros) columns[t][0].set_zero(next_zeros[t] & 0xFF), columns[t][1].set_zero(next_zeros[t] >> 8);
        }
    }

    // Pair i of a lane is pair p of row r in the stage. Rows that x does not have repeat the last one and are not written.
    __device__ __forceinline__ void fetch_x(int chunk) {
#pragma unroll
        for (int i = 0; i < T::x_pairs; ++i) {
            const int r = (lane + 32 * i) / T::row_pairs, p = (lane + 32 * i) % T::row_pairs;
            const int at = min(chunk * (kChunk / 2) + p, chunks * (kChunk / 2) - 1);
            const std::uint16_t* row = T::rows > 1 ? x + min(r, rows - 1) * static_cast<int>(o.x_stride) : x;
            next_x[i] = __ldg(reinterpret_cast<const std::uint32_t*>(row) + at);
        }
    }

    __device__ __forceinline__ void stage_x() {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < T::x_pairs; ++i) staged[32 * i] = widen_x<IsBf16>(next_x[i]);
        __syncwarp();
    }

    // Half a chunk, 16 rows of the weight: `at` says which of those whose x are staged.
    __device__ __forceinline__ void multiply(const float (&w)[T::tiles][8], int at) {
#pragma unroll
        for (int r = 0; r < T::rows; ++r) {
            const float4 v = mine[r * (T::row_pairs / 2) + at * 4];
            const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int i = 0; i < 2 * T::tiles; ++i) sum[r][i] = __fmaf_rn(four[j], w[i / 2][i % 2 * 4 + j], sum[r][i]);
        }
    }

    // Chunk c of the block at hand, `chunk` of the slice.
    __device__ __forceinline__ void step(int chunk, int c) {
        uint2 (&held)[T::tiles] = words[c % T::ahead];
        if (c % T::x_chunks == 0) {
            stage_x();
            fetch_x(chunk + T::x_chunks);
        }
        if ((c & o.scale_mask) == 0) {
            use_scales();
            const int next = c + o.scale_mask + 1;
            const bool here = next < kBlockChunks;
            fetch_scales(here ? codes : next_codes, here ? next >> o.scale_shift : 0);
        }
        float w[T::tiles][8];
#pragma unroll
        for (int t = 0; t < T::tiles; ++t) decode(held[t].x, columns[t], w[t]);
        multiply(w, c % T::x_chunks * 2);
#pragma unroll
        for (int t = 0; t < T::tiles; ++t) decode(held[t].y, columns[t], w[t]);
        fetch_codes(c + T::ahead < kBlockChunks ? codes : next_codes, (c + T::ahead) % kBlockChunks, held);
        multiply(w, c % T::x_chunks * 2 + 1);
    }

    __device__ __forceinline__ void run() {
        for (int chunk = 0; chunk < chunks; chunk += kBlockChunks, codes = next_codes) {
            next_codes = chunk + kBlockChunks < chunks ? codes + o.block_words : codes;
            if constexpr (T::few) {
#pragma unroll
                for (int c = 0; c < kBlockChunks; ++c)
                    if (chunk + c < chunks) step(chunk + c, c);
            } else {
                const int live = min(kBlockChunks, chunks - chunk);
#pragma unroll 1
                for (int c = 0; c < live; ++c) step(chunk + c, c);
            }
        }
    }

    // The lanes' chains joined, (c0 + c1) + (c2 + c3), into fp32 [rows, columns]. An addition commutes, so that where there are
    // many sums each lane keeps a quarter of them: half after the first exchange, a quarter after the second.
    __device__ __forceinline__ void join(float* part) {
        const int g = lane / 4, c = lane % 4;
        float* s = &sum[0][0];
        if constexpr (T::sums < 4) {
#pragma unroll
            for (int i = 0; i < T::sums; ++i) {
                s[i] = __fadd_rn(s[i], __shfl_xor_sync(~0u, s[i], 1));
                s[i] = __fadd_rn(s[i], __shfl_xor_sync(~0u, s[i], 2));
                if (c == 0) part[g + 8 * i] = s[i];
            }
        } else {
            constexpr int half = T::sums / 2, quarter = T::sums / 4;
            exchange<half>(s, c & 1, 1);
            exchange<quarter>(s, c & 2, 2);
#pragma unroll
            for (int i = 0; i < quarter; ++i) {
                const int at = i + (c & 1) * half + (c >> 1) * quarter;
                part[at / (2 * T::tiles) * T::columns + at % (2 * T::tiles) * 8 + g] = s[i];
            }
        }
    }

    template <int Count>
    __device__ __forceinline__ static void exchange(float* s, bool upper, int mask) {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            const float kept = upper ? s[i + Count] : s[i], given = upper ? s[i] : s[i + Count];
            s[i] = __fadd_rn(kept, __shfl_xor_sync(~0u, given, mask));
        }
    }

};

// Grid (ceil(M / rows), ceil(N / columns)); 32 threads for each warp, of which no more than slices.
template <class T, bool IsBf16>
__global__ void __launch_bounds__(32 * T::warps, T::blocks_per_sm) gemm(const __grid_constant__ Operands o) {
    extern __shared__ float4 shared[];
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const int row = blockIdx.x * T::rows, column = blockIdx.y * T::columns;
    float* stages = reinterpret_cast<float*>(shared);
    float* parts = stages + warps * T::stage;  // [slices, rows, columns]
    {
        Warp<T, IsBf16> mine(o, stages + warp * T::stage, row, column);
#if __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.launch_dependents;");
#endif
        bool waited = false;
        for (int slice = warp; slice < o.slices; slice += warps) {
            mine.begin(row, slice);
            // The weight is no other kernel's output, so that its loads need not wait where launches overlap; x is.
#if __CUDA_ARCH__ >= 900
            if (!waited) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
            waited = true;
            mine.fetch_x(0);
            mine.run();
            mine.join(parts + slice * T::rows * T::columns);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < T::rows * T::columns; i += blockDim.x) {
        const int r = row + i / T::columns, n = column + i % T::columns;
        if (r >= o.m || n >= o.n) continue;
        float total = parts[i];
        for (int s = 1; s < o.slices; ++s) total = __fadd_rn(total, parts[s * T::rows * T::columns + i]);
        const std::int64_t at = static_cast<std::int64_t>(r) * o.n + n;
        o.y[at] = IsBf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(total)) : __half_as_ushort(__float2half_rn(total));
    }
}

}  // namespace qlab::hardware_invariant
