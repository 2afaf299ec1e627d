// Launches of the INT4 kernel for a few rows, and the list of all variants.
#include "int4_mma.cuh"

#include "int4_launch.hpp"

namespace qlab::cuda {
namespace {

using namespace qlab::int4;

int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    check(cudaGetDevice(&device), "int4_mma");
    check(cudaDeviceGetAttribute(&value, attribute, device), "int4_mma");
    return value;
}

template <int kRows, int kChains>
struct Tile {
    static Int4Row row() { return {"mma", kRows, kBlockColumns, kChains, false, 1}; }

    // As many teams of warps as keep multiprocessors busy: about four on each of them, of chains that differ.
    static void start(const Int4& o, const Int4Launch& launch) {
        const int sms = device_attribute(cudaDevAttrMultiProcessorCount);
        if constexpr (kChains == 4)
            if (launch.blocks <= sms) return start_teams<4>(o, launch);
        if constexpr (kChains > 1)
            if (launch.blocks <= 2 * sms) return start_teams<2>(o, launch);
        start_teams<1>(o, launch);
    }

    template <int kTeams>
    static void start_teams(const Int4& o, const Int4Launch& launch) {
        if (o.group_rows > 1)
            start_shape<MmaShape<kRows, kChains, true, kTeams>>(o, launch);
        else
            start_shape<MmaShape<kRows, kChains, false, kTeams>>(o, launch);
    }

    template <class S>
    static void start_shape(const Int4& o, const Int4Launch& launch) {
        const bool has_copy_engine = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;  // before it threads copy x
        const auto kernel = o.is_bf16 ? int4_mma<S, Bf16> : int4_mma<S, Fp16>;
        launch_int4(kernel, "int4_mma", S::kThreads, S::kSharedBytes, launch, arguments(o, launch),
                    has_copy_engine ? map_of_x(o, S::kRows, S::kBoxes, "int4_mma") : CUtensorMap{});
    }
};

using All = Variants<Tile<8, 1>, Tile<8, 2>, Tile<8, 4>, Tile<16, 1>, Tile<16, 2>, Tile<16, 4>>;

}  // namespace

std::vector<Int4Row> mma_variants() { return All::rows(); }

void run_int4_mma(int variant, const Int4& operands, const Int4Launch& launch) { All::run(variant, operands, launch); }

std::vector<Int4Variant> int4_variants() {
    std::vector<Int4Variant> all;
    for (const auto& rows : {mma_variants(), wgmma_variants()})
        for (const auto& [kernel, tile_rows, columns, chains, total, per_sm] : rows)
            all.emplace_back(kernel, tile_rows, columns, chains, total, static_cast<int>(all.size()), per_sm);
    return all;
}

void run_int4(int variant, const Int4& operands, const Int4Launch& launch) {
    if (launch.blocks == 0) return;
    const int first = static_cast<int>(mma_variants().size()), count = first + static_cast<int>(wgmma_variants().size());
    if (variant < 0 || variant >= count) throw std::invalid_argument("no such variant of the INT4 kernels");
    variant < first ? run_int4_mma(variant, operands, launch) : run_int4_wgmma(variant - first, operands, launch);
}

}  // namespace qlab::cuda
