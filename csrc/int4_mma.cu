// Launches of the INT4 kernel for a few rows, and the list of all variants.
#include "int4_launch.hpp"
#include "int4_mma.cuh"

namespace qlab::cuda {
namespace {

using namespace qlab::int4;

template <class... S>
struct Shapes {
    static std::vector<Int4Row> rows() { return {Int4Row("mma", S::kRows, S::kColumns, S::kChains, false)...}; }

    static void run(int variant, const Int4& o, const Int4Launch& launch) {
        int i = 0;
        ((i++ == variant ? start<S>(o, launch) : void()), ...);
    }

    template <class Shape>
    static void start(const Int4& o, const Int4Launch& launch) {
        const int bytes = Shape::shared_bytes(o.block_words);
        if (o.is_bf16)
            launch_int4(int4_mma<Shape, Bf16>, "int4_mma", Shape::kThreads, bytes, launch, arguments(o, launch));
        else
            launch_int4(int4_mma<Shape, Fp16>, "int4_mma", Shape::kThreads, bytes, launch, arguments(o, launch));
    }
};

using All = Shapes<MmaShape<8, 128, 1>, MmaShape<8, 64, 1>, MmaShape<8, 128, 2>, MmaShape<8, 64, 2>, MmaShape<8, 128, 4>,
                   MmaShape<8, 64, 4>, MmaShape<16, 128, 1>, MmaShape<16, 64, 1>, MmaShape<16, 128, 2>, MmaShape<16, 64, 2>,
                   MmaShape<16, 128, 4>, MmaShape<16, 64, 4>>;

}  // namespace

std::vector<Int4Row> mma_variants() { return All::rows(); }

void run_int4_mma(int variant, const Int4& operands, const Int4Launch& launch) { All::run(variant, operands, launch); }

std::vector<Int4Variant> int4_variants() {
    std::vector<Int4Variant> all;
    for (const auto& rows : {mma_variants(), wgmma_variants()})
        for (const auto& [kernel, tile_rows, columns, chains, total] : rows)
            all.emplace_back(kernel, tile_rows, columns, chains, total, static_cast<int>(all.size()));
    return all;
}

void run_int4(int variant, const Int4& operands, const Int4Launch& launch) {
    if (launch.blocks == 0) return;
    const int first = static_cast<int>(mma_variants().size()), count = first + static_cast<int>(wgmma_variants().size());
    if (variant < 0 || variant >= count) throw std::invalid_argument("no such variant of the INT4 kernels");
    variant < first ? run_int4_mma(variant, operands, launch) : run_int4_wgmma(variant - first, operands, launch);
}

}  // namespace qlab::cuda
