// The CUDA engine's kernels on the CPU: the device code itself, with intrinsics replaced by the host's operations
// (csrc/replay_arithmetic.cuh).
#include "fibers.hpp"
#include "replay_plain.cuh"

using namespace qlab::replay;

namespace {

template <class S>
void run_shape(const Problem& p, const Rule& rule, const ChainTile* tiles, int count, float* results) {
    launch(count, S::threads, [&] {
        if (p.is_bf16)
            fast_chains<S, true, false>(p, rule, tiles, results);
        else if (rule.half)
            fast_chains<S, false, true>(p, rule, tiles, results);
        else
            fast_chains<S, false, false>(p, rule, tiles, results);
    });
}

}  // namespace

extern "C" {

void chains(int shape, const Problem* p, const Rule* rule, const ChainTile* tiles, int count, float* results) {
    if (shape == kShapes)
        launch(count, kPlainColumns, [&] { plain_chains(*p, *rule, tiles, results); });
    else
        with_shape(shape, [&](auto tile) { run_shape<decltype(tile)>(*p, *rule, tiles, count, results); });
    std::fesetround(FE_TONEAREST);
}

void join(const Problem* p, const OpRow* ops, const JoinTile* tiles, int count, const float* results, void* y, int raw) {
    launch(count, kPlainColumns, [&] { join_chains(*p, ops, tiles, results, y, raw); });
    std::fesetround(FE_TONEAREST);
}

int shapes() { return kShapes; }

void shape_size(int shape, int* size) {
    with_shape(shape, [&](auto tile) { size[0] = tile.rows, size[1] = tile.columns; });
    if (shape == kShapes) size[0] = kPlainRows, size[1] = kPlainColumns;
}

int is_fast(const Rule* rule, int is_bf16) { return fast_rule(*rule, is_bf16); }

// Row by row: one fused sum in 64-bit integers, and by the fast form where it applies (`applies`).
void fused_sums(const std::uint16_t* a, const std::uint16_t* b, const float* c, float* slow, float* fast, unsigned char* applies,
                long rows, const Rule* rule, int is_bf16) {
    for (long r = 0; r < rows; ++r) {
        const std::uint16_t *pa = a + r * rule->terms, *pb = b + r * rule->terms;
        const auto load = [&](int i) { return pa[i] | static_cast<std::uint32_t>(pb[i]) << 16; };
        slow[r] = fused_sum(c[r], *rule, is_bf16, load);
        applies[r] = fast_rule(*rule, is_bf16) && (rule->half ? fast_sum<true>(c[r], *rule, is_bf16, load, fast + r)
                                                              : fast_sum<false>(c[r], *rule, is_bf16, load, fast + r));
    }
    std::fesetround(FE_TONEAREST);
}

void round_values(const double* v, float* out, long count, int type) {
    for (long i = 0; i < count; ++i) out[i] = nearest(v[i], type);
    std::fesetround(FE_TONEAREST);
}

void add_pairs(const float* a, const float* b, float* out, long count, int type) {
    for (long i = 0; i < count; ++i) out[i] = add_values(a[i], b[i], type);
    std::fesetround(FE_TONEAREST);
}

void fma_halves(const std::uint16_t* a, const std::uint16_t* b, const std::uint16_t* c, std::uint16_t* out, long count) {
    for (long i = 0; i < count; ++i)
        out[i] = output_bits(fma_half(half_to_float(a[i]), half_to_float(b[i]), half_to_float(c[i]), false), false);
    std::fesetround(FE_TONEAREST);
}

void half_values(float* out, std::uint16_t* back) {
    for (unsigned v = 0; v < 65536; ++v) {
        out[v] = half_to_float(v);
        back[v] = output_bits(out[v], false);
    }
}
}
