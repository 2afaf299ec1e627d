// The CUDA replay engine's arithmetic on single values. It compiles for the host too, where the tests compare it.
//
// Fast form of a fused sum. With C = 1.5 * 2^52 units of the last kept place, a double x = C + S holds an integer sum S, and
// fma(|a|, |b|, x) rounded down adds |a * b| truncated to the unit: one instruction for product, alignment, truncation and sum.
// A negative term is subtracted by negating x before and after, for -(C + S) + |a * b| rounds down to a multiple as well. Two
// such changes of sign in a row are one xor with the signs of neighbouring products. The exact sum is |x| - C, and clearing
// the 29 lowest bits rounds it toward zero to fp32.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QLAB_BOTH __host__ __device__ __forceinline__
#else
#define QLAB_BOTH inline
#endif
#ifndef __CUDA_ARCH__
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#endif

namespace qlab::replay {

enum Kind { tensor_core = 0, fma_chain = 1, half_dot = 2 };
enum Type { fp32 = 0, fp16 = 1, bf16 = 2 };

// One row of a program's steps.
struct Rule {
    std::int32_t kind;
    std::int32_t fraction_bits;
    std::int32_t terms;
    std::int32_t zero_exponent;
    std::int32_t half;      // the accumulator is fp16
    std::uint32_t middle;  // kMiddle (see end in replay_fast.cuh)
};

// ---- bits of floats, and operations rounded in a given direction
#ifdef __CUDA_ARCH__
QLAB_BOTH std::uint32_t high(double v) { return __double2hiint(v); }
QLAB_BOTH std::uint32_t low(double v) { return __double2loint(v); }
QLAB_BOTH double from_words(std::uint32_t hi, std::uint32_t lo) { return __hiloint2double(hi, lo); }
QLAB_BOTH std::uint32_t bits_of(float v) { return __float_as_uint(v); }
QLAB_BOTH float float_of(std::uint32_t v) { return __uint_as_float(v); }
QLAB_BOTH double fma_down(double a, double b, double c) { return __fma_rd(a, b, c); }
QLAB_BOTH double add_down(double a, double b) { return __dadd_rd(a, b); }
QLAB_BOTH double add_up(double a, double b) { return __dadd_ru(a, b); }
QLAB_BOTH double add_nearest(double a, double b) { return __dadd_rn(a, b); }
QLAB_BOTH double multiply_nearest(double a, double b) { return __dmul_rn(a, b); }
QLAB_BOTH float add_nearest(float a, float b) { return __fadd_rn(a, b); }
QLAB_BOTH float fma_nearest(float a, float b, float c) { return __fmaf_rn(a, b, c); }
QLAB_BOTH float to_float(double v) { return __double2float_rn(v); }
QLAB_BOTH int top_bit(std::uint64_t v) { return 63 - __clzll(static_cast<long long>(v)); }
QLAB_BOTH int maximum(int a, int b) { return max(a, b); }
#else
template <class To, class From>
inline To same_bits(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To r;
    std::memcpy(&r, &v, sizeof r);
    return r;
}
// The volatile copies keep the operation between the two changes of mode.
template <class F>
inline double rounded(int mode, F f) {
    if (std::fegetround() != mode) std::fesetround(mode);
    const volatile double r = f();
    return r;
}
inline std::uint32_t high(double v) { return static_cast<std::uint32_t>(same_bits<std::uint64_t>(v) >> 32); }
inline std::uint32_t low(double v) { return static_cast<std::uint32_t>(same_bits<std::uint64_t>(v)); }
inline double from_words(std::uint32_t hi, std::uint32_t lo) {
    return same_bits<double>(static_cast<std::uint64_t>(hi) << 32 | lo);
}
inline std::uint32_t bits_of(float v) { return same_bits<std::uint32_t>(v); }
inline float float_of(std::uint32_t v) { return same_bits<float>(v); }
inline double fma_down(double a, double b, double c) {
    const volatile double z = c;
    return rounded(FE_DOWNWARD, [&] { return std::fma(a, b, z); });
}
inline double add_down(double a, double b) {
    const volatile double z = b;
    return rounded(FE_DOWNWARD, [&] { return a + z; });
}
inline double add_up(double a, double b) {
    const volatile double z = b;
    return rounded(FE_UPWARD, [&] { return a + z; });
}
inline double add_nearest(double a, double b) {
    const volatile double z = b;
    return rounded(FE_TONEAREST, [&] { return a + z; });
}
inline double multiply_nearest(double a, double b) {
    const volatile double z = b;
    return rounded(FE_TONEAREST, [&] { return a * z; });
}
inline float to_float(double v) {
    const volatile double z = v;
    return static_cast<float>(rounded(FE_TONEAREST, [&] { return static_cast<float>(z); }));
}
inline float add_nearest(float a, float b) { return to_float(add_nearest(double{a}, double{b})); }  // 53 >= 2 * 24 + 2
inline float fma_nearest(float a, float b, float c) {
    const volatile float z = c;
    return static_cast<float>(rounded(FE_TONEAREST, [&] { return std::fma(a, b, z); }));
}
inline int top_bit(std::uint64_t v) { return 63 - __builtin_clzll(v); }
inline int maximum(int a, int b) { return std::max(a, b); }
#endif

constexpr std::uint32_t kSign = 0x80000000u, kExponent = 0x7FF00000u, kInfinity = 0x7F800000u, kNan = 0x7FFFFFFFu;
constexpr std::uint32_t kMiddle = 0x00080000u;  // the .5 of C in the high word of a double

// ---- 16-bit operands
struct Operand {
    bool negative, finite, nan;
    int exponent;               // of the bit above the fraction; subnormals keep the smallest
    std::uint32_t significand;  // magnitude in units of 2^(exponent - fraction bits)
};

QLAB_BOTH int fraction_bits(bool is_bf16) { return is_bf16 ? 7 : 10; }

QLAB_BOTH Operand decode(std::uint32_t bits, bool is_bf16) {
    const int fraction = fraction_bits(is_bf16), mask = is_bf16 ? 255 : 31;
    const std::uint32_t rest = bits & ((1u << fraction) - 1);
    const int field = static_cast<int>(bits >> fraction) & mask;
    return {(bits & 0x8000u) != 0, field != mask, field == mask && rest != 0, maximum(field, 1) - (mask >> 1),
            rest | (field ? 1u << fraction : 0u)};
}

// A shift of the exponent field and one product, exact with subnormals; only infinities and NaN need their own way.
QLAB_BOTH float half_to_float(std::uint32_t bits) {
    const std::uint32_t magnitude = (bits & 0x7FFFu) << 13, sign = (bits & 0x8000u) << 16;
    if (magnitude >= 0x0F800000u) return float_of(magnitude > 0x0F800000u ? kNan : sign | kInfinity);
    return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

QLAB_BOTH float operand_value(std::uint32_t bits, bool is_bf16) { return is_bf16 ? float_of(bits << 16) : half_to_float(bits); }

// Bits of a value that the type holds exactly; NaN is the GPU's.
QLAB_BOTH std::uint16_t output_bits(float v, bool is_bf16) {
    const std::uint32_t bits = bits_of(v), magnitude = bits & ~kSign;
    if (magnitude > kInfinity) return 0x7FFFu;
    if (is_bf16) return static_cast<std::uint16_t>(bits >> 16);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    if (magnitude == kInfinity) return static_cast<std::uint16_t>(sign | 0x7C00u);
    return static_cast<std::uint16_t>(sign | bits_of(float_of(magnitude) * 0x1p-112f) >> 13);
}

// ---- rounding to nearest even
// `v` rounded once to `type`, held in a float. Adding and subtracting 1.5 * 2^52 units of the result's last place rounds.
QLAB_BOTH float nearest(double v, int type) {
    const std::uint32_t hi = high(v), exponent = hi & kExponent;
    if (v != v) return float_of(kNan);
    if (type == fp32) return to_float(v);
    const std::uint32_t sign = hi & kSign;
    const std::uint32_t smallest = static_cast<std::uint32_t>(type == fp16 ? 1023 - 14 : 1023 - 126) << 20;
    const std::uint32_t too_large = static_cast<std::uint32_t>(type == fp16 ? 1023 + 16 : 1023 + 128) << 20;
    if (exponent >= too_large) return float_of(sign | kInfinity);
    const std::uint32_t unit = (exponent > smallest ? exponent : smallest) - ((type == fp16 ? 10u : 7u) << 20);
    const double magic = from_words((unit + (52u << 20)) | kMiddle, 0);
    const double r = add_nearest(add_nearest(v, magic), -magic);
    if ((high(r) & kExponent) >= too_large) return float_of(sign | kInfinity);
    return float_of((bits_of(to_float(r)) & ~kSign) | sign);
}

// a + b, moved to the odd one of its neighbours where it is not exact: rounding that once more gives the sum rounded once.
QLAB_BOTH double add_to_odd(double a, double b) {
    const double below = add_down(a, b), above = add_up(a, b);
    return below == above || (low(above) & 1u) ? above : below;
}

QLAB_BOTH float canonical(float v) { return v != v ? float_of(kNan) : v; }

QLAB_BOTH float add_values(float a, float b, int type) {
    return type == fp32 ? canonical(add_nearest(a, b)) : nearest(add_to_odd(a, b), type);
}

// fp16 fma of 16-bit values, rounded once.
QLAB_BOTH float fma_half(float a, float b, float c, bool is_bf16) {
#ifdef __CUDA_ARCH__
    if (!is_bf16) {
        float r;
        asm("{.reg .b16 x, y, z; cvt.rn.f16.f32 x, %1; cvt.rn.f16.f32 y, %2; cvt.rn.f16.f32 z, %3; fma.rn.f16 z, x, y, z; "
            "cvt.f32.f16 %0, z;}"
            : "=f"(r)
            : "f"(a), "f"(b), "f"(c));
        return r;
    }
#endif
    static_cast<void>(is_bf16);
    return nearest(add_to_odd(multiply_nearest(double{a}, double{b}), c), fp16);
}

// ---- any fused sum, in 64-bit integers: (terms + 1) * 2^(fraction_bits + 2) < 2^63
QLAB_BOTH std::int64_t align(std::uint64_t significand, bool negative, int shift) {
    const std::uint64_t kept = shift >= 0 ? significand << shift : shift > -64 ? significand >> -shift : 0;
    return negative ? -static_cast<std::int64_t>(kept) : static_cast<std::int64_t>(kept);
}

// sum * 2^unit as fp32 toward zero, or as fp16 to nearest even; zero is +0.
QLAB_BOTH float rounded_sum(std::int64_t sum, int unit, bool half) {
    if (sum == 0) return 0.0f;
    const std::uint32_t sign = sum < 0 ? kSign : 0u;
    const std::uint64_t magnitude = sum < 0 ? 0 - static_cast<std::uint64_t>(sum) : static_cast<std::uint64_t>(sum);
    const int top = top_bit(magnitude), exponent = top + unit;
    if (exponent > (half ? 15 : 127)) return float_of(sign | kInfinity);
    const int last = half ? maximum(exponent, -14) - 10 : maximum(exponent, -126) - 23;  // exponent of the last place kept
    const int drop = last - unit;
    std::uint64_t kept = drop > 63 ? 0 : drop >= 0 ? magnitude >> drop : magnitude << -drop;
    if (half && drop > 0 && drop <= 64) {
        const std::uint64_t rest = magnitude << (64 - drop), tie = std::uint64_t{1} << 63;
        kept += rest > tie || (rest == tie && (kept & 1));
    }
    if (kept == 0) return 0.0f;
    if (half) {
        const float value = static_cast<float>(kept) * float_of(static_cast<std::uint32_t>(last + 127) << 23);
        return float_of(sign | (value >= 65536.0f ? kInfinity : bits_of(value)));
    }
    // The hidden bit of a normal number carries into the exponent field, which therefore starts one lower.
    return float_of(sign | ((static_cast<std::uint32_t>(last + 149) << 23) + static_cast<std::uint32_t>(kept)));
}

// start + the sum of rule.terms products; `load(i)` returns the bits of both operands, the first in the low half.
template <class Load>
QLAB_BOTH float fused_sum(float start, const Rule& rule, bool is_bf16, Load load) {
    const std::uint32_t bits = bits_of(start), magnitude = bits & ~kSign;
    const int field = static_cast<int>(magnitude >> 23), own = maximum(field, 1) - 127;
    bool nan = magnitude > kInfinity, plus = bits == kInfinity, minus = bits == (kSign | kInfinity);
    int largest = magnitude ? maximum(own, rule.half ? -14 : -126) : rule.zero_exponent;
    for (int i = 0; i < rule.terms; ++i) {
        const std::uint32_t both = load(i);
        const Operand a = decode(both & 0xFFFFu, is_bf16), b = decode(both >> 16, is_bf16);
        if (a.finite && b.finite) {
            const int exponent = a.significand && b.significand ? a.exponent + b.exponent : rule.zero_exponent;
            largest = maximum(largest, exponent);
        } else {
            const bool invalid = a.nan || b.nan || (a.finite && !a.significand) || (b.finite && !b.significand);
            nan |= invalid;
            plus |= !invalid && a.negative == b.negative;
            minus |= !invalid && a.negative != b.negative;
        }
    }
    if (nan || (plus && minus)) return float_of(kNan);
    if (plus || minus) return float_of(kInfinity | (minus ? kSign : 0u));

    const int unit = largest - rule.fraction_bits;
    const std::uint32_t significand = (magnitude & 0x7FFFFFu) | (field ? 0x800000u : 0u);
    std::int64_t sum = align(significand, bits >> 31, own - 23 - unit);
    for (int i = 0; i < rule.terms; ++i) {
        const std::uint32_t both = load(i);
        const Operand a = decode(both & 0xFFFFu, is_bf16), b = decode(both >> 16, is_bf16);
        const std::uint64_t product = std::uint64_t{a.significand} * b.significand;
        sum += product ? align(product, a.negative != b.negative, a.exponent + b.exponent - 2 * fraction_bits(is_bf16) - unit) : 0;
    }
    return rounded_sum(sum, unit, rule.half);
}

}  // namespace qlab::replay
