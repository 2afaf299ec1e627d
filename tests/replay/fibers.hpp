// Thread blocks on the CPU: every thread is a fiber, and a barrier switches to the next one.
//
// The device code that is included after this file finds wrong indices and wrong arithmetic, not races that need real
// concurrency. All threads of a block must meet the same barriers.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <memory>
#include <vector>

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, gridDim;

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

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

template <class F>
void launch(int blocks, int threads, F kernel) {
    gridDim.x = static_cast<unsigned>(blocks);
    for (int b = 0; b < blocks; ++b) {
        blockIdx.x = static_cast<unsigned>(b);
        run_block(static_cast<unsigned>(threads), [](void* f) { (*static_cast<F*>(f))(); }, &kernel);
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
