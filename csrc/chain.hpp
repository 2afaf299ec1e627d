// A chain, the inner loop of a replay: one accumulator per output element that walks over k. This is what the loops of each
// instruction set implement; they sit in translation units of their own (chain_*.cpp), so that code for a newer instruction set
// is never entered, or picked by the linker, on a machine without it. Types here must stay free of code.
#pragma once

#include <cstdint>

namespace qlab {

enum class StepKind : int { tensor_core = 0, fma = 1, half_dot = 2 };

struct ChainStep {
    StepKind kind;
    int fraction_bits;
    int terms;  // k that one step takes
    int zero_exponent;
    bool half;  // fp16 accumulator
};

inline constexpr int kBlock = 64;         // columns that the inner loops take at a time
inline constexpr int kMaxStep = 64;       // k that are decoded at a time: a step's terms, at most
inline constexpr int kMaxRows = 64;       // rows of a tile
inline constexpr int kMaxColumns = 1024;  // columns of a tile

// One chain over a tile of the output.
struct Chain {
    ChainStep step;
    bool bf16;
    const std::uint16_t* x;  // first row of the tile, [rows, x_stride]
    std::int64_t x_stride;
    int rows;
    const std::uint16_t* w;  // first column of the tile, [K, w_stride]
    std::int64_t w_stride;
    int columns;
    const std::uint16_t* scales;  // first column of the tile, [G, w_stride]; only a half_dot reads them
    const std::int32_t* group;    // [K]
    const std::int32_t* order;    // [length]
    std::int64_t length;
    float* sum;  // [rows, sum_stride]; columns are padded to whole blocks, what the padding holds does not matter
    std::int64_t sum_stride;
};

// Decoded operands of one step, and what is known of them. x is transposed, so that one pass over its rows judges all of them.
struct alignas(64) ChainScratch {
    float x[kMaxStep * kMaxRows];  // [k, rows]
    float w[kMaxStep * kBlock];    // [k, columns]
    float scale[kBlock];           // one row of scales
    std::uint8_t x_exponent[kMaxStep * kMaxRows];
    std::uint8_t w_exponent[kMaxStep * kBlock];
    std::uint8_t top[kMaxRows * kBlock];  // largest exponents, [rows, columns]
    std::uint16_t x_bits[kMaxStep * kMaxRows];
    std::uint16_t w_bits[kBlock];  // a block's row, where the matrix does not fill it
    std::uint16_t excess[kMaxRows];
    std::uint8_t low[kMaxRows], high[kMaxRows];
    std::uint8_t doubtful[kMaxRows * (kMaxColumns / kBlock)];  // accumulators to be looked at before the vector loops go on
};

struct Isa {
    const char* name;
    bool (*usable)();
    void (*run)(const Chain&, ChainScratch&);
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

// The exact way, one element at a time in 64-bit integers or doubles, for all that the vector loops leave out: infinities, NaN,
// exponents or steps beyond their range. `chunk` takes one step of a tensor core (its k) in `row` and `columns` columns from
// `column` on; `chain` runs a whole chain of another kind.
namespace exact {
void chunk(const Chain& c, const std::int32_t* k, int row, int column, int columns);
void chain(const Chain& c);
}  // namespace exact

}  // namespace qlab
