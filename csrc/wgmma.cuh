// wgmma m64nNk16 with operand A in registers: d += a * b, b in shared memory as its descriptor says.
//
// N counts rows of x, 16 to 256; a thread holds N / 2 numbers of d. The texts differ in the number of registers alone.
#pragma once

#include "int4_fragments.cuh"

namespace qlab::int4 {

// K-major operand B in 128-byte swizzled atoms of 8 rows and 64 k. Of its descriptor the lower word, with the address over 16; the
// upper one, with the 1024 bytes from atom to atom over 16, is always the same.
constexpr std::uint32_t kDescriptorHigh = 64u | 1u << 30;
__device__ __forceinline__ std::uint32_t descriptor(std::uint32_t address) { return address >> 4 | 1u << 16; }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// What is computed before is not moved behind.
__device__ __forceinline__ void pin(std::uint32_t (&a)[4]) { asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory"); }
__device__ __forceinline__ void pin(std::uint32_t& a) { asm volatile("" : "+r"(a)::"memory"); }
__device__ __forceinline__ void pin(int& a) { asm volatile("" : "+r"(a)::"memory"); }
__device__ __forceinline__ void pin(float4*& a) { asm volatile("" : "+l"(a)::"memory"); }

#define QLAB_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QLAB_D8(i) QLAB_D4(i), QLAB_D4(i + 4)
#define QLAB_D16(i) QLAB_D8(i), QLAB_D8(i + 8)
#define QLAB_D32(i) QLAB_D16(i), QLAB_D16(i + 16)
#define QLAB_WGMMA(N, TYPE, D, A, B) \
    "{.reg .pred p; .reg .b64 b; setp.ne.b32 p, 1, 0; mov.b64 b, {" B "}; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" D "}, {" A "}, b, p, 1, 1, 0;}"

#define QLAB_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QLAB_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define QLAB_R32 QLAB_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QLAB_R64 QLAB_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QLAB_R88 QLAB_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87"
#define QLAB_R128 QLAB_R88 ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103" \
    ", %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123" \
    ", %124, %125, %126, %127"

// For N rows of x: the registers of d in the text, those of a and b behind them, and d as operands.
#define QLAB_DEFINE_WGMMA(N, D, A, B, ...)                                                                                   \
    template <class T>                                                                                                       \
    __device__ __forceinline__ void wgmma(float (&d)[N / 2], const std::uint32_t (&a)[4], std::uint32_t b) {                 \
        if constexpr (T::kIsBf16)                                                                                            \
            asm volatile(QLAB_WGMMA(#N, "bf16", D, A, B)                                                                     \
                         : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh));          \
        else                                                                                                                 \
            asm volatile(QLAB_WGMMA(#N, "f16", D, A, B)                                                                      \
                         : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh));          \
    }

QLAB_DEFINE_WGMMA(16, QLAB_R8, "%8, %9, %10, %11", "%12, %13", QLAB_D8(0))
QLAB_DEFINE_WGMMA(32, QLAB_R16, "%16, %17, %18, %19", "%20, %21", QLAB_D16(0))
QLAB_DEFINE_WGMMA(64, QLAB_R32, "%32, %33, %34, %35", "%36, %37", QLAB_D32(0))
QLAB_DEFINE_WGMMA(128, QLAB_R64, "%64, %65, %66, %67", "%68, %69", QLAB_D32(0), QLAB_D32(32))
QLAB_DEFINE_WGMMA(176, QLAB_R88, "%88, %89, %90, %91", "%92, %93", QLAB_D32(0), QLAB_D32(32), QLAB_D16(64), QLAB_D8(80))
QLAB_DEFINE_WGMMA(256, QLAB_R128, "%128, %129, %130, %131", "%132, %133", QLAB_D32(0), QLAB_D32(32), QLAB_D32(64), QLAB_D32(96))

#undef QLAB_D4
#undef QLAB_D8
#undef QLAB_D16
#undef QLAB_D32
#undef QLAB_R8
#undef QLAB_R16
#undef QLAB_R32
#undef QLAB_R64
#undef QLAB_R88
#undef QLAB_R128
#undef QLAB_WGMMA
#undef QLAB_DEFINE_WGMMA

}  // namespace qlab::int4
