// The fast kernel of the CUDA replay engine: one chain of fused sums for every output of a tile.
//
// 16 k of both operands are decoded once per block into shared memory; a thread holds R x C sums in doubles and a warp's lanes
// lie along the columns. The loads of the next 16 k fly while these are added.
#pragma once

#include "replay_fast.cuh"

namespace qlab::replay {

struct Problem {
    const std::uint16_t* x;       // [m, k]
    const std::uint16_t* w;       // [k, n]
    const std::int32_t* order;
    const std::uint16_t* scales;  // [g, n]
    const std::int32_t* group;    // [k]
    const std::uint16_t* bias;    // [n]
    std::int32_t k, n;
    std::int32_t is_bf16;
};

// Some outputs of one region, and one of its chains.
struct ChainTile {
    std::int32_t m0, m1, n0, n1;
    std::int32_t start, stop;        // slice of `order`
    std::int32_t results, row_size;  // where the tile's first result lies, and the distance between its rows
};

constexpr int kDepth = 16;  // k of one stage

// N values that neighbour each other, in as few loads as 16 bytes allow.
template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
    T at[N];
};

template <class P>
__device__ __forceinline__ P load_pack(const void* place) {
    return *static_cast<const P*>(place);
}

template <int Rows, int Columns>
struct Stage {
    // The padding spreads stores along k over the banks.
    alignas(16) double a[kDepth][Rows + 2];
    alignas(16) double b[kDepth][Columns];
    alignas(16) std::uint32_t a_flip[kDepth][Rows + 4];
    alignas(16) std::uint32_t b_flip[kDepth][Columns];
    alignas(16) std::uint32_t b_field[kDepth][Columns];
    alignas(16) std::uint16_t a_field[kDepth][Rows + 8];
    alignas(16) std::int32_t k[2][kDepth];  // of this stage and the next, in turn
};

// R x C outputs per thread, RowWarps x ColumnWarps warps per block, Blocks blocks per multiprocessor.
template <int R_, int C_, int RowWarps, int ColumnWarps, int Blocks>
struct Shape {
    static constexpr int R = R_, C = C_, blocks = Blocks;
    static constexpr int threads = 32 * RowWarps * ColumnWarps;
    static constexpr int rows = R * RowWarps, columns = 32 * C * ColumnWarps;
    static constexpr int row_warps = RowWarps;
};

template <class S, bool IsBf16, bool Half>
struct FastChain {
    static constexpr int R = S::R, C = S::C;
    static constexpr int kA = S::rows * kDepth >= S::threads ? S::rows * kDepth / S::threads : 1;
    static constexpr int kParts = S::threads / S::columns, kB = kDepth / kParts;
    static constexpr int kPairs = (R + 1) / 2;
    using Shared = Stage<S::rows, S::columns>;

    const Problem& p;
    const Rule& rule;
    const ChainTile& tile;
    Shared& s;
    std::uint32_t a_bits[kA], b_bits[kB], b_before;
    double value[R][C];

    // Of four doubles a lane loads two and two, each pair beside the next lane's, so that no two lanes meet in a bank.
    __device__ __forceinline__ static int place(int column) {
        return C == 4 ? (column & ~127) | (column & 2) << 5 | (column & 124) >> 1 | (column & 1) : column;
    }

    // k of a stage by threads 0 to 15. What lies outside of tile or chain is read inside and never used.
    __device__ __forceinline__ std::int32_t fetch_k(int position) const {
        const int at = position + static_cast<int>(threadIdx.x);
        return p.order[at < tile.stop ? at : tile.stop - 1];
    }

    // a: thread t takes k t % 16 of rows t / 16, + threads / 16, ...; b: one column, kB of the stage's k.
    __device__ __forceinline__ void load(const std::int32_t* k) {
        const std::uint32_t own = k[threadIdx.x % kDepth];
#pragma unroll
        for (int i = 0; i < kA; ++i) {
            const int row = tile.m0 + static_cast<int>(threadIdx.x / kDepth) + i * (S::threads / kDepth);
            a_bits[i] = p.x[static_cast<std::uint32_t>(row < tile.m1 ? row : tile.m1 - 1) * p.k + own];
        }
        const int column = tile.n0 + static_cast<int>(threadIdx.x) % S::columns;
        const int first = static_cast<int>(threadIdx.x) / S::columns * kB;
        const std::uint32_t n = p.n, inside = column < tile.n1 ? column : tile.n1 - 1;
#pragma unroll
        for (int i = 0; i < kB; ++i) b_bits[i] = p.w[k[first + i] * n + inside];
        if (kParts > 1) b_before = p.w[k[first ? first - 1 : 0] * n + inside];
    }

    // Decodes what was loaded into shared memory; true where an operand needs the slow form.
    __device__ __forceinline__ bool store() {
        bool slow = false;
        const int within = rule.terms - 1;  // terms is a power of two
        const int kk = threadIdx.x % kDepth;
#pragma unroll
        for (int i = 0; i < kA; ++i) {
            const int row = static_cast<int>(threadIdx.x / kDepth) + i * (S::threads / kDepth);
            const std::uint32_t before = __shfl_up_sync(~0u, a_bits[i], 1);  // lanes lie along k
            if (S::rows * kDepth < S::threads && row >= S::rows) break;
            const Encoded e = encode_first(a_bits[i], IsBf16);
            s.a[kk][row] = e.magnitude;
            s.a_field[kk][row] = static_cast<std::uint16_t>(e.field);
            s.a_flip[kk][row] = ((kk & within ? a_bits[i] ^ before : a_bits[i]) & 0x8000u) << 16;
            slow |= e.slow;
        }
        const int column = static_cast<int>(threadIdx.x) % S::columns, first = static_cast<int>(threadIdx.x) / S::columns * kB;
#pragma unroll
        for (int i = 0; i < kB; ++i) {
            const Encoded e = encode_second(b_bits[i], IsBf16, rule.fraction_bits);
            const std::uint32_t before = i ? b_bits[i ? i - 1 : 0] : b_before;
            // Only multiples of four begin a sum.
            const bool begins = i % 4 == 0 && ((first + i) & within) == 0;
            s.b[first + i][place(column)] = e.magnitude;
            s.b_field[first + i][column] = e.field;
            s.b_flip[first + i][column] = ((begins ? b_bits[i] : b_bits[i] ^ before) & 0x8000u) << 16;
            slow |= e.slow;
        }
        return slow;
    }

    // The next rule.terms products, from `base` of the stage, added to every sum of the thread.
    __device__ __forceinline__ void fast(int base, int row, int column) {
        std::uint32_t top[kPairs][C];
        const std::uint32_t smallest = smallest_fields(rule), bias = accumulator_bias(rule);
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
#pragma unroll
            for (int j = 0; j < C; ++j) top[i][j] = smallest;
#pragma unroll 1
        for (int first = base; first < base + rule.terms; first += 4)
#pragma unroll
            for (int k = first; k < first + 4; ++k) {
                const auto a = load_pack<Pack<std::uint32_t, kPairs>>(&s.a_field[k][row]);
                const auto b = load_pack<Pack<std::uint32_t, C>>(&s.b_field[k][column]);
#pragma unroll
                for (int i = 0; i < kPairs; ++i)
#pragma unroll
                    for (int j = 0; j < C; ++j) top[i][j] = add_maximum(a.at[i], b.at[j], top[i][j]);
            }
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < C; ++j)
                value[i][j] = begin<Half>(value[i][j], i % 2 ? top[i / 2][j] & 0xFFFF0000u : top[i / 2][j] << 16, bias);
        Cursor at(s, base, row, column);
#pragma unroll 1
        for (int left = rule.terms; left > 0; --left, at.next()) add_terms(at);
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < C; ++j) value[i][j] = end<Half>(value[i][j], rule.middle);
    }

    // Where a thread's operands of one k lie.
    struct Cursor {
        const double *a, *b;
        const std::uint32_t *a_flip, *b_flip;

        __device__ __forceinline__ Cursor(const Shared& s, int k, int row, int column)
            : a(&s.a[k][row]), b(&s.b[k][place(column)]), a_flip(&s.a_flip[k][row]), b_flip(&s.b_flip[k][column]) {}
        __device__ __forceinline__ void next() {
            a += S::rows + 2;
            b += S::columns;
            a_flip += S::rows + 4;
            b_flip += S::columns;
        }
    };

    __device__ __forceinline__ void add_terms(const Cursor& at) {
        constexpr int width = C == 4 ? 2 : C;
        const auto a = load_pack<Pack<double, R>>(at.a);
        const auto a_flip = load_pack<Pack<std::uint32_t, R>>(at.a_flip);
        const auto b_flip = load_pack<Pack<std::uint32_t, C>>(at.b_flip);
        Pack<double, width> b[C / width];
#pragma unroll
        for (int j = 0; j < C / width; ++j) b[j] = load_pack<Pack<double, width>>(at.b + place(j * width));
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < C; ++j)
                value[i][j] = term(value[i][j], a_flip.at[i], b_flip.at[j], a.at[i], b[j / width].at[j % width]);
    }

    // The same sums in 64-bit integers from global memory, in an array of their own that may be indexed at run time.
    __device__ __noinline__ static void slow(const Problem& p, const Rule& rule, const ChainTile& tile, int row, int column,
                                             const std::int32_t* order, float* values) {
#pragma unroll 1
        for (int i = 0; i < R * C; ++i) {
            const std::int64_t m = tile.m0 + row + i / C, n = tile.n0 + column + i % C;
            if (m >= tile.m1 || n >= tile.n1) continue;
            values[i] = fused_sum(values[i], rule, IsBf16, [&](int t) {
                const std::int64_t k = order[t];
                return p.x[m * p.k + k] | static_cast<std::uint32_t>(p.w[k * p.n + n]) << 16;
            });
        }
    }

    // True where the next sum must take the slow form again.
    __device__ __forceinline__ bool slow_sums(int row, int column, const std::int32_t* order) {
        float values[R * C];
#pragma unroll
        for (int i = 0; i < R * C; ++i) values[i] = to_float(value[i / C][i % C]);
        slow(p, rule, tile, row, column, order, values);
#pragma unroll
        for (int i = 0; i < R * C; ++i) value[i / C][i % C] = values[i];
        return any_needs_slow();
    }

    __device__ __forceinline__ bool any_needs_slow() const {
        bool any = false;
#pragma unroll
        for (int i = 0; i < R * C; ++i) any |= needs_slow<Half>(value[i / C][i % C]);
        return any;
    }

    __device__ __forceinline__ void run(float* results) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int row = warp % S::row_warps * R, column = (warp / S::row_warps * 32 + lane) * C;
#pragma unroll
        for (int i = 0; i < R * C; ++i) value[i / C][i % C] = 0.0;
        if (tile.start < tile.stop) {
            if (threadIdx.x < kDepth) {
                s.k[0][threadIdx.x] = fetch_k(tile.start);
                s.k[1][threadIdx.x] = fetch_k(tile.start + kDepth);
            }
            __syncthreads();
            load(s.k[0]);
        }
        bool always_slow = false;
        int turn = 0;
        for (int position = tile.start; position < tile.stop; position += kDepth, turn ^= 1) {
            const bool slow_stage = __syncthreads_or(store());
            load(s.k[turn ^ 1]);
            const std::int32_t later = threadIdx.x < kDepth ? fetch_k(position + 2 * kDepth) : 0;
            const int count = tile.stop - position < kDepth ? tile.stop - position : kDepth;
#pragma unroll 1
            for (int base = 0; base < count; base += rule.terms) {
                if (slow_stage || always_slow) {
                    always_slow = slow_sums(row, column, p.order + position + base);
                } else {
                    fast(base, row, column);
                    if (Half) always_slow = any_needs_slow();
                }
            }
            if (threadIdx.x < kDepth) s.k[turn][threadIdx.x] = later;
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < C; ++j)
                if (tile.m0 + row + i < tile.m1 && tile.n0 + column + j < tile.n1)
                    results[tile.results + static_cast<std::int64_t>(row + i) * tile.row_size + column + j] = to_float(value[i][j]);
    }
};

template <class S, bool IsBf16, bool Half>
__global__ void __launch_bounds__(S::threads, S::blocks)
    fast_chains(const Problem p, const Rule rule, const ChainTile* tiles, float* results) {
    __shared__ typename FastChain<S, IsBf16, Half>::Shared shared;
    const ChainTile tile = tiles[blockIdx.x];
    FastChain<S, IsBf16, Half> chain{p, rule, tile, shared};
    chain.run(results);
}

}  // namespace qlab::replay
