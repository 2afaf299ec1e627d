// The planned GEMM: chains of a program on this GPU's own tensor cores.
//
// A block takes one tile of outputs after another. It either executes the region's whole postfix program for the tile, with
// the top of the stack in registers and the values below it in a scratch of its own, or one chain, whose fp32 results the
// replay engine's join takes (replay_plain.cuh). 32 k of a chain's walk are a stage in shared memory: rows of w and eighths of
// rows of x, found by the program's order; the next stages are on their way while one is multiplied. A stage that the chain does
// not fill is filled with zeros: a fused sum of zeros and the accumulator is the accumulator.
#pragma once

#include "replay_chain.cuh"

#ifdef __CUDACC__
#include "planned_instructions.cuh"
#endif

namespace qlab::planned {

constexpr int kDepth = 32, kChunk = 8;  // k of a stage, and 16-bit values of a 16-byte copy

enum Op { op_chain = 0, op_add = 1, op_round = 2, op_scale = 3, op_bias = 4 };

struct OpRow {
    std::int32_t code, argument, start, stop;
};

// RowWarps x ColumnWarps warps of 16 RowTiles x 8 ColumnTiles outputs each.
template <int RowWarps, int ColumnWarps, int RowTiles, int ColumnTiles, int Stages, int Blocks>
struct Shape {
    static constexpr int row_tiles = RowTiles, column_tiles = ColumnTiles, row_warps = RowWarps, stages = Stages, blocks = Blocks;
    static constexpr int threads = 32 * RowWarps * ColumnWarps;
    static constexpr int rows = 16 * RowTiles * RowWarps, columns = 8 * ColumnTiles * ColumnWarps;
    static constexpr int x_bytes = rows * kDepth * 2, w_bytes = columns * kDepth * 2;
    static constexpr int bytes = stages * (x_bytes + w_bytes);
    static constexpr int x_chunks = kDepth / kChunk, w_chunks = columns / kChunk;  // in a row of a stage
    static constexpr int x_copies = (rows * x_chunks + threads - 1) / threads, w_copies = kDepth * w_chunks / threads;
    static_assert(ColumnTiles % 2 == 0 && w_copies * threads == kDepth * w_chunks);
    static_assert(threads / x_chunks % 8 == 0 && threads / w_chunks % 8 == 0, "a thread's chunks have one place in their rows");
};

using Wide = Shape<2, 4, 4, 8, 4, 1>;   // 128 x 256
using Large = Shape<2, 2, 4, 8, 4, 2>;  // 128 x 128
using Medium = Shape<2, 2, 2, 8, 4, 3>; // 64 x 128
using Small = Shape<1, 4, 2, 4, 5, 4>;  // 32 x 128
using Thin = Shape<1, 4, 1, 4, 6, 4>;   // 16 x 128
constexpr int kShapes = 5;

template <class F>
void with_shape(int shape, F f) {
    switch (shape) {
        case 0: f(Wide{}); break;
        case 1: f(Large{}); break;
        case 2: f(Medium{}); break;
        case 3: f(Small{}); break;
        default: f(Thin{});
    }
}

struct Work {
    replay::Problem p;
    const OpRow* ops;
    const replay::ChainTile* tiles;  // of whole programs `start` and `stop` are a slice of `ops`
    float* scratch;
    void* out;  // y, or the chains' results
    std::int32_t count, levels, whole;
    std::int32_t aligned;   // every 8 k of the order in x, and every row of w from a tile's column, are 16 aligned bytes
    std::int32_t gathered;  // x has a column for each place of the order
};

__device__ __forceinline__ int minimum(int a, int b) { return a < b ? a : b; }

template <class S, int Depth, bool IsBf16, bool Half>
struct Tile {
    static constexpr int R = S::row_tiles, C = S::column_tiles, kW = S::w_copies;

    const Work& work;
    const replay::ChainTile& tile;
    const Address x_stage, w_stage;
    const int warp_row, warp_column;  // of the tile
    const Address x_copy, w_copy;     // where the thread's first chunks go
    std::uint32_t x_offset[S::x_copies], w_column;
    float sum[R][C][4];

    __device__ __forceinline__ Tile(const Work& w, const replay::ChainTile& t, Address shared)
        : work(w), tile(t), x_stage(shared), w_stage(x_stage + S::stages * S::x_bytes),
          warp_row(static_cast<int>(threadIdx.x) / 32 % S::row_warps * 16 * R),
          warp_column(static_cast<int>(threadIdx.x) / 32 / S::row_warps * 8 * C),
          x_copy(x_stage + x_place(threadIdx.x / S::x_chunks, threadIdx.x % S::x_chunks)),
          w_copy(w_stage + w_place(threadIdx.x / S::w_chunks, threadIdx.x % S::w_chunks)) {
#pragma unroll
        for (int i = 0; i < S::x_copies; ++i) {
            const int row = t.m0 + static_cast<int>(threadIdx.x) / S::x_chunks + i * (S::threads / S::x_chunks);
            x_offset[i] = static_cast<std::uint32_t>(minimum(row, t.m1 - 1)) * w.p.k;
        }
        const int column = t.n0 + static_cast<int>(threadIdx.x) % S::w_chunks * kChunk;
        w_column = column < t.n1 ? column : t.n0;
    }

    // Where 16 bytes of a stage lie: eight rows at one chunk, which ldmatrix reads together, are in eight different banks.
    __device__ __forceinline__ static int x_place(int row, int chunk) {
        return row * (kDepth * 2) + ((chunk ^ (row >> 1 & 3)) << 4);
    }
    __device__ __forceinline__ static int w_place(int row, int chunk) {
        return row * (S::columns * 2) + ((chunk ^ (row & 7)) << 4);
    }

    // ---- global memory to shared memory: thread t copies chunk t % chunks of rows t / chunks, + threads / chunks, ...
    // Beyond the tile the last row and the first chunk of columns are copied again; nothing reads what they give.
    struct Keys {
        std::uint32_t x, w[kW];  // the k of the chunk of x, and of each row of w
    };

    __device__ __forceinline__ Keys keys(int position) const {
        const int chunk = position + static_cast<int>(threadIdx.x) % S::x_chunks * kChunk;
        const std::int32_t* rows = work.p.order + position + static_cast<int>(threadIdx.x) / S::w_chunks;
        Keys found;
        found.x = work.gathered ? chunk : work.p.order[chunk];
#pragma unroll
        for (int i = 0; i < kW; ++i) found.w[i] = rows[i * (S::threads / S::w_chunks)];
        return found;
    }

    __device__ __forceinline__ void copy(int stage, const Keys& k) const {
        const Address x_to = x_copy + stage * S::x_bytes, w_to = w_copy + stage * S::w_bytes;
#pragma unroll
        for (int i = 0; i < S::x_copies; ++i)
            if (S::rows * S::x_chunks >= S::threads || static_cast<int>(threadIdx.x) < S::rows * S::x_chunks)
                copy_later(x_to + i * (S::threads / S::x_chunks * kDepth * 2), work.p.x + (x_offset[i] + k.x));
#pragma unroll
        for (int i = 0; i < kW; ++i)
            copy_later(w_to + i * (S::threads / S::w_chunks * S::columns * 2),
                       work.p.w + (k.w[i] * static_cast<std::uint32_t>(work.p.n) + w_column));
    }

    struct Limits {
        int m0, m1, n0, n1;
    };

    // What is not aligned, or not a whole stage: value by value, zeros behind the chain's end. Static, so that no address of
    // the accumulators is taken.
    __device__ __noinline__ static void gather(Address x_to, Address w_to, const replay::Problem& p, const Limits tile,
                                               bool gathered, int position, int stop) {
        for (int at = threadIdx.x; at < S::rows * S::x_chunks; at += S::threads) {
            const int row = at / S::x_chunks, chunk = at % S::x_chunks;
            const std::uint16_t* from = p.x + static_cast<std::int64_t>(minimum(tile.m0 + row, tile.m1 - 1)) * p.k;
            const auto value = [&](int i) -> std::uint32_t {
                const int k = position + chunk * kChunk + i;
                return k < stop ? from[gathered ? k : p.order[k]] : 0;
            };
            store(x_to + x_place(row, chunk), value);
        }
        for (int at = threadIdx.x; at < kDepth * S::w_chunks; at += S::threads) {
            const int row = at / S::w_chunks, chunk = at % S::w_chunks, k = position + row;
            const std::uint16_t* from = p.w + static_cast<std::int64_t>(k < stop ? p.order[k] : 0) * p.n;
            const auto value = [&](int i) -> std::uint32_t {
                const int column = tile.n0 + chunk * kChunk + i;
                return k < stop && column < tile.n1 ? from[column] : 0;
            };
            store(w_to + w_place(row, chunk), value);
        }
    }

    template <class Value>
    __device__ __forceinline__ static void store(Address to, Value value) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = value(2 * i) | value(2 * i + 1) << 16;
        store_words(to, words);
    }

    // ---- one stage into the accumulators
    template <class Sum>
    __device__ __forceinline__ void multiply_stage(int stage, Sum& accumulator) const {
        const int lane = threadIdx.x % 32;
        const Address x_from = x_stage + stage * S::x_bytes, w_from = w_stage + stage * S::w_bytes;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            std::uint32_t a[R][4], b[C / 2][4];
#pragma unroll
            for (int i = 0; i < R; ++i)
                load_matrices(a[i], x_from + x_place(warp_row + 16 * i + lane % 16, k / kChunk + lane / 16));
#pragma unroll
            for (int j = 0; j < C / 2; ++j)
                load_transposed(b[j], w_from + w_place(k + lane % 16, warp_column / kChunk + 2 * j + lane / 16));
#pragma unroll
            for (int i = 0; i < R; ++i)
#pragma unroll
                for (int j = 0; j < C; ++j)
                    multiply<Depth, IsBf16>(accumulator[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }

    template <class Sum>
    __device__ __forceinline__ void walk(int start, int stop, Sum& accumulator) {
        const int count = (stop - start + kDepth - 1) / kDepth;
        const int copied = work.aligned ? (stop - start) / kDepth : 0;  // the first stages; the others are gathered
        const auto load = [&](int stage, int s, const Keys& k) {
            if (s < copied)
                copy(stage, k);
            else if (s < count)
                gather(x_stage + stage * S::x_bytes, w_stage + stage * S::w_bytes, work.p,
                       Limits{tile.m0, tile.m1, tile.n0, tile.n1}, work.gathered, start + s * kDepth, stop);
            end_group();
        };
        Keys first[S::stages];
#pragma unroll
        for (int s = 0; s < S::stages; ++s)
            if (s < copied) first[s] = keys(start + s * kDepth);
#pragma unroll
        for (int s = 0; s < S::stages - 1; ++s) load(s, s, first[s]);
        // Only now, so that the copies have their registers until here.
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < C; ++j)
#pragma unroll
                for (auto& value : accumulator[i][j]) value = 0;
        Keys next = first[S::stages - 1];
        int from = 0, to = S::stages - 1;
#pragma unroll 1
        for (int s = 0; s < count; ++s) {
            wait_groups<S::stages - 2>();
            __syncthreads();
            const int later = s + S::stages - 1;
            load(to, later, next);
            if (later + 1 < copied) next = keys(start + (later + 1) * kDepth);
            multiply_stage(from, accumulator);
            from = from + 1 == S::stages ? 0 : from + 1;
            to = to + 1 == S::stages ? 0 : to + 1;
        }
        wait_groups<0>();
        __syncthreads();
    }

    __device__ __forceinline__ void chain(int start, int stop) {
        if constexpr (Half) {
            std::uint32_t pairs[R][C][2];
            walk(start, stop, pairs);
#pragma unroll
            for (int i = 0; i < R; ++i)
#pragma unroll
                for (int j = 0; j < C; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) sum[i][j][r] = r % 2 ? high_half(pairs[i][j][r / 2]) : low_half(pairs[i][j][r / 2]);
        } else {
            walk(start, stop, sum);
        }
    }

    // ---- the program's other operations; an element's values below the top of its stack are its thread's own
    template <class F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < C; ++j) f(sum[i][j], i, j);
    }

    using Four = replay::Pack<float, 4>;

    __device__ __forceinline__ Four* below(int level, int i, int j) const {
        const std::int64_t place = (static_cast<std::int64_t>(blockIdx.x) * work.levels + level) * (R * C) + i * C + j;
        return reinterpret_cast<Four*>(work.scratch) + place * S::threads + threadIdx.x;
    }

    __device__ __forceinline__ void push(int level) {
        each([&](float(&v)[4], int i, int j) { *below(level, i, j) = {v[0], v[1], v[2], v[3]}; });
    }

    __device__ __forceinline__ void add(int level) {
        each([&](float(&v)[4], int i, int j) {
            const Four other = *below(level, i, j);
#pragma unroll
            for (int r = 0; r < 4; ++r) v[r] = replay::add_nearest(other.at[r], v[r]);
        });
    }

    // `values` of the tile's columns, the scale times the top or the bias added to it; exact, or rounded twice without harm:
    // what both hold has at most 11 bits, and fp32 more than twice as many.
    template <bool Times>
    __device__ __forceinline__ void with_column(const std::uint16_t* values) {
        const int first = tile.n0 + warp_column + static_cast<int>(threadIdx.x) % 4 * 2;
        float column[C][2];
#pragma unroll
        for (int j = 0; j < C; ++j)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int n = first + 8 * j + r;
                column[j][r] = n < tile.n1 ? replay::operand_value(values[n], IsBf16) : 0.0f;
            }
        each([&](float(&v)[4], int, int j) {
#pragma unroll
            for (int r = 0; r < 4; ++r) v[r] = Times ? v[r] * column[j][r % 2] : replay::add_nearest(v[r], column[j][r % 2]);
        });
    }

    template <bool Bf16>
    __device__ __forceinline__ void round_all() {
        each([&](float(&v)[4], int, int) {
#pragma unroll
            for (int r = 0; r < 4; r += 2) {
                const std::uint32_t pair = rounded_pair<Bf16>(v[r], v[r + 1]);
                v[r] = Bf16 ? replay::float_of(pair << 16) : low_half(pair);
                v[r + 1] = Bf16 ? replay::float_of(pair & 0xFFFF0000u) : high_half(pair);
            }
        });
    }

    __device__ __forceinline__ void run() {
        int depth = 0;
        const int last = work.whole ? tile.stop : tile.start + 1;
#pragma unroll 1
        for (int at = tile.start; at < last; ++at) {
            const OpRow op = work.whole ? work.ops[at] : OpRow{op_chain, 0, tile.start, tile.stop};
            if (op.code == op_chain) {
                if (depth) push(depth - 1);
                ++depth;
                chain(op.start, op.stop);
                continue;
            }
            if (op.code == op_add)
                add(--depth - 1);
            else if (op.code == op_scale)
                with_column<true>(work.p.scales);
            else if (op.code == op_bias)
                with_column<false>(work.p.bias);
            if (op.argument == replay::fp16)
                round_all<false>();
            else if (op.argument == replay::bf16)
                round_all<true>();
        }
        if (work.whole)
            write_outputs();
        else
            write_results();
    }

    // Calls f(row of the tile, column of the tile, two values, how many of them are the tile's).
    template <class F>
    __device__ __forceinline__ void each_pair(F f) {
        const int lane = threadIdx.x % 32, rows = tile.m1 - tile.m0, columns = tile.n1 - tile.n0;
        each([&](float(&v)[4], int i, int j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row + 16 * i + 8 * half + lane / 4, column = warp_column + 8 * j + lane % 4 * 2;
                if (row < rows && column < columns) f(row, column, v[2 * half], v[2 * half + 1], columns - column);
            }
        });
    }

    __device__ __forceinline__ void write_outputs() {
        auto* y = static_cast<std::uint16_t*>(work.out);
        const bool pairs = ((work.p.n | tile.n0) & 1) == 0;
        each_pair([&](int row, int column, float low, float high, int left) {
            std::uint16_t* to = y + static_cast<std::int64_t>(tile.m0 + row) * work.p.n + tile.n0 + column;
            const std::uint32_t both = rounded_pair<IsBf16>(low, high);
            if (pairs && left > 1) {
                *reinterpret_cast<std::uint32_t*>(to) = both;
            } else {
                to[0] = static_cast<std::uint16_t>(both);
                if (left > 1) to[1] = static_cast<std::uint16_t>(both >> 16);
            }
        });
    }

    __device__ __forceinline__ void write_results() {
        auto* results = static_cast<float*>(work.out);
        const bool pairs = ((tile.results | tile.row_size) & 1) == 0;
        each_pair([&](int row, int column, float low, float high, int left) {
            float* to = results + tile.results + static_cast<std::int64_t>(row) * tile.row_size + column;
            if (pairs && left > 1) {
                *reinterpret_cast<replay::Pack<float, 2>*>(to) = {low, high};
            } else {
                to[0] = low;
                if (left > 1) to[1] = high;
            }
        });
    }
};

template <class S, int Depth, bool IsBf16, bool Half>
__global__ void __launch_bounds__(S::threads, S::blocks) planned_tiles(const __grid_constant__ Work work) {
    const Address shared = shared_address(shared_memory());
#pragma unroll 1
    for (int at = blockIdx.x; at < work.count; at += gridDim.x) {
        const replay::ChainTile tile = work.tiles[at];
        Tile<S, Depth, IsBf16, Half> own(work, tile, shared);
        own.run();
    }
}

}  // namespace qlab::planned
