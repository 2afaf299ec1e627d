// Chains of fused multiply-adds and of fp16 dots (ExLlama's step) on the CUDA cores, in the IEEE arithmetic of their steps.
//
// A thread holds R x 4 sums and takes one k, or one pair of k, after the other; 16 k of both operands are staged in shared
// memory as the multiplication takes them: as fp32 values, or as pairs of neighbours in the walk.
#pragma once

#include "planned_gemm.cuh"

namespace qlab::planned {

constexpr int kDotDepth = 16, kDotColumns = 128, kColumns = 4, kColumnThreads = kDotColumns / kColumns;
constexpr int kDotThreads = 256, kDotRows = kDotThreads / kColumnThreads;  // rows of threads

template <int R, bool Dot>
struct DotTile {
    static constexpr int rows = R * kDotRows, depth = Dot ? kDotDepth / 2 : kDotDepth;
    static constexpr int x_words = rows * depth, w_words = kDotColumns * depth;
    static constexpr int bytes = 4 * depth * (rows + 4 + kDotColumns);
    static constexpr int x_loads = (x_words + kDotThreads - 1) / kDotThreads, w_loads = w_words / kDotThreads;

    const replay::Problem& p;
    const replay::ChainTile& tile;
    const int terms;  // of a dot: a power of two, at most a stage
    std::uint32_t x_word[x_loads], w_word[w_loads];

    __device__ __forceinline__ std::uint32_t* x_row(int k) const {
        return reinterpret_cast<std::uint32_t*>(shared_memory()) + k * (rows + 4);
    }
    __device__ __forceinline__ std::uint32_t* w_row(int k) const { return x_row(depth) + k * kDotColumns; }

    template <class F>
    __device__ __forceinline__ std::uint32_t word(int position, F element) const {
        const auto bits = [&](int at) -> std::uint32_t { return at < tile.stop ? element(p.order[at]) : 0; };
        if constexpr (Dot) return bits(position) | bits(position + 1) << 16;
        return replay::bits_of(replay::operand_value(bits(position), p.is_bf16));
    }

    // x along k, as its rows lie; w along its columns.
    __device__ __forceinline__ void load(int position) {
        constexpr int step = Dot ? 2 : 1;
#pragma unroll
        for (int i = 0; i < x_loads; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kDotThreads, m = tile.m0 + at / depth;
            const bool inside = at < x_words && m < tile.m1;
            const std::uint16_t* row = p.x + static_cast<std::int64_t>(inside ? m : tile.m0) * p.k;
            x_word[i] = inside ? word(position + step * (at % depth), [&](std::int64_t k) { return row[k]; }) : 0;
        }
#pragma unroll
        for (int i = 0; i < w_loads; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kDotThreads, n = tile.n0 + at % kDotColumns;
            const std::int64_t column = n < tile.n1 ? n : tile.n0;
            w_word[i] = word(position + step * (at / kDotColumns), [&](std::int64_t k) { return p.w[k * p.n + column]; });
        }
    }

    __device__ __forceinline__ void store_stage() const {
#pragma unroll
        for (int i = 0; i < x_loads; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kDotThreads;
            if (at < x_words) x_row(at % depth)[at / depth] = x_word[i];
        }
#pragma unroll
        for (int i = 0; i < w_loads; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kDotThreads;
            w_row(at / kDotColumns)[at % kDotColumns] = w_word[i];
        }
    }

    __device__ __forceinline__ void run(float* results) {
        const int row = static_cast<int>(threadIdx.x) / kColumnThreads * R;
        const int column = static_cast<int>(threadIdx.x) % kColumnThreads * kColumns;
        float sum[R][kColumns] = {};
        std::uint32_t pairs[R][kColumns] = {};
        if (tile.start < tile.stop) load(tile.start);
#pragma unroll 1
        for (int position = tile.start; position < tile.stop; position += kDotDepth) {
            store_stage();
            __syncthreads();
            const int left = tile.stop - position, count = left < kDotDepth ? left : kDotDepth;
            if (left > kDotDepth) load(position + kDotDepth);
#pragma unroll 4
            for (int k = 0; k < (Dot ? count / 2 : count); ++k) {
                const auto x = replay::load_pack<replay::Pack<std::uint32_t, R>>(x_row(k) + row);
                const auto w = replay::load_pack<replay::Pack<std::uint32_t, kColumns>>(w_row(k) + column);
#pragma unroll
                for (int i = 0; i < R; ++i)
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        if constexpr (Dot)
                            multiply_halves(pairs[i][j], x.at[i], w.at[j]);
                        else
                            sum[i][j] = replay::fma_nearest(replay::float_of(x.at[i]), replay::float_of(w.at[j]), sum[i][j]);
                    }
                if (Dot && ((2 * k + 2) & (terms - 1)) == 0) end_dot(position + 2 * k + 2 - terms, column, pairs, sum);
            }
            __syncthreads();
        }
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < kColumns; ++j)
                if (tile.m0 + row + i < tile.m1 && tile.n0 + column + j < tile.n1)
                    results[tile.results + static_cast<std::int64_t>(row + i) * tile.row_size + column + j] = sum[i][j];
    }

    // The sums of even and odd neighbours, added in fp32 and scaled into the fp32 sum.
    __device__ __forceinline__ void end_dot(int first, int column, std::uint32_t (&pairs)[R][kColumns], float (&sum)[R][kColumns]) const {
        const std::int64_t group = p.group[p.order[first]];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int n = tile.n0 + column + j;
            const float scale = replay::operand_value(p.scales[group * p.n + (n < tile.n1 ? n : tile.n0)], p.is_bf16);
#pragma unroll
            for (int i = 0; i < R; ++i) {
                const float dot = replay::add_nearest(low_half(pairs[i][j]), high_half(pairs[i][j]));
                sum[i][j] = replay::fma_nearest(dot, scale, sum[i][j]);
                pairs[i][j] = 0;
            }
        }
    }
};

template <int R, bool Dot>
__global__ void __launch_bounds__(kDotThreads) dot_tiles(const replay::Problem p, int terms, const replay::ChainTile* tiles, float* results) {
    const replay::ChainTile tile = tiles[blockIdx.x];
    DotTile<R, Dot> own{p, tile, terms, {}, {}};
    own.run(results);
}

}  // namespace qlab::planned
