// One tensor-core instruction on given bits: D = A B + C for many independent tiles, one warp each.
//
// a uint16 [count, 16, K], b uint16 [count, K, 8], c and d [count, 16, 8] fp32 or fp16, K 8 or 16. Which thread holds which
// element is PTX's table for mma.m16n8k8 and mma.m16n8k16: lane 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1.
#pragma once

#include <cstdint>

#include "replay_fast.cuh"

namespace qlab::probe {

constexpr int kM = 16, kN = 8, kWarps = 4;

__device__ __forceinline__ std::uint32_t both(std::uint16_t low, std::uint16_t high) {
    return low | static_cast<std::uint32_t>(high) << 16;
}

template <int K>
struct Fragments {
    std::uint32_t a[K / 4], b[K / 8];

    __device__ __forceinline__ Fragments(const std::uint16_t* pa, const std::uint16_t* pb, int g, int t) {
#pragma unroll
        for (int half = 0; half < K / 8; ++half) {
            const int k = 8 * half + 2 * t;
            a[2 * half] = both(pa[g * K + k], pa[g * K + k + 1]);
            a[2 * half + 1] = both(pa[(g + 8) * K + k], pa[(g + 8) * K + k + 1]);
            b[half] = both(pb[k * kN + g], pb[(k + 1) * kN + g]);
        }
    }
};

#define QLAB_MMA_K16(types, out, in)                                                                                     \
    asm volatile("mma.sync.aligned.m16n8k16.row.col." types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
                 : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])                                                \
                 : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(f.b[0]), "r"(f.b[1]), "f"(in[0]), "f"(in[1]), \
                   "f"(in[2]), "f"(in[3]))
#define QLAB_MMA_K8(types, out, in)                                                                          \
    asm volatile("mma.sync.aligned.m16n8k8.row.col." types " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};" \
                 : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])                                    \
                 : "r"(f.a[0]), "r"(f.a[1]), "r"(f.b[0]), "f"(in[0]), "f"(in[1]), "f"(in[2]), "f"(in[3]))

template <int K, bool IsBf16>
__device__ __forceinline__ void multiply(const Fragments<K>& f, const float (&c)[4], float (&d)[4]) {
    if constexpr (K == 16 && IsBf16)
        QLAB_MMA_K16("f32.bf16.bf16.f32", d, c);
    else if constexpr (K == 16)
        QLAB_MMA_K16("f32.f16.f16.f32", d, c);
    else if constexpr (IsBf16)
        QLAB_MMA_K8("f32.bf16.bf16.f32", d, c);
    else
        QLAB_MMA_K8("f32.f16.f16.f32", d, c);
}

#undef QLAB_MMA_K16
#undef QLAB_MMA_K8

// fp16 accumulators: two in a register.
template <int K>
__device__ __forceinline__ void multiply_half(const Fragments<K>& f, const std::uint32_t (&c)[2], std::uint32_t (&d)[2]) {
    if constexpr (K == 16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%9};"
                     : "=r"(d[0]), "=r"(d[1])
                     : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(f.b[0]), "r"(f.b[1]), "r"(c[0]), "r"(c[1]));
    else
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%5,%6};"
                     : "=r"(d[0]), "=r"(d[1])
                     : "r"(f.a[0]), "r"(f.a[1]), "r"(f.b[0]), "r"(c[0]), "r"(c[1]));
}

template <int K, bool IsBf16>
__global__ void __launch_bounds__(32 * kWarps)
    mma_tiles(const std::uint16_t* a, const std::uint16_t* b, const float* c, float* d, int count) {
    const std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (tile >= count) return;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const Fragments<K> f(a + tile * kM * K, b + tile * K * kN, g, t);
    const float* pc = c + tile * kM * kN + 2 * t;
    float* pd = d + tile * kM * kN + 2 * t;
    const float in[4] = {pc[g * kN], pc[g * kN + 1], pc[(g + 8) * kN], pc[(g + 8) * kN + 1]};
    float out[4];
    multiply<K, IsBf16>(f, in, out);
    pd[g * kN] = out[0];
    pd[g * kN + 1] = out[1];
    pd[(g + 8) * kN] = out[2];
    pd[(g + 8) * kN + 1] = out[3];
}

template <int K>
__global__ void __launch_bounds__(32 * kWarps)
    mma_half_tiles(const std::uint16_t* a, const std::uint16_t* b, const std::uint16_t* c, std::uint16_t* d, int count) {
    const std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (tile >= count) return;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const Fragments<K> f(a + tile * kM * K, b + tile * K * kN, g, t);
    const std::uint16_t* pc = c + tile * kM * kN + 2 * t;
    std::uint16_t* pd = d + tile * kM * kN + 2 * t;
    const std::uint32_t in[2] = {both(pc[g * kN], pc[g * kN + 1]), both(pc[(g + 8) * kN], pc[(g + 8) * kN + 1])};
    std::uint32_t out[2];
    multiply_half<K>(f, in, out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        pd[(g + 8 * half) * kN] = static_cast<std::uint16_t>(out[half]);
        pd[(g + 8 * half) * kN + 1] = static_cast<std::uint16_t>(out[half] >> 16);
    }
}

// The same outputs by the replay engine's arithmetic, one per thread: `fast` where that form applies, else in integers.
// `took_fast` counts the fused sums that took it. c and d hold fp32, or fp16 for a rule with fp16 accumulators.
template <int K>
__global__ void __launch_bounds__(kM * kN)
    replayed_tiles(const std::uint16_t* a, const std::uint16_t* b, const void* c, void* d, const replay::Rule rule, bool is_bf16,
                   bool fast, unsigned long long* took_fast) {
    const std::int64_t tile = blockIdx.x, output = tile * kM * kN + threadIdx.x;
    const std::uint16_t *pa = a + tile * kM * K + threadIdx.x / kN * K, *pb = b + tile * K * kN + threadIdx.x % kN;
    float sum = rule.half ? replay::half_to_float(static_cast<const std::uint16_t*>(c)[output]) : static_cast<const float*>(c)[output];
    unsigned count = 0;
    for (int base = 0; base < K; base += rule.terms) {
        const auto load = [&](int i) { return pa[base + i] | static_cast<std::uint32_t>(pb[(base + i) * kN]) << 16; };
        float next;
        const bool done = fast && (rule.half ? replay::fast_sum<true>(sum, rule, is_bf16, load, &next)
                                             : replay::fast_sum<false>(sum, rule, is_bf16, load, &next));
        sum = done ? next : replay::fused_sum(sum, rule, is_bf16, load);
        count += done;
    }
    if (rule.half)
        static_cast<std::uint16_t*>(d)[output] = replay::output_bits(sum, false);
    else
        static_cast<float*>(d)[output] = sum;
    if (count) atomicAdd(took_fast, count);
}

}  // namespace qlab::probe
