// What the launches of both INT4 kernels share; included by .cu files.
#pragma once

#include <cuda.h>

#include "cuda_launch.hpp"
#include "int4_fragments.cuh"
#include "int4_gemm.hpp"

namespace qlab::cuda {

inline int4::Arguments arguments(const Int4& o, const Int4Launch& launch) {
    const auto at = [](std::uint64_t address) { return reinterpret_cast<void*>(address); };
    int4::Arguments a{};
    a.x = static_cast<const std::uint16_t*>(at(o.x));
    a.x_stride = o.x_stride;
    a.blocks = static_cast<const std::uint32_t*>(at(o.blocks));
    a.column_scales = static_cast<const std::uint16_t*>(at(o.column_scales));
    a.y = static_cast<std::uint16_t*>(at(o.y));
    a.workspace = static_cast<float*>(at(o.workspace));
    a.counters = static_cast<int*>(at(o.counters));
    a.pieces = static_cast<const int4::Piece*>(at(o.pieces));
    a.starts = static_cast<const int*>(at(o.starts));
    a.slices = launch.slices, a.slice_rows = launch.slice_rows, a.tile_columns = launch.columns;
    a.m = o.m, a.n = o.n, a.k = o.k;
    a.block_words = o.block_words, a.group_rows = o.group_rows, a.cut = launch.cut, a.cluster = launch.cluster, a.join = static_cast<int4::Join>(launch.join);
    a.has_zeros = o.has_zeros, a.integer = o.integer;
    return a;
}

// x as the copy engine of Hopper sees it: `boxes` side by side, each of 64 k by `rows` rows, the 16-byte parts of 128 bytes
// exchanged by the row, zeros beyond the ends. With several boxes the dimensions are 64 k, rows and k / 64: in memory rows of x are
// whole boxes.
inline CUtensorMap map_of_x(const Int4& o, int rows, int boxes, const char* name) {
    static const auto encode = [name] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), name);
        if (!found) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; the INT4 kernels need CUDA 12 or later on Hopper");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    CUtensorMap map;
    const cuuint64_t width = boxes > 1 ? 64 : o.k;
    const cuuint64_t sizes[] = {width, static_cast<cuuint64_t>(o.m), static_cast<cuuint64_t>((o.k + 63) / 64)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * o.x_stride), 128};
    const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(boxes)}, steps[] = {1, 1, 1};
    const auto type = o.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult status = encode(&map, type, boxes > 1 ? 3 : 2, reinterpret_cast<void*>(o.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw std::runtime_error("CUDA refused x as a tensor map: error " + std::to_string(status));
    return map;
}

template <class... Parameters>
void launch_int4(void (*kernel)(Parameters...), const char* name, int threads, int shared_bytes, const Int4Launch& launch,
                 Parameters... parameters) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(launch.blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(launch.stream);
    config.attrs = attributes;
    if (launch.overlap) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (launch.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = launch.cluster;
        attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
        ++config.numAttrs;
    }
    check(cudaLaunchKernelEx(&config, kernel, parameters...), name);
}

// What a source file compiles: each of Kernels says its row and starts itself.
template <class... Kernels>
struct Variants {
    static auto rows() { return std::vector{Kernels::row()...}; }

    static void run(int variant, const Int4& o, const Int4Launch& launch) {
        int i = 0;
        ((i++ == variant ? Kernels::start(o, launch) : void()), ...);
    }
};

// Of one source file: kernel, tile rows, tile columns, chains, running total, thread blocks at once; and how one of them is launched.
using Int4Row = std::tuple<std::string, int, int, int, bool, int>;
std::vector<Int4Row> mma_variants();
std::vector<Int4Row> wgmma_variants();
void run_int4_mma(int variant, const Int4& operands, const Int4Launch& launch);
void run_int4_wgmma(int variant, const Int4& operands, const Int4Launch& launch);

}  // namespace qlab::cuda
