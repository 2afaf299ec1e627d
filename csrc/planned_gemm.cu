// Launches of the planned GEMM.
#include "cuda.hpp"
#include "cuda_launch.hpp"
#include "planned_dot.cuh"

namespace qlab::cuda {
namespace {

using namespace qlab::planned;

replay::Problem problem(const Operands& o) {
    const auto bits = [](std::uint64_t address) { return reinterpret_cast<const std::uint16_t*>(address); };
    const auto integers = [](std::uint64_t address) { return reinterpret_cast<const std::int32_t*>(address); };
    return {bits(o.x), bits(o.w), integers(o.order), bits(o.scales), integers(o.group), bits(o.bias), o.k, o.n, o.is_bf16};
}

// Calls f(kernel, shape) for the kernel of a shape and an instruction.
template <class F>
void with_kernel(int shape, int depth, bool is_bf16, bool half, F f) {
    if (shape < 0 || shape >= kShapes || (depth != 8 && depth != 16) || (is_bf16 && half))
        throw std::invalid_argument("unknown shape of tiles or instruction");
    with_shape(shape, [&](auto s) {
        using S = decltype(s);
        const auto pick = [&](auto deep, auto shallow) { f(depth == 16 ? deep : shallow, s); };
        if (is_bf16)
            pick(&planned_tiles<S, 16, true, false>, &planned_tiles<S, 8, true, false>);
        else if (half)
            pick(&planned_tiles<S, 16, false, true>, &planned_tiles<S, 8, false, true>);
        else
            pick(&planned_tiles<S, 16, false, false>, &planned_tiles<S, 8, false, false>);
    });
}

template <class Kernel>
void allow(Kernel kernel, int bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "the planned GEMM: its shared memory");
}

template <int R, bool Dot>
void launch_dots(const replay::Problem& p, int terms, std::uint64_t tiles, int count, std::uint64_t results, cudaStream_t stream) {
    dot_tiles<R, Dot><<<count, kDotThreads, DotTile<R, Dot>::bytes, stream>>>(p, terms, reinterpret_cast<const replay::ChainTile*>(tiles),
                                                                              reinterpret_cast<float*>(results));
}

}  // namespace

std::vector<std::pair<int, int>> planned_tile_sizes() {
    std::vector<std::pair<int, int>> tiles;
    for (int i = 0; i < kShapes; ++i) with_shape(i, [&](auto s) { tiles.emplace_back(s.rows, s.columns); });
    return tiles;
}

int planned_blocks(int shape, int depth, bool is_bf16, bool half) {
    int blocks = 0;
    with_kernel(shape, depth, is_bf16, half, [&](auto kernel, auto s) {
        allow(kernel, s.bytes);
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, s.threads, s.bytes), "the planned GEMM");
    });
    return blocks;
}

void run_planned(const Planned& how, const Operands& operands, std::uint64_t ops, std::uint64_t tiles, int count,
                 std::uint64_t scratch, std::uint64_t out, std::uint64_t stream) {
    if (count == 0) return;
    const Work work{problem(operands),
                    reinterpret_cast<const OpRow*>(ops),
                    reinterpret_cast<const replay::ChainTile*>(tiles),
                    reinterpret_cast<float*>(scratch),
                    reinterpret_cast<void*>(out),
                    count,
                    how.levels,
                    how.whole,
                    how.aligned,
                    how.gathered};
    with_kernel(how.shape, how.depth, operands.is_bf16, how.half, [&](auto kernel, auto s) {
        allow(kernel, s.bytes);
        kernel<<<how.blocks < count ? how.blocks : count, s.threads, s.bytes, reinterpret_cast<cudaStream_t>(stream)>>>(work);
    });
    check(cudaGetLastError(), "the planned GEMM");
}

void run_dots(int rows, bool dot, int terms, const Operands& operands, std::uint64_t tiles, int count, std::uint64_t results,
              std::uint64_t stream) {
    if (count == 0) return;
    if (dot && (terms < 2 || terms > kDotDepth || (terms & (terms - 1))))
        throw std::invalid_argument("a dot of the planned GEMM has 2, 4, 8 or 16 terms");
    const auto launch = [&](auto few, auto many) { (rows == kDotRows ? few : many)(problem(operands), terms, tiles, count, results,
                                                                                  reinterpret_cast<cudaStream_t>(stream)); };
    if (rows != kDotRows && rows != 8 * kDotRows) throw std::invalid_argument("unknown rows of a tile");
    if (dot)
        launch(&launch_dots<1, true>, &launch_dots<8, true>);
    else
        launch(&launch_dots<1, false>, &launch_dots<8, false>);
    check(cudaGetLastError(), "the planned GEMM's dots");
}

std::vector<std::pair<int, int>> dot_tile_sizes() { return {{8 * kDotRows, kDotColumns}, {kDotRows, kDotColumns}}; }

}  // namespace qlab::cuda
