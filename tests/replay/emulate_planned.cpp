// The planned GEMM on the CPU: its device code with the instructions of csrc/planned_instructions.cuh in the host's hands. A
// tensor core's is the replay engine's fused sum, lane by lane after PTX's tables of fragments.
#include "fibers.hpp"

#include <cstring>

#include "replay_arithmetic.cuh"

namespace qlab::planned {

using Address = std::uintptr_t;

alignas(128) static unsigned char memory[256 << 10];
static replay::Rule core;                   // the tensor core's step
static std::uint32_t fragments[1024][6];    // of each thread: a, b
static Address rows[1024];                  // that each thread names to ldmatrix

inline unsigned char* shared_memory() { return memory; }
inline Address shared_address(const void* place) { return reinterpret_cast<Address>(place); }
inline void copy_later(Address to, const void* from) {
    if (to % 16 || reinterpret_cast<Address>(from) % 16) std::abort();
    std::memcpy(reinterpret_cast<void*>(to), from, 16);
}
inline void store_words(Address to, const std::uint32_t (&words)[4]) { std::memcpy(reinterpret_cast<void*>(to), words, 16); }
inline void end_group() {}
template <int Left>
inline void wait_groups() {}

inline std::uint32_t element(Address row, unsigned at) { return reinterpret_cast<const std::uint16_t*>(row)[at]; }

inline void load(std::uint32_t (&out)[4], Address row, bool transposed) {
    const unsigned thread = threadIdx.x, lane = thread % 32;
    rows[thread] = row;
    __syncthreads();
    for (unsigned i = 0; i < 4; ++i) {
        const Address* of = rows + (thread - lane) + 8 * i;
        const unsigned pair = 2 * (lane % 4), group = lane / 4;
        out[i] = transposed ? element(of[pair], group) | element(of[pair + 1], group) << 16
                            : element(of[group], pair) | element(of[group], pair + 1) << 16;
    }
    __syncthreads();
}
inline void load_matrices(std::uint32_t (&out)[4], Address row) { load(out, row, false); }
inline void load_transposed(std::uint32_t (&out)[4], Address row) { load(out, row, true); }

// Row g or g + 8 of A times column 2 t or 2 t + 1 of B, for lane 4 g + t; k 2 t, 2 t + 1 and 8 more lie in lane 4 g + t.
template <int Depth, bool IsBf16>
inline void products(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    const unsigned thread = threadIdx.x, lane = thread % 32;
    const std::uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(fragments[thread], own, sizeof own);
    __syncthreads();
    if (Depth == 8 && core.terms > 8) std::abort();
    for (unsigned r = 0; r < 4; ++r)
        for (int first = 0; first < 16; first += core.terms)
            d[r] = replay::fused_sum(d[r], core, IsBf16, [&](int i) {
                const unsigned k = first + i, t = k % 8 / 2, half = k / 8;
                const std::uint32_t* left = fragments[thread - lane + lane / 4 * 4 + t];
                const std::uint32_t* right = fragments[thread - lane + (lane % 4 * 2 + r % 2) * 4 + t];
                const std::uint32_t x = left[2 * half + r / 2], w = right[4 + half];
                return (k % 2 ? x >> 16 : x & 0xFFFFu) | (k % 2 ? w >> 16 : w & 0xFFFFu) << 16;
            });
    __syncthreads();
}

template <int Depth, bool IsBf16>
inline void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    products<Depth, IsBf16>(d, a, b0, b1);
}

inline float low_half(std::uint32_t pair) { return replay::half_to_float(pair & 0xFFFFu); }
inline float high_half(std::uint32_t pair) { return replay::half_to_float(pair >> 16); }

template <bool IsBf16>
inline std::uint32_t rounded_pair(float low, float high) {
    const int type = IsBf16 ? replay::bf16 : replay::fp16;
    return replay::output_bits(replay::nearest(low, type), IsBf16) |
           static_cast<std::uint32_t>(replay::output_bits(replay::nearest(high, type), IsBf16)) << 16;
}

template <int Depth, bool IsBf16>
inline void multiply(std::uint32_t (&d)[2], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    float sums[4] = {low_half(d[0]), high_half(d[0]), low_half(d[1]), high_half(d[1])};
    products<Depth, IsBf16>(sums, a, b0, b1);
    d[0] = rounded_pair<false>(sums[0], sums[1]);
    d[1] = rounded_pair<false>(sums[2], sums[3]);
}

inline void multiply_halves(std::uint32_t& d, std::uint32_t a, std::uint32_t b) {
    d = rounded_pair<false>(replay::fma_half(low_half(a), low_half(b), low_half(d), false),
                            replay::fma_half(high_half(a), high_half(b), high_half(d), false));
}

}  // namespace qlab::planned

#include "planned_dot.cuh"

using namespace qlab;
using namespace qlab::planned;

namespace {

template <class S, int Depth>
void run_shape(const Work& work, int blocks, bool half) {
    launch(blocks, S::threads, [&] {
        if (work.p.is_bf16)
            planned_tiles<S, Depth, true, false>(work);
        else if (half)
            planned_tiles<S, Depth, false, true>(work);
        else
            planned_tiles<S, Depth, false, false>(work);
    });
}

}  // namespace

extern "C" {

void planned(int shape, int depth, int half, const replay::Rule* rule, const replay::Problem* p, const OpRow* ops,
             const replay::ChainTile* tiles, int count, int blocks, float* scratch, void* out, int levels, int whole, int aligned,
             int gathered) {
    core = *rule;
    const Work work{*p, ops, tiles, scratch, out, count, levels, whole, aligned, gathered};
    with_shape(shape, [&](auto s) {
        if (depth == 16)
            run_shape<decltype(s), 16>(work, blocks, half);
        else
            run_shape<decltype(s), 8>(work, blocks, half);
    });
    std::fesetround(FE_TONEAREST);
}

void dots(int rows, int dot, const replay::Problem* p, int terms, const replay::ChainTile* tiles, int count, float* results) {
    launch(count, kDotThreads, [&] {
        if (dot)
            rows == kDotRows ? dot_tiles<1, true>(*p, terms, tiles, results) : dot_tiles<8, true>(*p, terms, tiles, results);
        else
            rows == kDotRows ? dot_tiles<1, false>(*p, terms, tiles, results) : dot_tiles<8, false>(*p, terms, tiles, results);
    });
    std::fesetround(FE_TONEAREST);
}

int planned_shapes() { return kShapes; }

void planned_size(int shape, int* size) {
    with_shape(shape, [&](auto tile) { size[0] = tile.rows, size[1] = tile.columns; });
}

void dot_size(int few, int* size) { size[0] = few ? kDotRows : 8 * kDotRows, size[1] = kDotColumns; }
}
