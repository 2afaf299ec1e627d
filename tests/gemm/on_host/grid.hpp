// Thread blocks side by side on the CPU: each is a thread of the host, and its threads are fibers that switch wherever they wait.
//
// What is declared __shared__ is a thread block's own. A shared address is a 32-bit offset, as on the device. A copy of the copy
// engine is done at once or when somebody waits for it, by lot, and warps fall behind by lot: what is read too early is then not
// there yet, and what is overwritten too early is gone.
#pragma once

#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "types.hpp"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))

static thread_local Index threadIdx, blockIdx;

namespace on_host {

constexpr std::size_t kStackBytes = 96 << 10, kSharedBytes = 256 << 10;
constexpr int kPatience = 50'000;  // turns, after which it is a deadlock

struct Meeting {
    unsigned arrived = 0, turn = 0;
};

struct Barrier {
    int count = 0, pending = 0, bytes = 0, phase = 0;
    std::vector<std::function<void()>> copies;  // that wait for somebody who waits for them
};

struct Grid {
    std::vector<char*> anchors;  // of each thread block: where its shared addresses begin
    int cluster = 1;
    std::vector<std::atomic<unsigned>> arrived;  // of each cluster: thread blocks that came to its barrier, over all turns
    std::atomic<bool> stuck{false};              // a thread waited in vain: from then on nobody waits
};
inline Grid* grid;

struct Block {
    ucontext_t scheduler;
    std::vector<ucontext_t> fibers;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<char> done;
    unsigned threads = 0, live = 0;
    Meeting all, some, cluster, warps[32];
    const void* operands[32][32];
    std::map<std::uint32_t, Barrier> barriers;
    std::mt19937 lot;
    std::function<void()> body;
};
inline thread_local Block block;
inline thread_local __align__(1024) char shared[kSharedBytes];

inline void yield() {
    const unsigned t = threadIdx.x;
    swapcontext(&block.fibers[t], &block.scheduler);
    threadIdx.x = t;
}

template <class Condition>
void until(Condition holds) {
    for (int turns = 0; !grid->stuck && !holds(); ++turns) {
        if (turns > kPatience) grid->stuck = true;
        yield();
    }
}

inline void meet(Meeting& m, unsigned count) {
    const unsigned turn = m.turn;
    if (++m.arrived == count)
        m.arrived = 0, ++m.turn;
    else
        until([&] { return m.turn != turn; });
}

// All threads of a cluster meet; those that have ended count as having come.
inline void look_for_cluster() {
    if (block.cluster.arrived == 0 || block.cluster.arrived < block.live) return;
    block.cluster.arrived = 0, ++block.cluster.turn;
    ++grid->arrived[blockIdx.x / grid->cluster];
}
inline void meet_cluster() {
    const unsigned turn = block.cluster.turn;
    ++block.cluster.arrived;
    look_for_cluster();
    until([&] { return block.cluster.turn != turn && grid->arrived[blockIdx.x / grid->cluster] >= (turn + 1) * grid->cluster; });
}

inline void enter() {
    block.body();
    const unsigned t = threadIdx.x;
    block.done[t] = 1, --block.live;
    look_for_cluster();
    swapcontext(&block.fibers[t], &block.scheduler);
}

inline void run_block(unsigned number, unsigned threads, const std::function<void()>& body, unsigned seed) {
    blockIdx.x = number;
    block.body = body, block.threads = block.live = threads, block.lot.seed(seed + number);
    block.fibers.resize(threads), block.done.assign(threads, 0);
    for (unsigned t = 0; t < threads; ++t) {
        block.stacks.emplace_back(new char[kStackBytes]);
        getcontext(&block.fibers[t]);
        block.fibers[t].uc_stack.ss_sp = block.stacks[t].get();
        block.fibers[t].uc_stack.ss_size = kStackBytes;
        block.fibers[t].uc_link = &block.scheduler;
        makecontext(&block.fibers[t], enter, 0);
    }
    unsigned asleep[32] = {};
    while (block.live) {
        for (unsigned t = 0; t < threads; ++t) {
            // Now and then a warp sleeps while the others go on.
            if (t % 32 == 0) asleep[t / 32] = asleep[t / 32] ? asleep[t / 32] - 1 : block.lot() % 128 ? 0 : block.lot() % 256;
            if (block.done[t] || asleep[t / 32]) continue;
            threadIdx.x = t;
            swapcontext(&block.scheduler, &block.fibers[t]);
        }
        std::this_thread::yield();
    }
}

// All thread blocks at once; `cluster` of them, neighbours, see each other's shared memory. Whether nobody waited in vain.
inline bool launch(unsigned blocks, unsigned threads, int cluster, unsigned seed, const std::function<void()>& body) {
    Grid here;
    here.cluster = cluster, here.anchors.resize(blocks);
    here.arrived = std::vector<std::atomic<unsigned>>(blocks / cluster + 1);
    grid = &here;
    std::atomic<unsigned> ready{0};
    std::vector<std::thread> running;
    for (unsigned b = 0; b < blocks; ++b)
        running.emplace_back([&, b] {
            std::memset(shared, 0xFF, sizeof shared);  // NaN wherever nothing was written
            here.anchors[b] = shared;
            ++ready;
            while (ready != blocks) std::this_thread::yield();
            run_block(b, threads, body, seed);
        });
    for (auto& t : running) t.join();
    return !here.stuck;
}

// All lanes of a warp bring their operands; the last one computes for all.
template <class Operands, class F>
void together(Operands& own, F compute) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    block.operands[warp][lane] = &own;
    if (block.warps[warp].arrived == 31) compute([&](int i) -> Operands& { return *const_cast<Operands*>(static_cast<const Operands*>(block.operands[warp][i])); });
    meet(block.warps[warp], 32);
}

inline char* place(std::uint32_t address) { return shared + static_cast<std::int32_t>(address); }

}  // namespace on_host

inline void __syncthreads() { on_host::meet(on_host::block.all, on_host::block.threads); }
inline void __syncwarp() { on_host::meet(on_host::block.warps[threadIdx.x / 32], 32); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __nanosleep(unsigned) { on_host::yield(); }
inline int atomicAdd(int* to, int by) { return __atomic_fetch_add(to, by, __ATOMIC_SEQ_CST); }
inline unsigned __shfl_sync(unsigned, unsigned value, int lane) {
    unsigned found[2] = {value, 0};
    on_host::together(found, [&](auto of) {
        for (int i = 0; i < 32; ++i) of(i)[1] = of(lane)[0];
    });
    return found[1];
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float4 __ldcg(const float4* p) { return *p; }
inline void __stcg(float4* p, float4 v) { *p = v; }
