// The INT4 GEMM kernels behind integers (int4_mma.cuh, int4_wgmma.cuh); addresses are device memory.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace qlab::cuda {

struct Int4 {
    std::uint64_t x;  // rows of K elements, and of zeros to the next multiple of 64
    std::int64_t x_stride;
    std::uint64_t blocks, column_scales, y, workspace, counters, pieces, starts;
    std::int32_t m, n, k, block_words, group_rows;
    bool is_bf16, has_zeros, integer;
};

struct Int4Launch {
    std::int32_t blocks, cut;
    std::int32_t cluster;  // thread blocks in a cluster: they hold the pieces of one tile, one each, in the order of joining; or 1
    std::int32_t slices, slice_rows, columns;  // of a plan whose pieces follow from the thread blocks' numbers; slice_rows 0: of another
    std::int32_t join;  // int4::Join (int4_fragments.cuh)
    bool overlap;  // whether the launch may begin while the kernel before it still runs (programmatic dependent launch)
    std::uint64_t stream;
};

// Kernel, tile rows, tile columns, chains, whether it keeps a running total, index, thread blocks that a multiprocessor runs at once.
using Int4Variant = std::tuple<std::string, int, int, int, bool, int, int>;
std::vector<Int4Variant> int4_variants();
void run_int4(int variant, const Int4& operands, const Int4Launch& launch);

}  // namespace qlab::cuda
