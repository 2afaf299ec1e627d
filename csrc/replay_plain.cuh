// The other kernels of the CUDA replay engine: chains of any step, one column and a few rows per thread, and the join of all
// chains of a region by its postfix program.
#pragma once

#include "replay_chain.cuh"

namespace qlab::replay {

constexpr int kPlainRows = 4, kPlainColumns = 128;

// Tiles of the fast kernel, the largest first: rows and columns per thread, warps along both, blocks per multiprocessor.
using Tall = Shape<8, 4, 8, 1, 2>;    // 64 x 128
using Large = Shape<8, 4, 4, 1, 4>;   // 32 x 128
using Medium = Shape<4, 4, 4, 1, 4>;  // 16 x 128
using Small = Shape<4, 2, 2, 2, 4>;   // 8 x 128
using Thin = Shape<4, 1, 1, 4, 4>;    // 4 x 128
constexpr int kShapes = 5;

template <class F>
void with_shape(int shape, F f) {
    switch (shape) {
        case 0: f(Tall{}); break;
        case 1: f(Large{}); break;
        case 2: f(Medium{}); break;
        case 3: f(Small{}); break;
        default: f(Thin{});
    }
}

// One row of a tile after the other would decode w again and again; a thread takes its column of w to all of them at once.
__device__ __forceinline__ void fma_rows(const Problem& p, const Rule& rule, const ChainTile& tile, int n, float* sum) {
    for (int i = tile.start; i < tile.stop; ++i) {
        const std::int64_t k = p.order[i];
        const float w = operand_value(p.w[k * p.n + n], p.is_bf16);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) {
            if (tile.m0 + r >= tile.m1) break;
            const float x = operand_value(p.x[static_cast<std::int64_t>(tile.m0 + r) * p.k + k], p.is_bf16);
            sum[r] = rule.half ? fma_half(x, w, sum[r], p.is_bf16) : fma_nearest(x, w, sum[r]);
        }
    }
}

// ExLlama's: two fp16 sums over the even and the odd of `terms` neighbours, added in fp32 and scaled into the fp32 sum.
__device__ __forceinline__ void half_dot_rows(const Problem& p, const Rule& rule, const ChainTile& tile, int n, float* sum) {
    for (int first = tile.start; first < tile.stop; first += rule.terms) {
        float even[kPlainRows] = {}, odd[kPlainRows] = {};
        for (int i = first; i < first + rule.terms; ++i) {
            const std::int64_t k = p.order[i];
            const float w = operand_value(p.w[k * p.n + n], p.is_bf16);
            const bool is_even = (i - first) % 2 == 0;
#pragma unroll
            for (int r = 0; r < kPlainRows; ++r) {
                if (tile.m0 + r >= tile.m1) break;
                const float x = operand_value(p.x[static_cast<std::int64_t>(tile.m0 + r) * p.k + k], p.is_bf16);
                const float next = fma_half(x, w, is_even ? even[r] : odd[r], p.is_bf16);
                even[r] = is_even ? next : even[r];
                odd[r] = is_even ? odd[r] : next;
            }
        }
        const std::int64_t g = p.group[p.order[first]];
        const float scale = operand_value(p.scales[g * p.n + n], p.is_bf16);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) sum[r] = fma_nearest(add_nearest(even[r], odd[r]), scale, sum[r]);
    }
}

__device__ __forceinline__ void tensor_core_rows(const Problem& p, const Rule& rule, const ChainTile& tile, int n, float* sum) {
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
        if (tile.m0 + r >= tile.m1) break;
        const std::uint16_t* x = p.x + static_cast<std::int64_t>(tile.m0 + r) * p.k;
        float total = 0.0f;
#pragma unroll 1
        for (int first = tile.start; first < tile.stop; first += rule.terms)
            total = fused_sum(total, rule, p.is_bf16, [&](int t) {
                const std::int64_t k = p.order[first + t];
                return x[k] | static_cast<std::uint32_t>(p.w[k * p.n + n]) << 16;
            });
        sum[r] = total;
    }
}

__global__ void __launch_bounds__(kPlainColumns)
    plain_chains(const Problem p, const Rule rule, const ChainTile* tiles, float* results) {
    const ChainTile tile = tiles[blockIdx.x];
    const int n = tile.n0 + static_cast<int>(threadIdx.x);
    if (n >= tile.n1) return;
    float sum[kPlainRows] = {};
    if (rule.kind == tensor_core)
        tensor_core_rows(p, rule, tile, n, sum);
    else if (rule.kind == fma_chain)
        fma_rows(p, rule, tile, n, sum);
    else
        half_dot_rows(p, rule, tile, n, sum);
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r)
        if (tile.m0 + r < tile.m1)
            results[tile.results + static_cast<std::int64_t>(r) * tile.row_size + threadIdx.x] = canonical(sum[r]);
}

// ---- join
enum Op { op_chain = 0, op_add = 1, op_round = 2, op_scale = 3, op_bias = 4, op_scale_bias = 5 };
constexpr int kStack = 8;

struct JoinTile {
    std::int32_t m0, m1, n0, n1;
    std::int32_t first_op, last_op;  // of `ops`
    std::int32_t results, row_size;  // the tile's first result of the region's first chain
    std::int32_t chain_size;         // distance to the next chain's results
};

struct OpRow {
    std::int32_t code, argument, start, stop;
};

// The value of one output's program; `results` points at its first chain's.
__device__ __forceinline__ float joined(const Problem& p, const OpRow* ops, int count, const float* results, int chain_size, int n) {
    float stack[kStack];
    int depth = 0;
    for (int i = 0; i < count; ++i) {
        const OpRow op = ops[i];
        if (op.code == op_chain) {
            stack[depth++] = *results;
            results += chain_size;
            continue;
        }
        const double scale = op.code == op_scale || op.code == op_scale_bias ? operand_value(p.scales[n], p.is_bf16) : 1.0f;
        const float bias = op.code == op_bias || op.code == op_scale_bias ? operand_value(p.bias[n], p.is_bf16) : 0.0f;
        if (op.code == op_add) {
            --depth;
            stack[depth - 1] = add_values(stack[depth - 1], stack[depth], op.argument);
        } else if (op.code == op_round) {
            stack[depth - 1] = nearest(stack[depth - 1], op.argument);
        } else if (op.code == op_scale) {
            stack[depth - 1] = nearest(multiply_nearest(stack[depth - 1], scale), op.argument);
        } else {
            stack[depth - 1] = nearest(add_to_odd(multiply_nearest(stack[depth - 1], scale), bias), op.argument);
        }
    }
    return stack[0];
}

// y takes the values' 16 bits, or with `raw` the fp32 values that the programs leave.
__global__ void __launch_bounds__(kPlainColumns)
    join_chains(const Problem p, const OpRow* ops, const JoinTile* tiles, const float* results, void* y, bool raw) {
    const JoinTile tile = tiles[blockIdx.x];
    const int n = tile.n0 + static_cast<int>(threadIdx.x);
    if (n >= tile.n1) return;
    for (int m = tile.m0; m < tile.m1; ++m) {
        const float* own = results + tile.results + static_cast<std::int64_t>(m - tile.m0) * tile.row_size + threadIdx.x;
        const float value = joined(p, ops + tile.first_op, tile.last_op - tile.first_op, own, tile.chain_size, n);
        const std::int64_t at = static_cast<std::int64_t>(m) * p.n + n;
        if (raw)
            static_cast<float*>(y)[at] = canonical(value);
        else
            static_cast<std::uint16_t*>(y)[at] = output_bits(value, p.is_bf16);
    }
}

}  // namespace qlab::replay
