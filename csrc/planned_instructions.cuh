// The instructions of the planned GEMM, one function each; the tests put the host's in their place.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace qlab::planned {

using Address = std::uint32_t;  // in shared memory

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

// Volatile: computed once, and not anew wherever it is used.
__device__ __forceinline__ Address shared_address(const void* place) {
    Address address;
    asm volatile("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(address) : "l"(place));
    return address;
}

// 16 bytes that arrive later.
__device__ __forceinline__ void copy_later(Address to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void store_words(Address to, const std::uint32_t (&words)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `Left` groups have arrived.
template <int Left>
__device__ __forceinline__ void wait_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(std::uint32_t (&out)[4], Address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row));
}

__device__ __forceinline__ void load_transposed(std::uint32_t (&out)[4], Address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row));
}

#define QLAB_MMA_DEEP(types)                                                                                     \
    asm("mma.sync.aligned.m16n8k16.row.col." types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"      \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#define QLAB_MMA_SHALLOW(types)                                                                     \
    asm("mma.sync.aligned.m16n8k8.row.col." types " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n" \
        "mma.sync.aligned.m16n8k8.row.col." types " {%0,%1,%2,%3}, {%7,%8}, {%9}, {%0,%1,%2,%3};"   \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                            \
        : "r"(a[0]), "r"(a[1]), "r"(b0), "r"(a[2]), "r"(a[3]), "r"(b1))

// 16 k of 16 x 8 outputs, in one instruction or with Depth 8 in two, the first 8 k first.
template <int Depth, bool IsBf16>
__device__ __forceinline__ void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    if constexpr (Depth == 16 && IsBf16)
        QLAB_MMA_DEEP("f32.bf16.bf16.f32");
    else if constexpr (Depth == 16)
        QLAB_MMA_DEEP("f32.f16.f16.f32");
    else if constexpr (IsBf16)
        QLAB_MMA_SHALLOW("f32.bf16.bf16.f32");
    else
        QLAB_MMA_SHALLOW("f32.f16.f16.f32");
}

#undef QLAB_MMA_DEEP
#undef QLAB_MMA_SHALLOW

// The same with fp16 accumulators, two in a register.
template <int Depth, bool IsBf16>
__device__ __forceinline__ void multiply(std::uint32_t (&d)[2], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    static_assert(!IsBf16, "there is no such instruction");
    if constexpr (Depth == 16)
        asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
            : "+r"(d[0]), "+r"(d[1])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};\n"
            "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%5,%6}, {%7}, {%0,%1};"
            : "+r"(d[0]), "+r"(d[1])
            : "r"(a[0]), "r"(a[1]), "r"(b0), "r"(a[2]), "r"(a[3]), "r"(b1));
}

__device__ __forceinline__ float low_half(std::uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
}

__device__ __forceinline__ float high_half(std::uint32_t pair) { return low_half(pair >> 16); }

// Two values rounded to 16 bits, the first in the low half.
template <bool IsBf16>
__device__ __forceinline__ std::uint32_t rounded_pair(float low, float high) {
    std::uint32_t pair;
    if constexpr (IsBf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Both halves: d = RN(a * b + d) in fp16.
__device__ __forceinline__ void multiply_halves(std::uint32_t& d, std::uint32_t a, std::uint32_t b) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(d) : "r"(a), "r"(b));
}

}  // namespace qlab::planned
