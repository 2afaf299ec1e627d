// Vectors of QLAB_LANES fp32 lanes in the compilers' own vector types, and the roundings that replaying needs. An instruction
// set takes this as it is and replaces what it has one instruction for. Everything here is IEEE arithmetic in the default
// rounding mode, so all instruction sets give the same bits.
//
// Each chain_*.cpp has this header to itself: hence the unnamed namespace, without which the linker could keep one copy of a
// function for all of them, compiled for the newest instruction set.
#pragma once

#include <cstdint>

namespace qlab {
namespace {

inline constexpr std::int32_t kFp32Infinity = 0x7F800000;  // and the mask of fp32's exponent

#define QLAB_INLINE static inline __attribute__((always_inline))

struct Lanes {
    static constexpr int width = QLAB_LANES;
    static constexpr int W = width;
    typedef float F __attribute__((vector_size(4 * W)));
    typedef std::int32_t I __attribute__((vector_size(4 * W)));  // comparisons give 0 or -1 in these
    typedef std::uint8_t B __attribute__((vector_size(4 * W)));
    typedef std::uint16_t Half __attribute__((vector_size(2 * W)));
    typedef std::uint8_t Quarter __attribute__((vector_size(W)));

    template <class V, class T>
    QLAB_INLINE V load(const T* p) {
        V v;
        __builtin_memcpy(&v, p, sizeof v);
        return v;
    }
    template <class V, class T>
    QLAB_INLINE void store(T* p, V v) {
        __builtin_memcpy(p, &v, sizeof v);
    }
    QLAB_INLINE F splat(float x) { return x - F{}; }  // x + 0 would lose the sign of -0
    QLAB_INLINE I splat(std::int32_t x) { return I{} + x; }
    QLAB_INLINE B splat(std::uint8_t x) { return B{} + x; }
    QLAB_INLINE I bits(F x) { return reinterpret_cast<I>(x); }
    QLAB_INLINE F from_bits(I x) { return reinterpret_cast<F>(x); }
    QLAB_INLINE I max(I a, I b) { return a > b ? a : b; }
    QLAB_INLINE B max(B a, B b) { return a > b ? a : b; }
    QLAB_INLINE B min(B a, B b) { return a < b ? a : b; }
    QLAB_INLINE B minus(B a, B b) { return max(a, b) - b; }  // not below zero
    QLAB_INLINE I widen(const std::uint8_t* p) { return __builtin_convertvector(load<Quarter>(p), I); }

    QLAB_INLINE I truncate(F x) { return __builtin_convertvector(x, I); }
    QLAB_INLINE F nearest(I x) { return __builtin_convertvector(x, F); }

    // The float next to x toward zero where `away` is -1: the bits of floats count by magnitude.
    QLAB_INLINE F step_back(F x, I away) { return from_bits(bits(x) + away); }

    // An integer, less than 2^31 - 64 in magnitude, to fp32 rounded toward zero.
    QLAB_INLINE F toward_zero(I x) {
        const F f = nearest(x);
        const I over = truncate(f) - x;
        return step_back(f, (over != 0) & ((over ^ x) >= 0));
    }

    // The same, rounded to odd: what is inexact gets an odd last bit, so that a second rounding to fewer bits is right.
    QLAB_INLINE F to_odd(I x) {
        const F f = toward_zero(x);
        return from_bits(bits(f) | ((truncate(f) != x) & 1));
    }

    // a + b to fp32 toward zero where the sum does not fit in 32 bits. A double holds it; its last 29 bits are cut.
    QLAB_INLINE F sum_toward_zero(I a, I b) {
        F f{};
        for (int i = 0; i < W; ++i) {
            const double sum = static_cast<double>(a[i]) + static_cast<double>(b[i]);
            std::uint64_t cut;
            __builtin_memcpy(&cut, &sum, sizeof cut);
            cut &= ~UINT64_C(0x1FFFFFFF);
            double d;
            __builtin_memcpy(&d, &cut, sizeof d);
            f[i] = static_cast<float>(d);
        }
        return f;
    }

    // a + b rounded to odd, by Knuth's two-sum, whose error term is exact.
    QLAB_INLINE F add_to_odd(F a, F b) {
        const F s = a + b, part = s - a, error = (a - (s - part)) + (b - part);
        const I inexact = (error < 0.0f) | (error > 0.0f);  // false for NaN: the sum is infinite or NaN then
        const I away = (bits(error) ^ bits(s)) < 0;
        return from_bits((bits(s) + (inexact & away)) | (inexact & 1));
    }

    // fp32 to the nearest fp16, still held in fp32: adding and subtracting 2^13 times its power of two, or fp16's smallest,
    // leaves the bits that fp16 has.
    QLAB_INLINE F round_half(F x) {
        const I sign = bits(x) & INT32_MIN, magnitude = bits(x) ^ sign;
        I exponent = max(magnitude & kFp32Infinity, splat(113 << 23));
        exponent -= (exponent - (200 << 23)) & (exponent > (200 << 23));  // infinity must stay below the last exponent
        const F m = from_bits(magnitude), big = from_bits(exponent + (13 << 23));
        const F r = (m + big) - big;
        return from_bits(bits(r > 65504.0f ? splat(__builtin_inff()) : r) | sign);
    }

    QLAB_INLINE F round_bf16(F x) {
        const I sign = bits(x) & INT32_MIN, magnitude = bits(x) ^ sign, nan = magnitude > kFp32Infinity;
        const I number = magnitude & ~nan;
        const I rounded = (number + 0x7FFF + ((number >> 16) & 1)) & INT32_C(0x7FFF0000);
        return from_bits(rounded | (magnitude & nan) | sign);
    }

    // RN(a * b + c); for fp16 a and b, whose product is exact in fp32, a plain sum rounds once as well.
    QLAB_INLINE F fma(F a, F b, F c) {
        for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
        return c;
    }
    QLAB_INLINE F fma_exact_product(F a, F b, F c) { return a * b + c; }

    // The same in fp16, for fp16 values.
    QLAB_INLINE F half_fma(F a, F b, F c) { return round_half(add_to_odd(a * b, c)); }

    // W operands from their bits to fp32.
    template <bool bf16>
    QLAB_INLINE F expand(const std::uint16_t* p) {
        const I x = __builtin_convertvector(load<Half>(p), I), magnitude = x & 0x7FFF, sign = (x & 0x8000) << 16;
        if (bf16) return from_bits(x << 16);
        const F value = from_bits(magnitude << 13) * 0x1p112f;  // fp16's bias to fp32's, subnormals included
        return from_bits(bits(value) | ((magnitude >= 0x7C00) & kFp32Infinity) | sign);
    }

    // 64 operands: bits to fp32 and to exponents as bytes (chain_kernel.hpp).
    template <bool bf16>
    QLAB_INLINE void decode(const std::uint16_t* bits, float* value, std::uint8_t* exponent) {
        for (int n = 0; n < 64; ++n) {
            const std::uint32_t magnitude = bits[n] & 0x7FFFu, sign = (bits[n] & 0x8000u) << 16;
            std::uint32_t wide = magnitude << (bf16 ? 16 : 13);
            if (!bf16) {
                float v;
                __builtin_memcpy(&v, &wide, sizeof v);
                v *= 0x1p112f;  // fp16's bias to fp32's, subnormals included
                __builtin_memcpy(&wide, &v, sizeof v);
                wide |= magnitude >= 0x7C00u ? 0x7F800000u : 0u;
            }
            wide |= sign;
            __builtin_memcpy(value + n, &wide, sizeof wide);
        }
        for (int n = 0; n < 64; ++n) {
            const std::uint16_t magnitude = bits[n] & 0x7FFF, field = magnitude >> (bf16 ? 7 : 10);
            const std::uint16_t e = static_cast<std::uint16_t>((field > 1 ? field : 1) + (bf16 ? 26 : 138));
            exponent[n] = static_cast<std::uint8_t>(magnitude == 0 ? 0 : e < 255 ? e : 255);
        }
    }
};

#undef QLAB_INLINE

}  // namespace
}  // namespace qlab
