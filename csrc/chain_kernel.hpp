// The inner loops, over the lanes V of an instruction set.
//
// A tensor core's fused sum is done in fp32 and int32 alone, for 4 * V::width columns at a time:
//   * The product of two operands is exact in fp32, and multiplying it by a power of two, 2^(F - e_max), leaves it exact; the
//     conversion to an integer then truncates it toward zero, at the bit where the tensor core cuts, sign and all. So does the
//     accumulator's.
//   * e_max needs the exponents as they are decoded, apart from the products. They are kept as bytes, which hold 4 times as
//     many columns: exponent + 153, and 0 for a zero. w's byte minus (179 - x's byte) is the product's exponent as fp32 has it,
//     and 0, below all others, where either operand is zero.
//   * The sum, an integer, is converted to fp32 toward zero and multiplied by 2^(e_max - F).
// This holds while nothing leaves the ranges of fp32, int32 and the bytes. fp16 operands cannot, but for infinities and NaN;
// bf16 operands are judged for each step and row (Range), and what is out of range takes the exact way. Below the floor of
// e_max that fp32 asks for, 2^(F - 126), nothing is cut: all terms are then multiples of 2^-126. A zero term's exponent lies
// below the floor too, so that it does not matter.
#pragma once

#include "chain.hpp"
#include "chain_lanes.hpp"

namespace qlab {
namespace {

inline constexpr int kByteBias = 153;   // of an operand's exponent as a byte
inline constexpr int kByteSum = 179;    // 153 + 26: an exponent of 26 is the largest
inline constexpr int kLowestSum = 194;  // of two bytes: exponents that sum to -112, the last bit of bf16's product 2^-126
inline constexpr int kAhead = 32;       // k between the row of w that is decoded and the one that is fetched

// Operands of one step: 64-lane blocks of bits to fp32 and to exponents as bytes.
template <class V, bool bf16>
void decode_x(const Chain& c, ChainScratch& s, const std::int32_t* k, int terms) {
    for (int r = 0; r < c.rows; ++r) {
        const std::uint16_t* row = c.x + r * c.x_stride;
        for (int j = 0; j < terms; ++j) s.x_bits[j * c.rows + r] = row[k[j]];
    }
    for (int i = 0; i < terms * c.rows; i += kBlock) V::template decode<bf16>(s.x_bits + i, s.x + i, s.x_exponent + i);
}

template <class V, bool bf16>
void decode_w(const Chain& c, ChainScratch& s, const std::int32_t* k, int terms, int column) {
    const int columns = c.columns - column;
    for (int j = 0; j < terms; ++j) {
        const std::uint16_t* row = c.w + k[j] * c.w_stride + column;
        // Rows lie far apart, where no processor looks ahead by itself.
        const std::int32_t* ahead = k + j + kAhead;
        const std::uint16_t* later = c.w + *(ahead < c.order + c.length ? ahead : k) * c.w_stride + column;
        __builtin_prefetch(later);
        __builtin_prefetch(later + kBlock / 2);
        if (columns < kBlock) {
            for (int n = 0; n < kBlock; ++n) s.w_bits[n] = n < columns ? row[n] : 0;
            row = s.w_bits;
        }
        V::template decode<bf16>(row, s.w + j * kBlock, s.w_exponent + j * kBlock);
    }
}

// Exponents of operands as bytes: the largest, and the smallest that is not of a zero (above 255 where all are zeros).
struct Range {
    int low, high;
};

template <class V, bool bf16>
Range range_of_w(const ChainScratch& s, int terms) {
    typename V::B high{}, low = V::splat(std::uint8_t{255});
    for (int i = 0; i < terms * kBlock; i += 4 * V::width) {
        const auto e = V::template load<typename V::B>(s.w_exponent + i);
        high = V::max(high, e);
        if (bf16) low = V::min(low, e - 1);  // a zero's 0 becomes 255
    }
    alignas(64) std::uint8_t highs[4 * V::width], lows[4 * V::width];
    V::store(highs, high);
    V::store(lows, low);
    std::uint8_t h = 0, l = 255;
    for (int i = 0; i < 4 * V::width; ++i) {
        h = highs[i] > h ? highs[i] : h;
        l = lows[i] < l ? lows[i] : l;
    }
    return {l + 1, h};
}

// The same for each row of x. Bytes become what is taken off w's.
template <bool bf16>
void judge_x(const Chain& c, ChainScratch& s, int terms) {
    const int rows = c.rows;
    for (int r = 0; r < rows; ++r) s.low[r] = 255, s.high[r] = 0;
    for (int j = 0; j < terms; ++j) {
        const std::uint8_t* e = s.x_exponent + j * rows;
        for (int r = 0; r < rows; ++r) {
            const std::uint8_t less = static_cast<std::uint8_t>(e[r] - 1);
            s.high[r] = e[r] > s.high[r] ? e[r] : s.high[r];
            if (bf16) s.low[r] = less < s.low[r] ? less : s.low[r];
        }
    }
    for (int i = 0; i < terms * rows; i += 64)
        for (int n = i; n < i + 64; ++n) s.x_exponent[n] = static_cast<std::uint8_t>(kByteSum - s.x_exponent[n]);
}

// What the significands of each row of x exceed 1 by, summed in units of their last bit.
template <bool bf16>
void sum_excess(const Chain& c, ChainScratch& s, int terms) {
    for (int r = 0; r < c.rows; ++r) s.excess[r] = 0;
    for (int j = 0; j < terms; ++j)
        for (int r = 0; r < c.rows; ++r)
            s.excess[r] = static_cast<std::uint16_t>(s.excess[r] + (s.x_bits[j * c.rows + r] & (bf16 ? 0x7F : 0x3FF)));
}

// The largest exponent among a step's products, or the floor of it, for every row and the columns of a block. On its own, ahead
// of the sums, because it depends on nothing that they compute.
template <class V>
void find_tops(ChainScratch& s, int terms, int rows, int floor) {
    for (int r = 0; r < rows; ++r)
        for (int n = 0; n < kBlock; n += 4 * V::width) {
            auto top = V::splat(static_cast<std::uint8_t>(floor));
            for (int j = 0; j < terms; ++j) {
                const auto w = V::template load<typename V::B>(s.w_exponent + j * kBlock + n);
                top = V::max(top, V::minus(w, V::splat(s.x_exponent[j * rows + r])));
            }
            V::store(s.top + r * kBlock + n, top);
        }
}

// One step of a tensor core in one row and one block of columns. `wide`: the sum with the accumulator may not fit in int32.
template <class V, bool half, bool wide>
inline __attribute__((always_inline)) void fused_sum(int fraction_bits, int terms, const ChainScratch& s, int r, int rows,
                                                     float* sum) {
    using F = typename V::F;
    using I = typename V::I;
    for (int n = 0; n < kBlock; n += 4 * V::width) {
        const std::uint8_t* tops = s.top + r * kBlock + n;
        I total[4], start[4];
        F scale[4], unit[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const F c = V::template load<F>(sum + n + v * V::width);
            I own = V::bits(c) & kFp32Infinity;
            if (half) own = V::max(own, (own > 0) & (113 << 23));  // fp16's smallest
            const I last = V::max(V::widen(tops + v * V::width) << 23, own) - (fraction_bits << 23);
            unit[v] = V::from_bits(last);
            scale[v] = V::from_bits((254 << 23) - last);  // its inverse
            start[v] = V::truncate(c * scale[v]);
            total[v] = wide ? I{} : start[v];
        }
        for (int j = 0; j < terms; ++j) {
            const F x = V::splat(s.x[j * rows + r]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v)  // x * w first: w * scale could leave fp32
                total[v] += V::truncate(V::template load<F>(s.w + j * kBlock + n + v * V::width) * x * scale[v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            F c;
            if (half)
                c = V::round_half(V::to_odd(total[v]) * unit[v]) + 0.0f;  // -0 becomes +0
            else if (wide)
                c = V::sum_toward_zero(total[v], start[v]) * unit[v];
            else
                c = V::toward_zero(total[v]) * unit[v];
            V::store(sum + n + v * V::width, c);
        }
    }
}

// Whether the vector loops may go on from these accumulators.
template <bool half>
bool in_range(const float* sum) {
    bool good = true;
    for (int n = 0; n < kBlock; ++n) {
        std::uint32_t bits;
        __builtin_memcpy(&bits, sum + n, sizeof bits);
        const int e = (bits >> 23) & 255;
        good &= half ? e < 255 : (bits << 1 == 0) | ((e >= 24) & (e <= 200));
    }
    return good;
}

template <class V, bool bf16, bool half>
void tensor_core(const Chain& c, ChainScratch& s) {
    const ChainStep& step = c.step;
    const int terms = step.terms, limit = bf16 ? kByteSum : kByteBias + 15;
    // In units of 2^F, a sum is less than twice that of x's significands, as w's are below 2, and the accumulator less than 2.
    // Together they stay below 2^31 when x's add up to 2^(30 - F) - 1 at most: `spare` is what they may exceed 1 by together,
    // in units of their last bit.
    const int one = bf16 ? 128 : 1024;
    const std::int64_t spare = ((std::int64_t{1} << (30 - step.fraction_bits)) - 1 - terms) * one;
    const bool may_be_wide = terms * one > spare;
    for (int i = 0; i < kMaxRows * (kMaxColumns / kBlock); ++i) s.doubtful[i] = 0;

    for (std::int64_t i = 0; i < c.length; i += terms) {
        const std::int32_t* k = c.order + i;
        decode_x<V, bf16>(c, s, k, terms);
        judge_x<bf16>(c, s, terms);
        if (may_be_wide) sum_excess<bf16>(c, s, terms);
        for (int n = 0; n < c.columns; n += kBlock) {
            decode_w<V, bf16>(c, s, k, terms, n);
            const Range w = range_of_w<V, bf16>(s, terms);
            find_tops<V>(s, terms, c.rows, half ? step.zero_exponent + 127 : step.fraction_bits + 1);
            for (int r = 0; r < c.rows; ++r) {
                float* sum = c.sum + r * c.sum_stride + n;
                std::uint8_t& doubtful = s.doubtful[r * (kMaxColumns / kBlock) + n / kBlock];
                bool fast = w.high <= limit && s.high[r] <= limit && (!bf16 || w.low + s.low[r] + 1 >= kLowestSum);
                if (fast && doubtful) fast = in_range<half>(sum);
                const bool wide = may_be_wide && s.excess[r] > spare;
                if (!fast || (half && wide)) {
                    exact::chunk(c, k, r, n, c.columns - n < kBlock ? c.columns - n : kBlock);
                    doubtful = 1;
                } else {
                    if (wide)
                        fused_sum<V, half, true>(step.fraction_bits, terms, s, r, c.rows, sum);
                    else
                        fused_sum<V, half, false>(step.fraction_bits, terms, s, r, c.rows, sum);
                    doubtful = half && !in_range<half>(sum);
                }
            }
        }
    }
}

// Fused multiply-adds of `terms` k in R rows from r on and a block's columns from n on, C vectors of them at a time, whose sums
// are held in registers. `load` gives the weights of k number j in the vector of columns from n + m on.
template <class V, bool bf16, bool half, int R, int C, class Load>
inline __attribute__((always_inline)) void multiply_vectors(const Chain& c, const ChainScratch& s, int terms, int r, int n, int m,
                                                            Load load) {
    using F = typename V::F;
    F sum[R][C], w[C];
    float* first = c.sum + r * c.sum_stride + n + m;
#pragma GCC unroll 8
    for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) sum[q][v] = V::template load<F>(first + q * c.sum_stride + v * V::width);
    for (int j = 0; j < terms; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) w[v] = load(j, m + v * V::width);
#pragma GCC unroll 8
        for (int q = 0; q < R; ++q) {
            const F x = V::splat(s.x[j * c.rows + r + q]);
#pragma GCC unroll 8
            for (int v = 0; v < C; ++v)
                sum[q][v] = half ? V::half_fma(x, w[v], sum[q][v]) :
                            bf16 ? V::fma(x, w[v], sum[q][v]) :
                                   V::fma_exact_product(x, w[v], sum[q][v]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) V::store(first + q * c.sum_stride + v * V::width, sum[q][v]);
}

template <class V, bool bf16, bool half, int R, int C, class Load>
void multiply(const Chain& c, const ChainScratch& s, int terms, int r, int n, Load load) {
    for (int m = 0; m < kBlock; m += C * V::width) multiply_vectors<V, bf16, half, R, C>(c, s, terms, r, n, m, load);
}

template <class V, bool bf16, bool half>
void fma(const Chain& c, ChainScratch& s) {
    constexpr int kVectors = kBlock / V::width, kAtOnce = kVectors < 8 ? kVectors : 8;  // of a row alone: what registers hold
    constexpr int kRows = 4, kWide = kAtOnce / (V::width == 16 ? 1 : 4);                // of several
    for (std::int64_t i = 0; i < c.length; i += kMaxStep) {
        const std::int32_t* k = c.order + i;
        const int terms = c.length - i < kMaxStep ? static_cast<int>(c.length - i) : kMaxStep;
        decode_x<V, bf16>(c, s, k, terms);
        for (int n = 0; n < c.columns; n += kBlock) {
            int r = 0;
            if (c.rows < kRows && n + kBlock <= c.columns) {  // each weight is used so seldom that it is not stored
                const auto load = [&](int j, int m) {
                    const std::uint16_t* w = c.w + k[j] * c.w_stride + n + m;
                    const std::int32_t* ahead = k + j + kAhead;
                    if (m % 32 == 0 && ahead < c.order + c.length) __builtin_prefetch(c.w + *ahead * c.w_stride + n + m);
                    return V::template expand<bf16>(w);
                };
                for (; r < c.rows; ++r) multiply<V, bf16, half, 1, kAtOnce>(c, s, terms, r, n, load);
                continue;
            }
            decode_w<V, bf16>(c, s, k, terms, n);
            const auto load = [&](int j, int m) { return V::template load<typename V::F>(s.w + j * kBlock + m); };
            for (; r + kRows <= c.rows; r += kRows) multiply<V, bf16, half, kRows, kWide>(c, s, terms, r, n, load);
            for (; r < c.rows; ++r) multiply<V, bf16, half, 1, kAtOnce>(c, s, terms, r, n, load);
        }
    }
}

template <class V>
void half_dot(const Chain& c, ChainScratch& s) {
    using F = typename V::F;
    const int terms = c.step.terms;
    for (std::int64_t i = 0; i < c.length; i += terms) {
        const std::int32_t* k = c.order + i;
        decode_x<V, false>(c, s, k, terms);
        const std::uint16_t* scales = c.scales + c.group[k[0]] * c.w_stride;
        for (int n = 0; n < c.columns; n += kBlock) {
            decode_w<V, false>(c, s, k, terms, n);
            for (int m = 0; m < kBlock; ++m) s.w_bits[m] = n + m < c.columns ? scales[n + m] : 0;
            V::template decode<false>(s.w_bits, s.scale, s.x_exponent);  // those bytes have no reader here
            for (int r = 0; r < c.rows; ++r)
                for (int m = 0; m < kBlock; m += V::width) {
                    F low{}, high{};
                    for (int j = 0; j < terms; j += 2) {
                        const float *w = s.w + j * kBlock + m, *x = s.x + j * c.rows + r;
                        low = V::half_fma(V::splat(x[0]), V::template load<F>(w), low);
                        high = V::half_fma(V::splat(x[c.rows]), V::template load<F>(w + kBlock), high);
                    }
                    float* sum = c.sum + r * c.sum_stride + n + m;
                    V::store(sum, V::fma(low + high, V::template load<F>(s.scale + m), V::template load<F>(sum)));
                }
        }
    }
}

// Whether int32 holds the products of a step for any significands, and no zero term can reach above the floor of e_max.
inline bool fits(const Chain& c) {
    const ChainStep& s = c.step;
    if (s.fraction_bits > 28 || s.terms > (1 << 29 >> s.fraction_bits) || c.length > (1 << 24)) return false;
    return s.half ? !c.bf16 && s.zero_exponent <= -14 && s.zero_exponent >= s.fraction_bits - 126 :
                    s.zero_exponent <= s.fraction_bits - 126;
}

template <class V>
void run_chain(const Chain& c, ChainScratch& s) {
    for (int r = 0; r < c.rows; ++r)
        for (int n = 0; n < c.columns; n += V::width) V::store(c.sum + r * c.sum_stride + n, typename V::F{});
    const ChainStep& step = c.step;
    if (step.kind == StepKind::tensor_core ? !fits(c) : c.bf16 && (step.half || step.kind == StepKind::half_dot))
        exact::chain(c);
    else if (step.kind == StepKind::tensor_core)
        step.half ? tensor_core<V, false, true>(c, s) :
        c.bf16    ? tensor_core<V, true, false>(c, s) :
                    tensor_core<V, false, false>(c, s);
    else if (step.kind == StepKind::half_dot)
        half_dot<V>(c, s);
    else
        step.half ? fma<V, false, true>(c, s) : c.bf16 ? fma<V, true, false>(c, s) : fma<V, false, false>(c, s);
}

}  // namespace
}  // namespace qlab
