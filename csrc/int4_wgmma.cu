// Launches of the INT4 kernel for many rows; its machine code is for sm_90a alone.
#include "int4_wgmma.cuh"

#include "int4_launch.hpp"

namespace qlab::cuda {
namespace {

using namespace qlab::int4;

template <int kRows, int kColumns, int kChains, bool kTotal = false>
struct Tile {
    using Shape = WgmmaShape<kRows, kColumns, kChains, kTotal>;

    static Int4Row row() { return {"wgmma", kRows, kColumns, kChains, kTotal, Shape::kPerSm}; }

    static void start(const Int4& o, const Int4Launch& launch) { o.is_bf16 ? start_typed<Bf16>(o, launch) : start_typed<Fp16>(o, launch); }

    template <class T>
    static void start_typed(const Int4& o, const Int4Launch& launch) {
        const auto kernel = o.group_rows > 1 ? int4_wgmma<Shape, T, true> : int4_wgmma<Shape, T, false>;
        launch_int4(kernel, "int4_wgmma", Shape::kThreads, Shape::shared_bytes(o.block_words), launch, arguments(o, launch),
                    map_of_x(o, kRows, 1, "int4_wgmma"));
    }
};

using All = Variants<Tile<256, 128, 1>, Tile<16, 256, 1>, Tile<32, 256, 1>, Tile<64, 256, 1>, Tile<128, 256, 1>, Tile<16, 128, 1>,
                     Tile<32, 128, 1>, Tile<64, 128, 1>, Tile<128, 128, 1>, Tile<32, 256, 2>, Tile<32, 128, 2>, Tile<64, 256, 2>,
                     Tile<64, 128, 2>, Tile<32, 64, 4>, Tile<64, 64, 4>, Tile<64, 256, 1, true>, Tile<128, 128, 1, true>,
                     Tile<176, 128, 1, true>>;

}  // namespace

std::vector<Int4Row> wgmma_variants() { return All::rows(); }

void run_int4_wgmma(int variant, const Int4& operands, const Int4Launch& launch) { All::run(variant, operands, launch); }

}  // namespace qlab::cuda
