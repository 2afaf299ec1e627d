// What the INT4 GEMMs use of CUDA's arithmetic, on the CPU: a half is _Float16.
#pragma once

#ifdef QLAB_GRID
#include "grid.hpp"
#else
#include "blocks.hpp"
#endif

template <class T>
T __ldg(const T* p) {
    return *p;
}
inline std::uint32_t __byte_perm(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    const std::uint64_t both = a | static_cast<std::uint64_t>(b) << 32;
    std::uint32_t d = 0;
    for (int i = 0; i < 4; ++i) d |= static_cast<std::uint32_t>(both >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return d;
}
inline float __uint_as_float(std::uint32_t v) { return on_host::bits<float>(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float2 make_float2(float x, float y) { return {x, y}; }

struct __half2 {
    _Float16 x, y;
};
inline __half2 __float2half2_rn(float v) { return {static_cast<_Float16>(v), static_cast<_Float16>(v)}; }
inline __half2 __hneg2(__half2 a) { return {static_cast<_Float16>(-a.x), static_cast<_Float16>(-a.y)}; }
inline _Float16 half_of(double v) { return static_cast<_Float16>(v); }
inline __half2 __hsub2(__half2 a, __half2 b) { return {half_of(double(a.x) - double(b.x)), half_of(double(a.y) - double(b.y))}; }
inline __half2 __hmul2_rn(__half2 a, __half2 b) { return {half_of(double(a.x) * double(b.x)), half_of(double(a.y) * double(b.y))}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return __hmul2_rn(a, b); }
inline _Float16 __hmul(_Float16 a, _Float16 b) { return half_of(double(a) * double(b)); }
inline _Float16 __ushort_as_half(std::uint16_t v) { return on_host::bits<_Float16>(v); }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    return {half_of(double(a.x) * double(b.x) + double(c.x)), half_of(double(a.y) * double(b.y) + double(c.y))};
}
inline float2 __half22float2(__half2 a) { return {static_cast<float>(a.x), static_cast<float>(a.y)}; }
inline _Float16 __float2half_rn(float v) { return static_cast<_Float16>(v); }
inline std::uint16_t __half_as_ushort(_Float16 v) { return std::isnan(static_cast<float>(v)) ? 0x7FFF : on_host::bits<std::uint16_t>(v); }
