// The CUDA engine's kernels on the CPU: every thread of a block is a fiber, and a barrier switches to the next one.
//
// What the tests build from this holds the device code itself, with intrinsics replaced by the host's operations
// (csrc/replay_arithmetic.cuh). It finds wrong indices and wrong arithmetic, not races that need real concurrency.
#include <ucontext.h>

#include <cstdint>
#include <memory>
#include <vector>

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx;

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

namespace {

constexpr std::size_t kStackBytes = 256 << 10;

struct Fibers {
    ucontext_t scheduler;
    std::vector<ucontext_t> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<char> done;
    unsigned current = 0;
    unsigned lanes[1024];
    bool any = false, any_before = false;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
} g;

void enter() {
    g.body(g.argument);
    g.done[g.current] = 1;
    swapcontext(&g.fibers[g.current], &g.scheduler);
}

// Runs `body` once per thread of a block; a barrier ends each thread's turn.
void run_block(unsigned threads, void (*body)(void*), void* argument) {
    g.body = body;
    g.argument = argument;
    if (g.fibers.size() < threads) g.fibers.resize(threads);
    while (g.stacks.size() < threads) g.stacks.emplace_back(new char[kStackBytes]);
    g.done.assign(threads, 0);
    for (unsigned t = 0; t < threads; ++t) {
        getcontext(&g.fibers[t]);
        g.fibers[t].uc_stack.ss_sp = g.stacks[t].get();
        g.fibers[t].uc_stack.ss_size = kStackBytes;
        g.fibers[t].uc_link = &g.scheduler;
        makecontext(&g.fibers[t], enter, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (unsigned t = 0; t < threads; ++t) {
            if (g.done[t]) continue;
            running = true;
            g.current = threadIdx.x = t;
            swapcontext(&g.scheduler, &g.fibers[t]);
        }
        g.any_before = g.any;
        g.any = false;
    }
}

}  // namespace

inline void __syncthreads() {
    const unsigned t = threadIdx.x;
    swapcontext(&g.fibers[t], &g.scheduler);
    threadIdx.x = t;
}

inline int __syncthreads_or(int value) {
    g.any |= value != 0;
    __syncthreads();
    return g.any_before;
}

inline unsigned __shfl_up_sync(unsigned, unsigned value, unsigned distance) {
    const unsigned t = threadIdx.x;
    g.lanes[t] = value;
    __syncthreads();
    const unsigned result = g.lanes[t % 32 < distance ? t : t - distance];
    __syncthreads();
    return result;
}

#include "replay_plain.cuh"

using namespace qlab::replay;

namespace {

template <class F>
void launch(int blocks, int threads, F kernel) {
    for (int b = 0; b < blocks; ++b) {
        blockIdx.x = static_cast<unsigned>(b);
        run_block(static_cast<unsigned>(threads), [](void* f) { (*static_cast<F*>(f))(); }, &kernel);
    }
}

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
