// CUDA's small types on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

using std::max;
using std::min;

struct Index {
    unsigned x, y;
};
struct uint2 {
    std::uint32_t x, y;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace on_host {

template <class To, class From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace on_host
