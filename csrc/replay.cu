// Launches of the replay engine's kernels.
#include "cuda.hpp"
#include "cuda_launch.hpp"
#include "replay_plain.cuh"

namespace qlab::cuda {
namespace {

using namespace qlab::replay;

Problem problem(const Operands& o) {
    const auto bits = [](std::uint64_t address) { return reinterpret_cast<const std::uint16_t*>(address); };
    const auto integers = [](std::uint64_t address) { return reinterpret_cast<const std::int32_t*>(address); };
    return {bits(o.x), bits(o.w), integers(o.order), bits(o.scales), integers(o.group), bits(o.bias), o.k, o.n, o.is_bf16};
}

template <class S>
void launch(const Problem& p, const Rule& rule, const ChainTile* tiles, int count, float* results, cudaStream_t stream) {
    if (p.is_bf16)
        fast_chains<S, true, false><<<count, S::threads, 0, stream>>>(p, rule, tiles, results);
    else if (rule.half)
        fast_chains<S, false, true><<<count, S::threads, 0, stream>>>(p, rule, tiles, results);
    else
        fast_chains<S, false, false><<<count, S::threads, 0, stream>>>(p, rule, tiles, results);
}

}  // namespace

void set_device(int device) { check(cudaSetDevice(device), "kernels of this device"); }

std::vector<std::pair<int, int>> chain_tiles() {
    std::vector<std::pair<int, int>> tiles;
    for (int i = 0; i < kShapes; ++i) with_shape(i, [&](auto s) { tiles.emplace_back(s.rows, s.columns); });
    tiles.emplace_back(kPlainRows, kPlainColumns);
    return tiles;
}

bool is_fast(const StepRow& step, bool is_bf16) { return fast_rule(rule_of(step), is_bf16); }

void run_chains(int shape, const Operands& operands, const StepRow& step, std::uint64_t tiles, int count, std::uint64_t results,
                std::uint64_t stream) {
    if (count == 0) return;
    const Problem p = problem(operands);
    const Rule rule = rule_of(step);
    const auto* t = reinterpret_cast<const ChainTile*>(tiles);
    auto* r = reinterpret_cast<float*>(results);
    auto s = reinterpret_cast<cudaStream_t>(stream);
    if (shape < 0 || shape > kShapes) throw std::invalid_argument("unknown shape of tiles");
    if (shape == kShapes)
        plain_chains<<<count, kPlainColumns, 0, s>>>(p, rule, t, r);
    else if (fast_rule(rule, p.is_bf16))
        with_shape(shape, [&](auto tile) { launch<decltype(tile)>(p, rule, t, count, r, s); });
    else
        throw std::invalid_argument("this step has no fast kernel");
    check(cudaGetLastError(), "chains");
}

void run_join(const Operands& operands, std::uint64_t ops, std::uint64_t tiles, int count, std::uint64_t results, std::uint64_t y,
              bool raw, std::uint64_t stream) {
    if (count == 0) return;
    join_chains<<<count, kPlainColumns, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
        problem(operands), reinterpret_cast<const OpRow*>(ops), reinterpret_cast<const JoinTile*>(tiles),
        reinterpret_cast<const float*>(results), reinterpret_cast<void*>(y), raw);
    check(cudaGetLastError(), "join");
}

}  // namespace qlab::cuda
