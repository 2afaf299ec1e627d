// Thread blocks one after the other on the CPU: a thread is a fiber.
//
// Each warp and each block has its own barrier, so that warps may meet unequal numbers of them. The device code that is
// included after this finds wrong indices and wrong arithmetic, not races that need real concurrency.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <memory>
#include <vector>

#include "types.hpp"

static Index threadIdx, blockIdx, blockDim;

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace on_host {

constexpr std::size_t kStackBytes = 64 << 10;

struct Barrier {
    unsigned size = 0, arrived = 0, turn = 0;
};

struct Block {
    ucontext_t scheduler;
    std::vector<ucontext_t> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<char> done;
    Barrier all, warps[32];
    float lanes[1024];
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
};
static Block g;

inline void enter() {
    g.body(g.argument);
    const unsigned t = threadIdx.x;
    g.done[t] = 1;
    swapcontext(&g.fibers[t], &g.scheduler);
}

inline void wait(Barrier& b) {
    const unsigned t = threadIdx.x, turn = b.turn;
    if (++b.arrived == b.size) {
        b.arrived = 0, ++b.turn;
        return;
    }
    while (b.turn == turn) {
        swapcontext(&g.fibers[t], &g.scheduler);
        threadIdx.x = t;
    }
}

template <class F>
void launch(Index blocks, unsigned threads, F kernel) {
    g.argument = &kernel;
    g.body = [](void* f) { (*static_cast<F*>(f))(); };
    blockDim = {threads, 1};
    g.fibers.resize(threads);
    while (g.stacks.size() < threads) g.stacks.emplace_back(new char[kStackBytes]);
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
            g.done.assign(threads, 0);
            g.all = {threads};
            for (Barrier& b : g.warps) b = {32};
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
                    threadIdx.x = t;
                    swapcontext(&g.scheduler, &g.fibers[t]);
                }
            }
        }
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::g.all); }
inline void __syncwarp() { on_host::wait(on_host::g.warps[threadIdx.x / 32]); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    const unsigned t = threadIdx.x;
    on_host::g.lanes[t] = value;
    __syncwarp();
    const float result = on_host::g.lanes[t ^ static_cast<unsigned>(mask)];
    __syncwarp();
    return result;
}
