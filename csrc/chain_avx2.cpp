// The inner loops for AVX2 with FMA and F16C: eight lanes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

static bool usable() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Only what follows: the above runs on every processor, and functions of the standard library are shared with other units.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define QLAB_LANES 8
#include "chain_kernel.hpp"

namespace qlab {
namespace {

struct Avx2 : Lanes {
    static __m256i raw(I x) { return reinterpret_cast<__m256i>(x); }
    static __m256i raw(B x) { return reinterpret_cast<__m256i>(x); }

    static B max(B a, B b) { return reinterpret_cast<B>(_mm256_max_epu8(raw(a), raw(b))); }
    static I max(I a, I b) { return reinterpret_cast<I>(_mm256_max_epi32(raw(a), raw(b))); }
    static B minus(B a, B b) { return reinterpret_cast<B>(_mm256_subs_epu8(raw(a), raw(b))); }
    static I widen(const std::uint8_t* p) {
        return reinterpret_cast<I>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fma_exact_product(F a, F b, F c) { return fma(a, b, c); }
    static F round_half(F x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
    static F half_fma(F a, F b, F c) { return round_half(add_to_odd(a * b, c)); }

    template <bool bf16>
    static F expand(const std::uint16_t* p) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)) : _mm256_cvtph_ps(x);
    }

    template <bool bf16>
    static void decode(const std::uint16_t* bits, float* value, std::uint8_t* exponent) {
        for (int n = 0; n < kBlock; n += 32) {
            __m256i e[2];
            for (int i = 0; i < 2; ++i) {
                const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + n + 16 * i));
                const __m128i halves[2] = {_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)};
                for (int j = 0; j < 2; ++j)
                    _mm256_storeu_ps(value + n + 16 * i + 8 * j,
                                     bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves[j]), 16)) :
                                            _mm256_cvtph_ps(halves[j]));
                const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7FFF));
                const __m256i field = _mm256_max_epu16(_mm256_srli_epi16(magnitude, bf16 ? 7 : 10), _mm256_set1_epi16(1));
                const __m256i zero = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
                e[i] = _mm256_andnot_si256(zero, _mm256_add_epi16(field, _mm256_set1_epi16(bf16 ? 26 : 138)));
            }
            // Packing works in halves of 16 bytes and saturates at 255.
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(e[0], e[1]), 0xD8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(exponent + n), packed);
        }
    }
};

}  // namespace

const Isa kAvx2{"avx2", usable, run_chain<Avx2>};

}  // namespace qlab

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
