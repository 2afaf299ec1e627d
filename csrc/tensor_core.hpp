// One fused dot-add of a tensor core with fp16 or bf16 inputs and an fp32 accumulator, bit for bit.
//
// The accumulator and the exact products of one chunk are aligned to the largest exponent among them, each truncated toward
// zero to `fraction_bits` bits below it, added exactly, and the sum is rounded toward zero to fp32. Significands are never
// normalised before the sum: a product keeps ea + eb though it may reach 4, a subnormal keeps the smallest exponent.
//
// Sources: Khattak and Mikaitis, arXiv 2512.07004; MMA-Sim, arXiv 2511.10909.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

namespace qlab {

struct Step {
    int fraction_bits;  // F: bits kept below the largest exponent
    int terms;          // L: products per sum; the accumulator is one more term
    int zero_exponent;  // exponent that a zero term takes
};

// The largest step that 64-bit sums hold: (terms + 1) * 2^(fraction_bits + 2) < 2^63.
inline constexpr int kMaxTerms = 64;
inline constexpr int kMaxFractionBits = 48;

template <int FractionBits, int ExponentBits>
struct Format {
    static constexpr int fraction_bits = FractionBits;
    static constexpr int exponent_mask = (1 << ExponentBits) - 1;
    static constexpr int bias = exponent_mask >> 1;
};
using Fp16 = Format<10, 5>;
using Bf16 = Format<7, 8>;
using Fp32 = Format<23, 8>;

enum class Kind { finite, infinite, nan };

struct Number {
    Kind kind;
    bool negative;
    int exponent;              // of the bit above the fraction
    std::int64_t significand;  // magnitude, in units of 2^(exponent - fraction bits)
};

template <class F>
inline Number decode(std::uint32_t bits) {
    const std::uint32_t fraction = bits & ((1u << F::fraction_bits) - 1);
    const int field = static_cast<int>(bits >> F::fraction_bits) & F::exponent_mask;
    const bool negative = (bits >> F::fraction_bits) & (F::exponent_mask + 1);
    if (field == F::exponent_mask) return {fraction ? Kind::nan : Kind::infinite, negative, 0, 0};
    const std::uint32_t hidden = field ? 1u << F::fraction_bits : 0u;
    return {Kind::finite, negative, std::max(field, 1) - F::bias, hidden | fraction};
}

inline Number multiply(const Number& a, const Number& b) {
    const bool negative = a.negative != b.negative;
    if (a.kind == Kind::finite && b.kind == Kind::finite)
        return {Kind::finite, negative, a.exponent + b.exponent, a.significand * b.significand};
    const auto zero = [](const Number& x) { return x.kind == Kind::finite && x.significand == 0; };
    const bool invalid = a.kind == Kind::nan || b.kind == Kind::nan || zero(a) || zero(b);
    return {invalid ? Kind::nan : Kind::infinite, negative, 0, 0};
}

inline constexpr std::uint32_t kNan = 0x7FFFFFFFu;
inline constexpr std::uint32_t kInfinity = 0x7F800000u;

// sum * 2^unit rounded toward zero to fp32; too large gives infinity, a result of zero is +0.
inline std::uint32_t round_toward_zero(std::int64_t sum, int unit) {
    const std::uint32_t sign = sum < 0 ? 0x80000000u : 0u;
    const std::uint64_t magnitude = sum < 0 ? 0 - static_cast<std::uint64_t>(sum) : static_cast<std::uint64_t>(sum);
    if (magnitude == 0) return 0;
    const int top = 63 - __builtin_clzll(magnitude);
    if (top + unit > Fp32::bias) return sign | kInfinity;
    constexpr int smallest = 1 - Fp32::bias - Fp32::fraction_bits;  // the subnormal unit, 2^-149
    const int drop = std::max(top - Fp32::fraction_bits, smallest - unit);
    const std::uint64_t kept = drop > 63 ? 0 : drop >= 0 ? magnitude >> drop : magnitude << -drop;
    if (kept == 0) return 0;
    // The hidden bit of a normal number carries into the exponent field, which therefore starts one lower.
    const std::uint32_t field = static_cast<std::uint32_t>(drop + unit - smallest);
    return sign | ((field << Fp32::fraction_bits) + static_cast<std::uint32_t>(kept));
}

inline std::int64_t align(const Number& x, int fraction_bits, int unit) {
    if (x.significand == 0) return 0;
    const int shift = x.exponent - fraction_bits - unit;
    const std::int64_t magnitude = shift >= 0 ? x.significand << shift : shift > -64 ? x.significand >> -shift : 0;
    return x.negative ? -magnitude : magnitude;
}

// d = c + sum of a[k] * b[k] over one chunk of step.terms: a, b are bits of `Input`, c and d bits of fp32.
template <class Input>
inline std::uint32_t fused_dot_add(const std::uint16_t* a, const std::uint16_t* b, std::uint32_t c, const Step& step) {
    std::array<Number, kMaxTerms> products;
    const Number start = decode<Fp32>(c);
    bool nan = false, positive = false, negative = false;
    int largest = std::numeric_limits<int>::min();
    const auto look = [&](const Number& x) {
        nan |= x.kind == Kind::nan;
        positive |= x.kind == Kind::infinite && !x.negative;
        negative |= x.kind == Kind::infinite && x.negative;
        largest = std::max(largest, x.significand ? x.exponent : step.zero_exponent);
    };
    look(start);
    for (int k = 0; k < step.terms; ++k) {
        products[k] = multiply(decode<Input>(a[k]), decode<Input>(b[k]));
        look(products[k]);
    }
    if (nan || (positive && negative)) return kNan;
    if (positive || negative) return kInfinity | (negative ? 0x80000000u : 0u);

    const int unit = largest - step.fraction_bits;
    std::int64_t sum = align(start, Fp32::fraction_bits, unit);
    for (int k = 0; k < step.terms; ++k) sum += align(products[k], 2 * Input::fraction_bits, unit);
    return round_toward_zero(sum, unit);
}

// A whole chain: `k` products in chunks of step.terms, ascending, through one accumulator. k must be a multiple of terms.
template <class Input>
inline std::uint32_t chain(const std::uint16_t* a, const std::uint16_t* b, std::uint32_t c, std::int64_t k, const Step& step) {
    for (std::int64_t i = 0; i < k; i += step.terms) c = fused_dot_add<Input>(a + i, b + i, c, step);
    return c;
}

}  // namespace qlab
