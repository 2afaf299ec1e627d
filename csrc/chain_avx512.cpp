// The inner loops for AVX-512 (F, BW, VL, DQ): sixteen lanes, and conversions that round as they are told.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

static bool usable() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Only what follows: the above runs on every processor, and functions of the standard library are shared with other units.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif

#define QLAB_LANES 16
#include "chain_kernel.hpp"

namespace qlab {
namespace {

struct Avx512 : Lanes {
    static __m512i raw(I x) { return reinterpret_cast<__m512i>(x); }
    static __m512i raw(B x) { return reinterpret_cast<__m512i>(x); }

    static B max(B a, B b) { return reinterpret_cast<B>(_mm512_max_epu8(raw(a), raw(b))); }
    static I max(I a, I b) { return reinterpret_cast<I>(_mm512_max_epi32(raw(a), raw(b))); }
    static B minus(B a, B b) { return reinterpret_cast<B>(_mm512_subs_epu8(raw(a), raw(b))); }
    static I widen(const std::uint8_t* p) {
        return reinterpret_cast<I>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static F toward_zero(I x) { return _mm512_cvt_roundepi32_ps(raw(x), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
    static F to_odd(I x) {
        const __m512 f = toward_zero(x);
        const __mmask16 inexact = _mm512_cmpneq_epi32_mask(_mm512_cvttps_epi32(f), raw(x));
        const __m512i bits = _mm512_castps_si512(f);
        return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, inexact, bits, _mm512_set1_epi32(1)));
    }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F fma_exact_product(F a, F b, F c) { return fma(a, b, c); }
    static F round_half(F x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
    static F half_fma(F a, F b, F c) {
        // Of the two neighbours of an inexact sum one is odd; an exact sum is both, but for a zero's sign, where up is right.
        const __m512 p = a * b;
        const __m512 down = _mm512_add_round_ps(p, c, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        const __m512 up = _mm512_add_round_ps(p, c, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
        const __mmask16 odd = _mm512_test_epi32_mask(_mm512_castps_si512(down), _mm512_set1_epi32(1));
        return round_half(_mm512_mask_blend_ps(odd, up, down));
    }

    template <bool bf16>
    static F expand(const std::uint16_t* p) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)) : _mm512_cvtph_ps(x);
    }

    template <bool bf16>
    static void decode(const std::uint16_t* bits, float* value, std::uint8_t* exponent) {
        for (int n = 0; n < kBlock; n += 32) {
            const __m512i x = _mm512_loadu_si512(bits + n);
            const __m256i halves[2] = {_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)};
            for (int i = 0; i < 2; ++i)
                _mm512_storeu_ps(value + n + 16 * i,
                                 bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves[i]), 16)) :
                                        _mm512_cvtph_ps(halves[i]));
            const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7FFF));
            const __m512i field = _mm512_max_epu16(_mm512_srli_epi16(magnitude, bf16 ? 7 : 10), _mm512_set1_epi16(1));
            const __mmask32 nonzero = _mm512_test_epi16_mask(magnitude, magnitude);
            const __m512i e = _mm512_maskz_add_epi16(nonzero, field, _mm512_set1_epi16(bf16 ? 26 : 138));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(exponent + n),
                                bf16 ? _mm512_cvtusepi16_epi8(e) : _mm512_cvtepi16_epi8(e));
        }
    }
};

}  // namespace

const Isa kAvx512{"avx512", usable, run_chain<Avx512>};

}  // namespace qlab

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
