// Launches of the INT4 kernel for many rows; its machine code is for sm_90a alone.
#include "int4_wgmma.cuh"

#include "int4_launch.hpp"

namespace qlab::cuda {
namespace {

using namespace qlab::int4;

// x as the copy engine sees it: boxes of 64 k by `rows` rows, swizzled as wgmma reads them, zeros beyond the ends.
CUtensorMap rows_of_x(const Int4& o, int rows) {
    static const auto encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "int4_wgmma");
        if (!found) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; int4_wgmma needs CUDA 12 or later");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    CUtensorMap map;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(o.k), static_cast<cuuint64_t>(o.m)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * o.x_stride)};
    const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1};
    const auto type = o.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult status = encode(&map, type, 2, reinterpret_cast<void*>(o.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw std::runtime_error("CUDA refused x as a tensor map: error " + std::to_string(status));
    return map;
}

template <class... S>
struct Shapes {
    static std::vector<Int4Row> rows() { return {Int4Row("wgmma", S::kRows, S::kColumns, S::kChains, S::kTotal)...}; }

    static void run(int variant, const Int4& o, const Int4Launch& launch) {
        int i = 0;
        ((i++ == variant ? start<S>(o, launch) : void()), ...);
    }

    template <class Shape>
    static void start(const Int4& o, const Int4Launch& launch) {
        const int bytes = Shape::shared_bytes(o.block_words);
        const CUtensorMap x = rows_of_x(o, Shape::kRows);
        if (o.is_bf16)
            launch_int4(int4_wgmma<Shape, Bf16>, "int4_wgmma", Shape::kThreads, bytes, launch, arguments(o, launch), x);
        else
            launch_int4(int4_wgmma<Shape, Fp16>, "int4_wgmma", Shape::kThreads, bytes, launch, arguments(o, launch), x);
    }
};

using All = Shapes<WgmmaShape<16, 256, 1>, WgmmaShape<32, 256, 1>, WgmmaShape<64, 256, 1>, WgmmaShape<128, 256, 1>,
                   WgmmaShape<16, 128, 1>, WgmmaShape<32, 128, 1>, WgmmaShape<64, 128, 1>, WgmmaShape<128, 128, 1>,
                   WgmmaShape<64, 256, 2>, WgmmaShape<64, 128, 2>, WgmmaShape<64, 64, 4>, WgmmaShape<64, 256, 1, true>,
                   WgmmaShape<128, 128, 1, true>>;

}  // namespace

std::vector<Int4Row> wgmma_variants() { return All::rows(); }

void run_int4_wgmma(int variant, const Int4& operands, const Int4Launch& launch) { All::run(variant, operands, launch); }

}  // namespace qlab::cuda
