// The hardware-invariant GEMM on the CPU: the device code itself (csrc/hardware_invariant.cuh) under the headers of on_host/.
#include "hardware_invariant.cuh"

namespace qlab::hardware_invariant {

float4 shared[32 << 10];

namespace {

template <class T>
void run(const Operands& o, bool is_bf16) {
    const int warps = o.slices < T::warps ? o.slices : T::warps;
    if (static_cast<std::size_t>(T::shared(warps, o.slices)) > sizeof shared) return;
    std::memset(shared, 0xFF, sizeof shared);  // NaN wherever nothing was written
    const Index blocks{static_cast<unsigned>((o.m - 1) / T::rows + 1), static_cast<unsigned>((o.n - 1) / T::columns + 1)};
    on_host::launch(blocks, 32u * static_cast<unsigned>(warps), [&] { is_bf16 ? gemm<T, true>(o) : gemm<T, false>(o); });
}

}  // namespace
}  // namespace qlab::hardware_invariant

using namespace qlab::hardware_invariant;

extern "C" void run_tile(int rows, int columns, const std::uint16_t* x, std::int64_t x_stride, const std::uint32_t* blocks,
                         std::uint16_t* y, int m, int n, int k, int block_words, int scale_rows, int has_zeros, int is_bf16,
                         int slice_blocks) {
    const int all = (k + kBlockRows - 1) / kBlockRows, shift = scale_rows == 4 ? 0 : 3 - scale_rows;
    const Operands o{x, x_stride, blocks, y, m, n, k, block_words, scale_rows, shift, (1 << shift) - 1,
                     has_zeros != 0, slice_blocks, (all + slice_blocks - 1) / slice_blocks};
    const auto with = [&](auto tile) {
        if (tile.rows == rows && tile.columns == columns) run<decltype(tile)>(o, is_bf16 != 0);
    };
    with(Tile<4, 16>{});
#ifndef QLAB_ONE_TILE
    with(Tile<1, 16>{}), with(Tile<1, 32>{}), with(Tile<2, 16>{}), with(Tile<2, 32>{}), with(Tile<4, 32>{});
    with(Tile<8, 32>{}), with(Tile<8, 64>{}), with(Tile<16, 32>{}), with(Tile<16, 64>{});
#endif
}
