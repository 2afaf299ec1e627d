// What the INT4 GEMMs know of a tensor map, on the CPU: x, and boxes of it whose first dimension is 64 elements wide.
#pragma once

#include <cstdint>

struct CUtensorMap {
    const std::uint16_t* base;
    std::int64_t sizes[3], strides[3];  // elements; the first stride is 1
    int box[3];
};
