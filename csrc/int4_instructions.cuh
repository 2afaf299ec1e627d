// The instructions of the INT4 GEMMs, one function each; the tests put the host's in their place.
#pragma once

#include <cstdint>

// The pass of the compiler for the host sees Hopper's code.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define QLAB_HOPPER 1
#else
#define QLAB_HOPPER 0
#endif

namespace qlab::int4 {

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ unsigned char shared_start[];
    return shared_start;
}

__device__ __forceinline__ std::uint32_t and_or(std::uint32_t a, std::uint32_t mask, std::uint32_t bits) {
    std::uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

// Of an 8 x 8 matrix, two neighbouring elements of a row a lane: the same of its transpose.
__device__ __forceinline__ std::uint32_t transposed(std::uint32_t pair) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
    return pair;
}

// d += a * b by m16n8k16: a holds 16 columns of the weight, b 8 rows of x.
template <bool kIsBf16>
__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    if constexpr (kIsBf16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices, whose rows the lanes name: row i % 8 of matrix i / 8 lies where lane i says.
__device__ __forceinline__ void load_matrices(std::uint32_t (&out)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row));
}

// 8 bytes at `from` + kOffset that are read once: past L1, and first to leave L2.
template <int kOffset>
__device__ __forceinline__ uint2 stream2(const unsigned char* from, [[maybe_unused]] std::uint64_t policy) {
    uint2 v;
#if QLAB_HOPPER
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2 + %4], %3;"
                 : "=r"(v.x), "=r"(v.y) : "l"(from), "l"(policy), "n"(kOffset));
#else
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(v.x), "=r"(v.y) : "l"(from), "n"(kOffset));
#endif
    return v;
}

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// What this thread has written, or been handed on, the copy engine sees too.
__device__ __forceinline__ void copies_see_all() {
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

// kThreads of a thread block meet; others go on.
template <int kThreads>
__device__ __forceinline__ void meet_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// A thread block hands on what its threads wrote before they met, and takes what others have handed on.
__device__ __forceinline__ int hand_on(int* counter) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
__device__ __forceinline__ int handed_on(const int* counter) {
    int count;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    return count;
}

// A warpgroup hands registers back, down to kCount a thread, or takes as many.
template <int kCount>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace qlab::int4
