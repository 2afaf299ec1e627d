// What qlab._cuda launches; the binding (cuda.cpp) is compiled without nvcc. Addresses are device memory.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace qlab::cuda {

struct Operands {
    std::uint64_t x, w, order, scales, group, bias;
    std::int32_t k, n;
    bool is_bf16;
};

struct StepRow {
    std::int32_t kind, fraction_bits, terms, zero_exponent, accumulator;
};

// Later launches go to this device; the module has a CUDA runtime of its own, which may not know torch's choice.
void set_device(int device);

// Rows and columns of the tiles that run_chains takes for each of its `shape`s; the last one takes any step.
std::vector<std::pair<int, int>> chain_tiles();
bool is_fast(const StepRow& step, bool is_bf16);
void run_chains(int shape, const Operands& operands, const StepRow& step, std::uint64_t tiles, int count, std::uint64_t results,
                std::uint64_t stream);
void run_join(const Operands& operands, std::uint64_t ops, std::uint64_t tiles, int count, std::uint64_t results, std::uint64_t y,
              bool raw, std::uint64_t stream);

// d = mma.sync(a, b, c) for each of `count` tiles; shape_k is 8 or 16, half says that accumulators are fp16.
void run_mma(int shape_k, bool is_bf16, bool half, std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t d, int count,
             std::uint64_t stream);
// The same by the replay engine's arithmetic, in its fast form where it applies or in integers throughout; adds the number of
// fused sums that took the fast form to the 64-bit integer at `took_fast`.
void run_replayed_mma(int shape_k, const StepRow& step, bool is_bf16, bool fast, std::uint64_t a, std::uint64_t b, std::uint64_t c,
                      std::uint64_t d, std::uint64_t took_fast, int count, std::uint64_t stream);

// A hardware-invariant GEMM (hardware_invariant.cuh): x [m, k], rows x_stride elements apart, a weight in blocks of the layout
// `fragments`, y [m, n]. `slice_blocks`: blocks of 128 rows in a slice of K, which with k alone decides the bits.
struct HardwareInvariant {
    std::uint64_t x, blocks, y;
    std::int64_t x_stride;
    std::int32_t m, n, k, scale_rows;
    bool has_zeros, is_bf16;
    std::int32_t slice_blocks;
    bool overlap;  // with the end of the launch before it
};

// Rows and columns of a thread block's part of the output; a `tile` is an index here, and changes no bit.
std::vector<std::pair<int, int>> hardware_invariant_tiles();
void run_hardware_invariant(int tile, const HardwareInvariant& gemm, std::uint64_t stream);

// ---- the planned GEMM: programs on this GPU's own tensor cores
struct Planned {
    int shape, depth;  // of the tiles; k of one instruction: 16, or 8 for two in turn
    bool half, whole;  // fp16 accumulators; whole programs to y, or single chains to fp32 results
    bool aligned, gathered;  // see planned_gemm.cuh
    int levels, blocks;  // values below the top of the stack; blocks at most
};

std::vector<std::pair<int, int>> planned_tile_sizes();
// Blocks that a multiprocessor of the current device holds at once.
int planned_blocks(int shape, int depth, bool is_bf16, bool half);
void run_planned(const Planned& how, const Operands& operands, std::uint64_t ops, std::uint64_t tiles, int count,
                 std::uint64_t scratch, std::uint64_t out, std::uint64_t stream);
// Chains of fp32 fused multiply-adds, or of fp16 dots; rows and columns of their tiles.
std::vector<std::pair<int, int>> dot_tile_sizes();
void run_dots(int rows, bool dot, int terms, const Operands& operands, std::uint64_t tiles, int count, std::uint64_t results,
              std::uint64_t stream);

}  // namespace qlab::cuda
