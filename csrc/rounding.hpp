// Single values: bits of fp16 and bf16 to fp32 and back, and doubles rounded once to a narrower type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qlab {

enum class Type : int { fp32 = 0, fp16 = 1, bf16 = 2 };

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float from_bf16(std::uint16_t bits) { return bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

inline float from_half(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
    const float finite = bit_cast<float>(magnitude << 13) * 0x1p112f;  // fp16's bias to fp32's, subnormals included
    return bit_cast<float>(bit_cast<std::uint32_t>(finite) | (magnitude >= 0x7C00 ? 0x7F800000u : 0u) | sign);
}

// Bits of a value that fp16 holds exactly; any NaN becomes 0x7FFF.
inline std::uint16_t half_bits(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const auto subnormal = static_cast<std::uint32_t>(std::fabs(magnitude < 0x38800000u ? x : 0.0f) * 0x1p24f);
    const std::uint32_t normal = magnitude >= 0x7F800000u ? 0x7C00u : (magnitude - (112u << 23)) >> 13;
    const std::uint32_t number = sign | (magnitude < 0x38800000u ? subnormal : normal);
    return static_cast<std::uint16_t>(magnitude > 0x7F800000u ? 0x7FFFu : number);
}

inline std::uint32_t fp32_bits(float x) { return std::isnan(x) ? 0x7FFFFFFFu : bit_cast<std::uint32_t>(x); }

// The same for bf16.
inline std::uint16_t bf16_bits(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : bits >> 16);
}

// a + b, rounded to odd in double where it is not exact there: rounding that once more to a narrower type is right.
inline double add_to_odd(double a, double b) {
    const double s = a + b, part = s - a, error = (a - (s - part)) + (b - part);
    if (!(error < 0 || error > 0)) return s;
    const std::uint64_t bits = bit_cast<std::uint64_t>(s);
    return bit_cast<double>((bits - ((error < 0) != (s < 0))) | 1);
}

// The nearest number of a type, even on a tie, held in fp32. To fp32 on the way it is rounded to odd, not to nearest.
inline float nearest(double x, Type type) {
    const float direct = static_cast<float>(x);
    if (type == Type::fp32 || !(std::fabs(direct) < HUGE_VALF)) return direct;
    std::uint32_t bits = bit_cast<std::uint32_t>(direct);
    if (static_cast<double>(direct) != x) bits = (bits - (std::fabs(static_cast<double>(direct)) > std::fabs(x))) | 1;
    if (type == Type::bf16) return bit_cast<float>((bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u);
    const std::uint32_t sign = bits & 0x80000000u, magnitude = bits ^ sign;
    // Adding and subtracting 2^13 times the power of two, or fp16's smallest, leaves the bits that fp16 has.
    const std::uint32_t exponent = magnitude < (113u << 23) ? 113u << 23 : magnitude & 0x7F800000u;
    if (magnitude >= (144u << 23)) return bit_cast<float>(0x7F800000u | sign);  // 2^17
    const float big = bit_cast<float>(exponent + (13u << 23));
    const float rounded = (bit_cast<float>(magnitude) + big) - big;
    return bit_cast<float>((rounded > 65504.0f ? 0x7F800000u : bit_cast<std::uint32_t>(rounded)) | sign);
}

}  // namespace qlab
