// Chains in 64-bit integers and doubles, for everything that the vector loops leave out (chain.hpp).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "chain.hpp"
#include "rounding.hpp"
#include "tensor_core.hpp"

namespace qlab::exact {
namespace {

template <class Input>
float value(std::uint16_t bits) {
    return Input::fraction_bits == Bf16::fraction_bits ? from_bf16(bits) : from_half(bits);
}

// sum * 2^unit to the nearest fp16, even on a tie, held in fp32; too large gives infinity, a result of zero is +0.
float round_to_half(std::int64_t sum, int unit) {
    const std::uint64_t magnitude = sum < 0 ? 0 - static_cast<std::uint64_t>(sum) : static_cast<std::uint64_t>(sum);
    if (magnitude == 0) return 0.0f;
    const int top = 63 - __builtin_clzll(magnitude);
    const int drop = std::max(std::max(top - Fp16::fraction_bits, -24 - unit), 0);  // fp16's subnormal unit is 2^-24
    if (drop > 63) return 0.0f;
    std::uint64_t kept = magnitude >> drop;
    const std::uint64_t rest = magnitude - (kept << drop), half = drop ? std::uint64_t{1} << (drop - 1) : 1;
    kept += rest > half || (rest == half && (kept & 1));
    if (kept == 0) return 0.0f;
    const double rounded = std::ldexp(static_cast<double>(kept), drop + unit);
    const float result = rounded > 65504.0 ? HUGE_VALF : static_cast<float>(rounded);
    return sum < 0 ? -result : result;
}

// One fused sum with an fp16 accumulator: as fused_dot_add in tensor_core.hpp, but for the last rounding.
template <class Input>
float half_dot_add(const std::uint16_t* a, const std::uint16_t* b, float c, const Step& step) {
    std::array<Number, kMaxTerms + 1> term;
    std::array<int, kMaxTerms + 1> fraction;
    term[0] = decode<Fp16>(half_bits(c));
    fraction[0] = Fp16::fraction_bits;
    for (int k = 0; k < step.terms; ++k) {
        term[k + 1] = multiply(decode<Input>(a[k]), decode<Input>(b[k]));
        fraction[k + 1] = 2 * Input::fraction_bits;
    }
    bool nan = false, positive = false, negative = false;
    int largest = std::numeric_limits<int>::min();
    for (int i = 0; i <= step.terms; ++i) {
        nan |= term[i].kind == Kind::nan;
        positive |= term[i].kind == Kind::infinite && !term[i].negative;
        negative |= term[i].kind == Kind::infinite && term[i].negative;
        largest = std::max(largest, term[i].significand ? term[i].exponent : step.zero_exponent);
    }
    if (nan || (positive && negative)) return NAN;
    if (positive || negative) return negative ? -HUGE_VALF : HUGE_VALF;
    const int unit = largest - step.fraction_bits;
    std::int64_t sum = 0;
    for (int i = 0; i <= step.terms; ++i) sum += align(term[i], fraction[i], unit);
    return round_to_half(sum, unit);
}

template <class Input>
void chunk_of(const Chain& c, const std::int32_t* k, int row, int column, int columns) {
    const Step step{c.step.fraction_bits, c.step.terms, c.step.zero_exponent};
    std::uint16_t a[kMaxTerms], b[kMaxTerms];
    for (int j = 0; j < step.terms; ++j) a[j] = c.x[row * c.x_stride + k[j]];
    for (int n = column; n < column + columns; ++n) {
        float& sum = c.sum[row * c.sum_stride + n];
        if (std::isnan(sum)) continue;  // it stays
        for (int j = 0; j < step.terms; ++j) b[j] = c.w[k[j] * c.w_stride + n];
        if (c.step.half) {
            sum = half_dot_add<Input>(a, b, sum, step);
        } else {
            std::uint32_t bits;
            std::memcpy(&bits, &sum, sizeof bits);
            bits = fused_dot_add<Input>(a, b, bits, step);
            std::memcpy(&sum, &bits, sizeof bits);
        }
    }
}

// RN16(x * w + c). The product of two bf16 or fp16 is exact in a double, and where the sum is not, the smaller term is too
// small to decide a tie of fp16.
double half_fma(float x, float w, double c) { return nearest(static_cast<double>(x) * static_cast<double>(w) + c, Type::fp16); }

template <class Input>
float other_kind(const Chain& c, int row, int n) {
    const auto x = [&](std::int64_t i) { return value<Input>(c.x[row * c.x_stride + c.order[i]]); };
    const auto w = [&](std::int64_t i) { return value<Input>(c.w[c.order[i] * c.w_stride + n]); };
    if (c.step.kind == StepKind::fma) {
        double sum = 0;
        for (std::int64_t i = 0; i < c.length; ++i)
            sum = c.step.half ? half_fma(x(i), w(i), sum) : std::fmaf(x(i), w(i), static_cast<float>(sum));
        return static_cast<float>(sum);
    }
    float sum = 0;
    for (std::int64_t i = 0; i < c.length; i += c.step.terms) {
        double part[2] = {0, 0};
        for (int j = 0; j < c.step.terms; ++j) part[j & 1] = half_fma(x(i + j), w(i + j), part[j & 1]);
        const float scale = value<Input>(c.scales[c.group[c.order[i]] * c.w_stride + n]);
        sum = std::fmaf(static_cast<float>(part[0] + part[1]), scale, sum);
    }
    return sum;
}

template <class Input>
void chain_of(const Chain& c) {
    for (int r = 0; r < c.rows; ++r) {
        if (c.step.kind == StepKind::tensor_core)
            for (std::int64_t i = 0; i < c.length; i += c.step.terms) chunk_of<Input>(c, c.order + i, r, 0, c.columns);
        else
            for (int n = 0; n < c.columns; ++n) c.sum[r * c.sum_stride + n] = other_kind<Input>(c, r, n);
    }
}

}  // namespace

void chunk(const Chain& c, const std::int32_t* k, int row, int column, int columns) {
    c.bf16 ? chunk_of<Bf16>(c, k, row, column, columns) : chunk_of<Fp16>(c, k, row, column, columns);
}

void chain(const Chain& c) { c.bf16 ? chain_of<Bf16>(c) : chain_of<Fp16>(c); }

}  // namespace qlab::exact
