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

}  // namespace qlab::cuda
