// Launches of the INT4 kernel for many rows; its machine code is for sm_90a alone.
#include "int4_wgmma.cuh"

#include "int4_launch.hpp"

namespace qlab::cuda {
namespace {

using namespace qlab::int4;

template <class... S>
struct Shapes {
    static std::vector<Int4Row> rows() { return {Int4Row("wgmma", S::kRows, S::kColumns, S::kChains, S::kTotal, S::kPerSm)...}; }

    static void run(int variant, const Int4& o, const Int4Launch& launch) {
        int i = 0;
        ((i++ == variant ? start<S>(o, launch) : void()), ...);
    }

    template <class Shape>
    static void start(const Int4& o, const Int4Launch& launch) {
        o.is_bf16 ? start_typed<Shape, Bf16>(o, launch) : start_typed<Shape, Fp16>(o, launch);
    }

    template <class Shape, class T>
    static void start_typed(const Int4& o, const Int4Launch& launch) {
        const auto kernel = o.group_rows > 1 ? int4_wgmma<Shape, T, true> : int4_wgmma<Shape, T, false>;
        launch_int4(kernel, "int4_wgmma", Shape::kThreads, Shape::shared_bytes(o.block_words), launch, arguments(o, launch),
                    map_of_x(o, Shape::kRows, 1, "int4_wgmma"));
    }
};

using All = Shapes<WgmmaShape<256, 128, 1>, WgmmaShape<16, 256, 1>, WgmmaShape<32, 256, 1>, WgmmaShape<64, 256, 1>,
                   WgmmaShape<128, 256, 1>, WgmmaShape<16, 128, 1>, WgmmaShape<32, 128, 1>, WgmmaShape<64, 128, 1>, WgmmaShape<128, 128, 1>,
                   WgmmaShape<32, 256, 2>, WgmmaShape<32, 128, 2>, WgmmaShape<64, 256, 2>, WgmmaShape<64, 128, 2>,
                   WgmmaShape<32, 64, 4>, WgmmaShape<64, 64, 4>, WgmmaShape<64, 256, 1, true>, WgmmaShape<128, 128, 1, true>,
                   WgmmaShape<176, 128, 1, true>>;

}  // namespace

std::vector<Int4Row> wgmma_variants() { return All::rows(); }

void run_int4_wgmma(int variant, const Int4& operands, const Int4Launch& launch) { All::run(variant, operands, launch); }

}  // namespace qlab::cuda
