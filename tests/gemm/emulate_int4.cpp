// The INT4 GEMMs on the CPU: their device code itself (csrc/int4_mma.cuh, int4_wgmma.cuh), with the instructions of
// csrc/int4_instructions.cuh and wgmma.cuh in the host's hands. A tensor core's is tensor_core.hpp's fused sum, lane by lane after
// PTX's tables of fragments. With QLAB_HOPPER 0 it is the code for older generations.
#define QLAB_GRID

#include "grid.hpp"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <utility>

#include "tensor_core.hpp"

namespace qlab::int4 {

using on_host::block;

static Step core;  // the tensor core's

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(on_host::shared); }
inline std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(static_cast<const char*>(p) - on_host::shared);
}
inline std::uint32_t and_or(std::uint32_t a, std::uint32_t mask, std::uint32_t bits) { return (a & mask) | bits; }

inline std::uint32_t half_of_pair(std::uint32_t pair, int which) { return which ? pair >> 16 : pair & 0xFFFFu; }

inline std::uint32_t transposed(std::uint32_t pair) {
    std::uint32_t own[2] = {pair, 0};
    on_host::together(own, [](auto of) {
        const auto at = [&](int row, int column) { return half_of_pair(of(4 * row + column / 2)[0], column % 2); };
        for (int i = 0; i < 32; ++i) of(i)[1] = at(2 * (i % 4), i / 4) | at(2 * (i % 4) + 1, i / 4) << 16;
    });
    return own[1];
}

template <bool kIsBf16>
float dot(float start, const std::uint16_t (&a)[16], const std::uint16_t (&b)[16]) {
    std::uint32_t sum = on_host::bits<std::uint32_t>(start);
    for (int k = 0; k < 16; k += core.terms)
        sum = kIsBf16 ? fused_dot_add<qlab::Bf16>(a + k, b + k, sum, core) : fused_dot_add<qlab::Fp16>(a + k, b + k, sum, core);
    return on_host::bits<float>(sum);
}

struct Fragments {
    float* d;
    std::uint32_t a[4], b[2];
};

// Row r of operand A, from the lanes' registers.
template <class Of>
void row_of_a(Of of, int r, std::uint16_t (&out)[16]) {
    for (int k = 0; k < 16; ++k)
        out[k] = static_cast<std::uint16_t>(half_of_pair(of(r % 8 * 4 + k % 8 / 2).a[r / 8 + 2 * (k / 8)], k % 2));
}

template <bool kIsBf16>
void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    Fragments own{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    on_host::together(own, [](auto of) {
        std::uint16_t left[16], right[16];
        for (int r = 0; r < 16; ++r) {
            row_of_a(of, r, left);
            for (int n = 0; n < 8; ++n) {
                for (int k = 0; k < 16; ++k) right[k] = static_cast<std::uint16_t>(half_of_pair(of(4 * n + k % 8 / 2).b[k / 8], k % 2));
                float& sum = of(r % 8 * 4 + n / 2).d[r / 8 * 2 + n % 2];
                sum = dot<kIsBf16>(sum, left, right);
            }
        }
    });
}

inline void load_matrices(std::uint32_t (&out)[4], std::uint32_t row) {
    struct {
        std::uint32_t row, out[4];
    } own{row, {}};
    if (row % 16) std::abort();
    on_host::together(own, [](auto of) {
        for (int i = 0; i < 32; ++i)
            for (int m = 0; m < 4; ++m) std::memcpy(&of(i).out[m], on_host::place(of(8 * m + i / 4).row) + i % 4 * 4, 4);
    });
    std::copy(own.out, own.out + 4, out);
}

template <int kOffset>
uint2 stream2(const unsigned char* from, std::uint64_t) {
    uint2 v;
    std::memcpy(&v, from + kOffset, sizeof v);
    return v;
}

inline void complete(on_host::Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.count;
}
inline void barrier_init(std::uint32_t barrier, int count) { block.barriers[barrier] = {count, count, 0, 0, {}}; }
inline void copies_see_all() {}
inline void barrier_arrive(std::uint32_t barrier) {
    on_host::Barrier& b = block.barriers.at(barrier);
    --b.pending, complete(b);
}
inline void barrier_expect(std::uint32_t barrier, int bytes) {
    block.barriers.at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(std::uint32_t barrier, int phase) {
    on_host::Barrier& b = block.barriers.at(barrier);
    on_host::until([&] {
        for (auto& copy : std::exchange(b.copies, {})) copy();
        return b.phase != phase;
    });
}

inline void by_lot(std::uint32_t barrier, std::function<void()> copy) {
    if (block.lot() & 1)
        copy();
    else
        block.barriers.at(barrier).copies.push_back(std::move(copy));
}
inline void copied(std::uint32_t barrier, int bytes) {
    on_host::Barrier& b = block.barriers.at(barrier);
    b.bytes -= bytes, complete(b);
}

inline std::uint64_t evict_first() { return 0; }
inline void prefetch_map(const void*) {}
inline void let_next_start() {}
inline void wait_for_previous() {}

inline void copy_bulk(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier) {
    if (to % 16 || reinterpret_cast<std::uintptr_t>(from) % 16 || bytes % 16) std::abort();
    by_lot(barrier, [=] {
        std::memcpy(on_host::place(to), from, bytes);
        copied(barrier, bytes);
    });
}

inline std::uint32_t swizzled(std::uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_boxes(std::uint32_t to, const void* map, int second, int third, std::uint32_t barrier, int first = 0) {
    const CUtensorMap m = *static_cast<const CUtensorMap*>(map);  // the thread may have ended by the time of the copy
    if (to % 1024 && (m.box[1] % 8 == 0 || to % 128)) std::abort();
    by_lot(barrier, [=] {
        std::uint32_t at = to;
        for (int z = third; z < third + m.box[2]; ++z)
            for (int y = second; y < second + m.box[1]; ++y)
                for (int x = first; x < first + 64; ++x, at += 2) {
                    const bool inside = x < m.sizes[0] && y < m.sizes[1] && z < m.sizes[2];
                    const std::uint16_t v = inside ? m.base[x + y * m.strides[1] + z * m.strides[2]] : std::uint16_t{0};
                    std::memcpy(on_host::place(swizzled(at)), &v, 2);
                }
        copied(barrier, static_cast<int>(at - to));
    });
}
inline void copy_box(std::uint32_t to, const void* map, int column, int row, std::uint32_t barrier) {
    copy_boxes(to, map, row, 0, barrier, column);
}

// Copies of a thread, done by the time it has arrived at a barrier.
static thread_local std::vector<std::function<void()>> pending[1024];

inline void copy16(std::uint32_t to, const void* from) {
    if (to % 16 || reinterpret_cast<std::uintptr_t>(from) % 16) std::abort();
    pending[threadIdx.x].push_back([=] { std::memcpy(on_host::place(to), from, 16); });
}
inline void barrier_arrive_after_copies(std::uint32_t barrier) {
    by_lot(barrier, [barrier, copies = std::exchange(pending[threadIdx.x], {})] {
        for (auto& copy : copies) copy();
        barrier_arrive(barrier);
    });
}

inline void meet_cluster() { on_host::meet_cluster(); }
inline float4 load_of_rank(std::uint32_t address, int rank) {
    const int cluster = on_host::grid->cluster;
    float4 v;
    std::memcpy(&v, on_host::grid->anchors[blockIdx.x / cluster * cluster + rank] + static_cast<std::int32_t>(address), sizeof v);
    return v;
}

inline std::uint32_t load_shared(std::uint32_t address) { return *reinterpret_cast<std::uint32_t*>(on_host::place(address)); }
inline uint2 load_shared2(std::uint32_t address) { return *reinterpret_cast<uint2*>(on_host::place(address)); }
inline std::uint32_t load_shared_half(std::uint32_t address) { return *reinterpret_cast<std::uint16_t*>(on_host::place(address)); }

constexpr int kFar = 1 << 30;
inline int hand_on(int* counter) { return atomicAdd(counter, 1); }
inline int handed_on(const int* counter) { return on_host::grid->stuck ? kFar : __atomic_load_n(counter, __ATOMIC_SEQ_CST); }

template <int kThreads>
void meet_threads() {
    on_host::meet(block.some, kThreads);
}
template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}

constexpr std::uint32_t kDescriptorHigh = 0;
inline std::uint32_t descriptor(std::uint32_t address) { return address >> 4; }
template <class Value>
void pin(Value&) {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
void wgmma_wait() {}

template <class T, int kNumbers>
void wgmma(float (&d)[kNumbers], const std::uint32_t (&a)[4], std::uint32_t b) {
    struct Operands : Fragments {
        std::uint32_t at;
    } own{{d, {a[0], a[1], a[2], a[3]}, {}}, b};
    on_host::together(own, [](auto of) {
        std::uint16_t left[16][16], right[16];
        for (int r = 0; r < 16; ++r) row_of_a(of, r, left[r]);
        for (int n = 0; n < 2 * kNumbers; ++n) {
            for (int k = 0; k < 16; ++k)
                std::memcpy(right + k, on_host::place(swizzled((of(0).at << 4) + n / 8 * 1024 + n % 8 * 128 + 2 * k)), 2);
            for (int r = 0; r < 16; ++r) {
                float& sum = of(r % 8 * 4 + n % 8 / 2).d[n / 8 * 4 + r / 8 * 2 + n % 2];
                sum = dot<T::kIsBf16>(sum, left[r], right);
            }
        }
    });
}

}  // namespace qlab::int4

#include "int4_mma.cuh"
#if QLAB_HOPPER
#define __CUDA_ARCH_FEAT_SM90_ALL
#include "int4_wgmma.cuh"
#endif

using namespace qlab::int4;

namespace {

CUtensorMap map_of(const Arguments& a, int rows, int boxes) {
    const std::int64_t width = boxes > 1 ? 64 : a.k;
    return {a.x, {width, a.m, boxes > 1 ? (a.k + 63) / 64 : 1}, {1, a.x_stride, 64}, {64, rows, boxes}};
}

template <class S, class Kernel>
void run(const Arguments& a, int blocks, int shared_bytes, int boxes, unsigned seed, Kernel kernel) {
    if (shared_bytes > static_cast<int>(on_host::kSharedBytes)) std::abort();
    const CUtensorMap x = map_of(a, S::kRows, boxes);
    if (!on_host::launch(blocks, S::kThreads, a.cluster, seed, [&] { kernel(a, x); })) throw std::runtime_error("a thread waits for ever");
}

struct Choice {
    int rows, columns, chains, total, teams, bf16;
};

template <int kRows, int kChains, int kTeams>
bool try_mma(const Choice& c, const Arguments& a, int blocks, unsigned seed) {
    if (c.columns != 64 || c.rows != kRows || c.chains != kChains || c.teams != kTeams) return false;
    const auto with = [&](auto s) {
        using S = decltype(s);
        run<S>(a, blocks, S::kSharedBytes, S::kBoxes, seed, c.bf16 ? int4_mma<S, qlab::int4::Bf16> : int4_mma<S, qlab::int4::Fp16>);
    };
    a.group_rows > 1 ? with(MmaShape<kRows, kChains, true, kTeams>{}) : with(MmaShape<kRows, kChains, false, kTeams>{});
    return true;
}

#if QLAB_HOPPER
template <class S>
bool try_wgmma(const Choice& c, const Arguments& a, int blocks, unsigned seed) {
    if (c.columns != S::kColumns || c.rows != S::kRows || c.chains != S::kChains || (c.total != 0) != S::kTotal) return false;
    const auto with = [&](auto fine) {
        constexpr bool kFine = decltype(fine)::value;
        run<S>(a, blocks, S::shared_bytes(a.block_words), 1, seed, c.bf16 ? int4_wgmma<S, qlab::int4::Bf16, kFine> : int4_wgmma<S, qlab::int4::Fp16, kFine>);
    };
    a.group_rows > 1 ? with(std::true_type{}) : with(std::false_type{});
    return true;
}
#endif

bool run_variant(bool wgmma, const Choice& c, const Arguments& a, int blocks, unsigned seed) {
#ifdef QLAB_ONE_VARIANT
#if QLAB_ONE_VARIANT == 1
    return !wgmma && try_mma<16, 4, 1>(c, a, blocks, seed);
#else
    return wgmma && try_wgmma<WgmmaShape<16, 128, 1>>(c, a, blocks, seed);
#endif
#else
    if (!wgmma)
        return try_mma<8, 1, 1>(c, a, blocks, seed) || try_mma<16, 1, 1>(c, a, blocks, seed) ||
               try_mma<8, 2, 1>(c, a, blocks, seed) || try_mma<16, 2, 2>(c, a, blocks, seed) ||
               try_mma<16, 4, 1>(c, a, blocks, seed) || try_mma<8, 4, 2>(c, a, blocks, seed) ||
               try_mma<8, 4, 4>(c, a, blocks, seed);
#if QLAB_HOPPER
    return try_wgmma<WgmmaShape<16, 128, 1>>(c, a, blocks, seed) || try_wgmma<WgmmaShape<128, 256, 1>>(c, a, blocks, seed) ||
           try_wgmma<WgmmaShape<256, 128, 1>>(c, a, blocks, seed) || try_wgmma<WgmmaShape<32, 128, 2>>(c, a, blocks, seed) ||
           try_wgmma<WgmmaShape<32, 64, 4>>(c, a, blocks, seed) || try_wgmma<WgmmaShape<64, 256, 1, true>>(c, a, blocks, seed) ||
           try_wgmma<WgmmaShape<176, 128, 1, true>>(c, a, blocks, seed);
#else
    return 0;
#endif
#endif
}

}  // namespace

// An empty text, or what is wrong.
extern "C" const char* run_launch(int wgmma, const Choice* c, const qlab::Step* step, const Arguments* a, int blocks, unsigned seed) {
    core = *step;
    try {
        return run_variant(wgmma, *c, *a, blocks, seed) ? "" : "it is not compiled for the CPU";
    } catch (const std::runtime_error&) {
        return "a thread waits for ever";
    }
}

extern "C" int arguments_size() { return sizeof(Arguments); }
