// bf16 on the CPU: the upper half of a float, rounded to nearest, even on a tie.
#pragma once

#include "cuda_fp16.h"

struct __nv_bfloat162 {
    std::uint16_t x, y;
};
inline float bfloat_value(std::uint16_t v) { return on_host::bits<float>(static_cast<std::uint32_t>(v) << 16); }
inline std::uint16_t bfloat_of(float v) {
    const std::uint32_t b = on_host::bits<std::uint32_t>(v);
    return std::isnan(v) ? 0x7FFF : static_cast<std::uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}
// Of two bf16 the product is exact in fp32, and what is subtracted here are small integers.
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {bfloat_of(bfloat_value(a.x) - bfloat_value(b.x)), bfloat_of(bfloat_value(a.y) - bfloat_value(b.y))};
}
inline __nv_bfloat162 __hmul2_rn(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {bfloat_of(bfloat_value(a.x) * bfloat_value(b.x)), bfloat_of(bfloat_value(a.y) * bfloat_value(b.y))};
}
inline std::uint16_t __float2bfloat16_rn(float v) { return bfloat_of(v); }
inline std::uint16_t __bfloat16_as_ushort(std::uint16_t v) { return v; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmul2_rn(a, b); }
inline std::uint16_t __hmul(std::uint16_t a, std::uint16_t b) { return bfloat_of(bfloat_value(a) * bfloat_value(b)); }
inline std::uint16_t __ushort_as_bfloat16(std::uint16_t v) { return v; }
