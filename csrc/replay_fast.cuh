// The fast form of a fused sum (replay_arithmetic.cuh) in the pieces that the kernel puts together.
//
// Exponents travel as 16-bit fields of C's exponent: (e_a + 525) * 16 + 8 and (e_b + 550 - F) * 16. Their sum, moved to the top
// of a word, is the high word of C for this product's exponent; the 8 becomes C's half. Two fields share a word, so that one
// instruction adds and compares two of them. A zero operand has field 0, which keeps its product below the field of any e_zero.
#pragma once

#include "replay_arithmetic.cuh"

namespace qlab::replay {

constexpr int kFirstBias = 525, kBothBias = 1023 + 52;

// What holds the fast form: fields that do not overflow, and a unit that keeps results out of fp32's subnormals (16-bit inputs
// within the exponents below). fp16 accumulators belong to fp16 inputs.
QLAB_BOTH bool fast_rule(const Rule& r, bool is_bf16) {
    return r.kind == tensor_core && (r.terms == 4 || r.terms == 8 || r.terms == 16) && r.fraction_bits >= 23 &&
           r.fraction_bits <= 25 && r.zero_exponent >= -300 && r.zero_exponent <= (r.half ? -14 : -126) && !(r.half && is_bf16);
}

// A product with exponents in these ranges is at least 2^-101 and the sum of a chain cannot overflow. Outside of them, and for
// infinities and NaN, the sum takes the slow form.
constexpr int kFirstLow = -70, kFirstHigh = 60, kSecondLow = -31, kSecondHigh = 40;

struct Encoded {
    double magnitude;     // scaled by 2^1008 (fp16) or 2^896 (bf16) for the first operand and by its inverse for the second
    std::uint32_t field;  // once for the first operand, in both halves for the second
    std::uint32_t sign;
    bool slow;
};

QLAB_BOTH Encoded encode_first(std::uint32_t bits, bool is_bf16) {
    const Operand v = decode(bits, is_bf16);
    const bool zero = v.significand == 0;
    const int scale = v.exponent - fraction_bits(is_bf16) + (is_bf16 ? 896 : 1008) + 1023;
    const double magnitude = multiply_nearest(v.significand, from_words(static_cast<std::uint32_t>(scale) << 20, 0));
    const bool outside = is_bf16 && !zero && (v.exponent < kFirstLow || v.exponent > kFirstHigh);
    return {magnitude, zero ? 0u : static_cast<std::uint32_t>(v.exponent + kFirstBias) << 4 | 8u, (bits & 0x8000u) << 16,
            outside || !v.finite};
}

// The bits themselves are a double scaled down, subnormals too, for both formats keep their fraction at the top; so are the
// exponent's bits a field but for its bias. This runs once per element of w and block, so it counts instructions.
QLAB_BOTH Encoded encode_second(std::uint32_t bits, bool is_bf16, int fraction) {
    const std::uint32_t magnitude = bits & 0x7FFFu;
    const int raw = static_cast<int>(is_bf16 ? magnitude >> 3 & 0xFF0u : magnitude >> 6 & 0x1F0u);
    const int bias = (kBothBias - kFirstBias - (is_bf16 ? 127 : 15) - fraction) << 4;
    const int field = magnitude ? maximum(raw + bias, 16 + bias) : 0;
    constexpr std::uint32_t low = 127 + kSecondLow, high = 127 + kSecondHigh;
    const bool slow = is_bf16 ? magnitude - (low << 7) > (high - low) * 128 + 127 && magnitude : magnitude >= 0x7C00u;
    return {from_words(magnitude << (is_bf16 ? 13 : 10), 0), static_cast<std::uint32_t>(field) * 0x10001u,
            (bits & 0x8000u) << 16, slow};
}

QLAB_BOTH std::uint32_t smallest_fields(const Rule& r) {
    return (static_cast<std::uint32_t>(r.zero_exponent + kBothBias - r.fraction_bits) << 4 | 8u) * 0x10001u;
}

// max(a + b, c) in both halves. Fields stay below the bits of fp16's infinity, so before Hopper fp16's maximum orders them.
QLAB_BOTH std::uint32_t add_maximum(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return __viaddmax_u16x2(a, b, c);
#elif defined(__CUDA_ARCH__)
    std::uint32_t r;
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a + b), "r"(c));
    return r;
#else
    const std::uint32_t lo = std::max((a + b) & 0xFFFFu, c & 0xFFFFu), hi = std::max((a >> 16) + (b >> 16), c >> 16);
    return hi << 16 | lo;
#endif
}

QLAB_BOTH std::uint32_t accumulator_bias(const Rule& r) { return static_cast<std::uint32_t>(52 - r.fraction_bits) << 20 | kMiddle; }

// x = C + the accumulator truncated to the unit; `top` has the largest product's field in its upper half.
template <bool Half>
QLAB_BOTH double begin(double accumulator, std::uint32_t top, std::uint32_t bias) {
    const std::uint32_t hi = high(accumulator);
    std::uint32_t exponent = hi & kExponent;
    if (Half && exponent) exponent = maximum(exponent, (1023 - 14) << 20);
    const std::uint32_t c = maximum(static_cast<int>(exponent + bias), static_cast<int>(top));
#ifdef __CUDA_ARCH__
    const double magnitude = fabs(accumulator);
#else
    const double magnitude = std::fabs(accumulator);
#endif
    const double x = add_down(magnitude, from_words(c | (hi & kSign), 0));
    return from_words(high(x) & ~kSign, low(x));
}

// One more term: `first` and `second` change x's sign from that of the term before (positive before the first one).
QLAB_BOTH double term(double x, std::uint32_t first, std::uint32_t second, double a, double b) {
    return fma_down(a, b, from_words(high(x) ^ first ^ second, low(x)));
}

// The accumulator after the last term. `middle` is kMiddle, from where the compiler does not see its value: one instruction
// takes only one constant.
template <bool Half>
QLAB_BOTH double end(double x, std::uint32_t middle) {
    const double c = from_words((high(x) & kExponent) | middle, 0);
#ifdef __CUDA_ARCH__
    const double sum = add_nearest(fabs(x), -c);
#else
    const double sum = add_nearest(std::fabs(x), -c);
#endif
    if (!Half) return from_words(high(sum), low(sum) & 0xE0000000u);
    const std::uint32_t exponent = high(sum) & kExponent, smallest = (1023u - 14) << 20;
    const double magic = from_words((exponent > smallest ? exponent : smallest) + (42u << 20 | kMiddle), 0);
    const double r = add_nearest(add_nearest(sum, magic), -magic);
    const bool overflow = (high(r) & kExponent) >= (1023u + 16) << 20;
    return overflow ? from_words((high(r) & kSign) | kExponent, 0) : r;
}

// Accumulators that the fast form cannot start from: infinite, NaN, or so large that a chain might overflow.
template <bool Half>
QLAB_BOTH bool needs_slow(double accumulator) {
    return (high(accumulator) & kExponent) >= (Half ? 1023u + 16 : 1023u + 120) << 20;
}

// One fused sum by these pieces, for probes and tests; false where it needs the slow form. `load` as in fused_sum.
template <bool Half, class Load>
QLAB_BOTH bool fast_sum(float start, const Rule& rule, bool is_bf16, Load load, float* sum) {
    std::uint32_t top = smallest_fields(rule);
    bool slow = needs_slow<Half>(start);
    for (int i = 0; i < rule.terms; ++i) {
        const Encoded a = encode_first(load(i) & 0xFFFFu, is_bf16), b = encode_second(load(i) >> 16, is_bf16, rule.fraction_bits);
        top = add_maximum(a.field, b.field, top);
        slow |= a.slow || b.slow;
    }
    if (slow) return false;
    double x = begin<Half>(start, top << 16, accumulator_bias(rule));
    std::uint32_t sign = 0;
    for (int i = 0; i < rule.terms; ++i) {
        const Encoded a = encode_first(load(i) & 0xFFFFu, is_bf16), b = encode_second(load(i) >> 16, is_bf16, rule.fraction_bits);
        x = term(x, a.sign ^ sign, b.sign, a.magnitude, b.magnitude);
        sign = a.sign ^ b.sign;
    }
    *sum = to_float(end<Half>(x, rule.middle));
    return true;
}

}  // namespace qlab::replay
