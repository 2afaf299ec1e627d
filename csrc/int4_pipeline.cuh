// A ring of stages in shared memory between one warp that loads and the warps that compute, by mbarriers.
//
// Each stage has a barrier that says it is full (bytes of bulk copies on Hopper, one arrival per lane of cp.async before) and one
// that says it is empty (one arrival per computing warp).
#pragma once

#include "int4_fragments.cuh"

// The pass of the compiler for the host sees Hopper's code.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define QLAB_HOPPER 1
#else
#define QLAB_HOPPER 0
#endif

namespace qlab::int4 {

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After barrier_init, before a barrier of the thread block: the copy engine sees them too.
__device__ __forceinline__ void barriers_ready() {
#if QLAB_HOPPER
    asm volatile("fence.proxy.async;" ::: "memory");
#else
    __threadfence_block();
#endif
}

__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, int phase) {
    std::uint32_t done;
    do {
#if QLAB_HOPPER
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
#else
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
#endif
    } while (!done);
}

__device__ __forceinline__ std::uint64_t evict_first() {
    std::uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

#if QLAB_HOPPER
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, int bytes) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;}" ::"r"(barrier), "r"(bytes) : "memory");
}

// `bytes` (a multiple of 16) of global memory into shared memory, by one thread.
__device__ __forceinline__ void copy_bulk(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier) : "memory");
}

// The same for what is read once: it leaves L2 before anything else.
__device__ __forceinline__ void stream_bulk(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier, std::uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// A box of a 2-dimensional tensor from its column and row on, by one thread; beyond the tensor's ends there are zeros.
__device__ __forceinline__ void copy_box(std::uint32_t to, const void* map, int column, int row, std::uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map),
                 "r"(column), "r"(row), "r"(barrier) : "memory");
}

// The same of a 3-dimensional one whose first dimension is a box's width, from a place of the second and of the third on.
__device__ __forceinline__ void copy_boxes(std::uint32_t to, const void* map, int second, int third, std::uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(map), "r"(0), "r"(second), "r"(third), "r"(barrier) : "memory");
}
#endif

// A tensor's map is read from memory like all else.
__device__ __forceinline__ void prefetch_map([[maybe_unused]] const void* map) {
#if QLAB_HOPPER
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// 16 bytes by each thread that calls it, past L1.
__device__ __forceinline__ void copy16(std::uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Arrives when the calling thread's copies so far have.
__device__ __forceinline__ void barrier_arrive_after_copies(std::uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Programmatic dependent launch: the next kernel may start and load what no kernel writes; then it waits for this one.
__device__ __forceinline__ void let_next_start() {
#if QLAB_HOPPER
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if QLAB_HOPPER
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The thread blocks of a cluster hold the pieces of one tile; each reads the others' sums in their shared memory.
__device__ __forceinline__ void meet_cluster() {
#if QLAB_HOPPER
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ float4 load_of_rank(std::uint32_t address, int rank) {
    float4 v{};
#if QLAB_HOPPER
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(rank) : "memory");
#endif
    return v;
}

__device__ __forceinline__ float4 operator+(float4 u, float4 v) { return make_float4(u.x + v.x, u.y + v.y, u.z + v.z, u.w + v.w); }

// ((P0 + P1) + P2) + ... over the ranks of a cluster, each sum at the same place of its thread block.
__device__ __forceinline__ float4 sum_of_ranks(std::uint32_t address, int count) {
    float4 sum = load_of_rank(address, 0);
#pragma unroll 8
    for (int r = 1; r < count; ++r) sum = sum + load_of_rank(address, r);
    return sum;
}

__device__ __forceinline__ std::uint32_t load_shared(std::uint32_t address) {
    std::uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

__device__ __forceinline__ uint2 load_shared2(std::uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

__device__ __forceinline__ std::uint32_t load_shared_half(std::uint32_t address) {
    std::uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
    return v;
}

// Which stage comes next, and how often the ring has gone round.
template <int kStages>
struct Ring {
    std::uint32_t full, empty;  // addresses of the barriers of stage 0
    int stage = 0, phase = 0;

    __device__ void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
    __device__ std::uint32_t full_barrier() const { return full + 8 * stage; }
    __device__ std::uint32_t empty_barrier() const { return empty + 8 * stage; }
    __device__ void wait_full() const { barrier_wait(full_barrier(), phase); }
    __device__ void wait_empty() const { barrier_wait(empty_barrier(), phase ^ 1); }
};

// Where the work of a thread block stands: its pieces one after the other, kStep rows of K at a time, from a block's first row on.
template <int kStep>
struct Cursor {
    int piece, last, k, k_begin, k_end, row, rows, column;

    __device__ explicit Cursor(const Arguments& a) : piece(first_piece(a)), last(behind_pieces(a)) { open(a); }
    __device__ bool valid() const { return piece < last; }
    __device__ void open(const Arguments& a) {
        k = k_end = 0;
        if (!valid()) return;
        const Piece p = piece_of(a, piece);
        row = p.row, rows = p.rows, column = p.column, k_begin = p.k_begin, k_end = p.k_end;
        k = k_begin / kBlockRows * kBlockRows;
    }
    // Whether the next step is of another piece, or there is none.
    __device__ bool advance(const Arguments& a) {
        k += kStep;
        if (k < k_end) return false;
        ++piece;
        open(a);
        return true;
    }
};

}  // namespace qlab::int4
