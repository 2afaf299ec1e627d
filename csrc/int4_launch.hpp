// What the launches of both INT4 kernels share; included by .cu files.
#pragma once

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
    a.m = o.m, a.n = o.n, a.k = o.k;
    a.block_words = o.block_words, a.group_rows = o.group_rows, a.cut = launch.cut, a.cluster = launch.cluster, a.share = launch.share;
    a.has_zeros = o.has_zeros, a.integer = o.integer;
    return a;
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

// Of one source file: kernel, tile rows, tile columns, chains, running total; and how one of them is launched.
using Int4Row = std::tuple<std::string, int, int, int, bool>;
std::vector<Int4Row> mma_variants();
std::vector<Int4Row> wgmma_variants();
void run_int4_mma(int variant, const Int4& operands, const Int4Launch& launch);
void run_int4_wgmma(int variant, const Int4& operands, const Int4Launch& launch);

}  // namespace qlab::cuda
