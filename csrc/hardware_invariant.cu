// Launches of the hardware-invariant GEMM.
#include "hardware_invariant.cuh"

#include "cuda.hpp"
#include "cuda_launch.hpp"

namespace qlab::cuda {
namespace {

using namespace qlab::hardware_invariant;

// Calls `f` with each tile in turn; their order is that of hardware_invariant_tiles.
template <class F>
void each_tile(F f) {
    f(Tile<1, 16>{}), f(Tile<1, 32>{});
    f(Tile<2, 16>{}), f(Tile<2, 32>{});
    f(Tile<4, 16>{}), f(Tile<4, 32>{});
    f(Tile<8, 32>{}), f(Tile<8, 64>{});
    f(Tile<16, 32>{}), f(Tile<16, 64>{});
}

template <class T, bool IsBf16>
void launch(const hardware_invariant::Operands& o, bool overlap, cudaStream_t stream) {
    const auto kernel = gemm<T, IsBf16>;
    const int warps = o.slices < T::warps ? o.slices : T::warps;
    const int shared = T::shared(warps, o.slices);
    if (shared > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "hardware_invariant");
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((o.m - 1) / T::rows + 1, (o.n - 1) / T::columns + 1);
    config.blockDim = dim3(32 * warps);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = overlap ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, o), "hardware_invariant");
}

}  // namespace

std::vector<std::pair<int, int>> hardware_invariant_tiles() {
    std::vector<std::pair<int, int>> found;
    each_tile([&](auto t) { found.emplace_back(t.rows, t.columns); });
    return found;
}

void run_hardware_invariant(int tile, const HardwareInvariant& g, std::uint64_t stream) {
    if (g.m == 0 || g.n == 0) return;
    const auto bits = [](std::uint64_t address) { return reinterpret_cast<std::uint16_t*>(address); };
    const int blocks = (g.k + kBlockRows - 1) / kBlockRows;
    const int slices = g.slice_blocks > 0 ? (blocks + g.slice_blocks - 1) / g.slice_blocks : 0;
    if (slices < 1 || slices > kMaxSlices || g.k % kChunk || (g.scale_rows != 1 && g.scale_rows != 2 && g.scale_rows != 4))
        throw std::invalid_argument("K must be a multiple of 32 in 1 to 16 slices, with 1, 2 or 4 rows of scales in a block");
    const int words = kCodeWords + (kScaleWords + (g.has_zeros ? kZeroWords : 0)) * g.scale_rows;
    const int shift = g.scale_rows == 4 ? 0 : 3 - g.scale_rows;
    const hardware_invariant::Operands o{bits(g.x), g.x_stride, reinterpret_cast<const std::uint32_t*>(g.blocks), bits(g.y),
                                         g.m, g.n, g.k, words, g.scale_rows, shift, (1 << shift) - 1, g.has_zeros,
                                         g.slice_blocks, slices};
    const auto s = reinterpret_cast<cudaStream_t>(stream);
    int at = 0;
    each_tile([&](auto t) {
        if (at++ != tile) return;
        using T = decltype(t);
        g.is_bf16 ? launch<T, true>(o, g.overlap, s) : launch<T, false>(o, g.overlap, s);
    });
    if (tile < 0 || tile >= at) throw std::invalid_argument("unknown tile");
}

}  // namespace qlab::cuda
