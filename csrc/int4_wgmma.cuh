// INT4 GEMM for many rows of x on Hopper: y^T = w^T x^T with wgmma, the weight decoded into registers as operand A.
//
// A thread block takes its pieces in turn. One warp brings blocks of the weight and the matching 128 columns of x (128-byte
// swizzled rows, which wgmma reads by itself) into a ring of stages, on across the pieces. Two warpgroups compute, 64 k at a
// time: each decodes the next codes while the tensor cores work on the ones before. With one chain a warpgroup owns half of the
// columns; with two or four both own all of them and take the 32-row chunks in turn. Chains are joined in shared memory, pieces
// of one tile through a workspace, in an order that is fixed.
#pragma once

#include <cuda.h>

#include "int4_pipeline.cuh"
#ifdef __CUDACC__
#include "wgmma.cuh"
#endif

namespace qlab::int4 {

template <int kTileRows, int kTileColumns, int kChainCount, bool kRunningTotal = false>
struct WgmmaShape {
    static constexpr int kRows = kTileRows, kColumns = kTileColumns, kChains = kChainCount;
    static constexpr bool kTotal = kRunningTotal;
    static constexpr int kBlocks = kColumns / kBlockColumns;
    static constexpr int kThreads = 3 * 128, kComputing = 2 * 128;
    static constexpr int kTiles = kChains == 1 ? kBlocks / 2 : kBlocks;  // of 64 columns that a warpgroup works on
    static constexpr int kSets = kChains == 4 ? 2 : 1;                   // of accumulators: chains of a warpgroup
    static constexpr int kSteps = kChains == 1 ? 4 : 2;                  // of 16 k that a warpgroup takes of 64
    // What a thread keeps of the joined sums: tiles of 64 columns, groups of 8 rows.
    static constexpr int kOwnTiles = kChains == 2 ? kTiles / 2 : kTiles, kOwnGroups = kChains == 4 ? kRows / 16 : kRows / 8;
    static constexpr int kScratch = kChains == 1 ? 0 : kColumns * kRows * 4 * (kChains == 2 ? 1 : 2);
    // Two thread blocks on a multiprocessor where the accumulators leave room.
    static constexpr bool kTwo = kChains == 1 && kTiles == 1 && kRows <= 64;
    static constexpr int kRegisters = kTwo ? 104 : 240;
    static constexpr int kXBytes = kRows * 2 * kBlockRows, kMostBlockBytes = 4 * (kCodeWords + 4 * 48);
    static constexpr int kRoom = (kTwo ? 112 : 226) * 1024 - 1024 - kScratch;
    static constexpr int kFit = kRoom / (kXBytes + kBlocks * kMostBlockBytes), kStages = kFit < 8 ? kFit : 8;
    static_assert(kStages >= 3);

    static int shared_bytes(int block_words) { return 1024 + kStages * (kXBytes + kBlocks * 4 * block_words) + kScratch; }
};

// One warp loads: lane 0 waits and announces the bytes, each block of the weight is one copy of one lane.
template <class S>
__device__ void load_for_wgmma(const Arguments& a, const CUtensorMap* x_map, std::uint32_t base, Ring<S::kStages> ring) {
    const int lane = threadIdx.x % 32, block_bytes = 4 * a.block_words;
    const long long pitch = static_cast<long long>((a.k + kBlockRows - 1) / kBlockRows) * a.block_words;
    const int last_block = (a.n + kBlockColumns - 1) / kBlockColumns - 1;
    const auto load_weight = [&](const Cursor<kBlockRows>& at, int stage) {
        const std::uint32_t full = ring.full + 8 * stage, to = base + S::kStages * S::kXBytes + stage * S::kBlocks * block_bytes;
        const std::uint32_t* from = a.blocks + at.column / kBlockColumns * pitch + static_cast<long long>(at.k / kBlockRows) * a.block_words;
        const int count = min(S::kBlocks, last_block - at.column / kBlockColumns + 1);
        if (lane == 0) barrier_expect(full, count * block_bytes + S::kXBytes);
        __syncwarp();
        if (lane < count) copy_bulk(to + lane * block_bytes, from + lane * pitch, block_bytes, full);
    };
    const auto load_x = [&](const Cursor<kBlockRows>& at, int stage) {
        if (lane < 2) copy_box(base + stage * S::kXBytes + lane * (S::kXBytes / 2), x_map, at.k + 64 * lane, at.row, ring.full + 8 * stage);
    };
    // No kernel before this one wrote the weight: as much of it as there is room for is on its way while that one ends.
    Cursor<kBlockRows> at(a), x_at = at;
    for (int s = 0; s < S::kStages && at.valid(); ++s, at.advance(a)) load_weight(at, s);
    wait_for_previous();
    for (int s = 0; s < S::kStages && x_at.valid(); ++s, x_at.advance(a)) load_x(x_at, s);
    for (ring.phase = 1; at.valid(); at.advance(a), ring.advance()) {
        ring.wait_empty();
        load_weight(at, ring.stage);
        load_x(at, ring.stage);
    }
}

template <class S, class T>
__device__ void compute_wgmma(const Arguments& a, unsigned char* shared, Ring<S::kStages> ring, int* arrived) {
    constexpr int kRows = S::kRows, kChains = S::kChains, kTiles = S::kTiles, kSteps = S::kSteps;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % 4;
    const int group = __shfl_sync(0xffffffffu, thread / 128, 0), first_tile = kChains == 1 ? group * kTiles : 0;
    const int block_bytes = 4 * a.block_words;
    const std::uint32_t base = shared_address(shared);
    const unsigned char* const weights = shared + S::kStages * S::kXBytes + first_tile * block_bytes;
    const auto meet = [] { meet_threads<S::kComputing>(); };

    // Two batches of operands: the tensor cores read one while the other is decoded.
    std::uint32_t fragments[2][kTiles][kSteps][4];
    float acc[S::kSets][kTiles][kRows / 2], total[kTiles][S::kTotal ? kRows / 2 : 1];

    // Of this thread, in stage 0: codes of chunk 0, scales and zero points of the block's first row of them.
    const std::uint32_t codes_at = base + S::kStages * S::kXBytes + first_tile * block_bytes + warp * 256 + lane * 8;
    const std::uint32_t scales_at = codes_at + 4 * kCodeWords - warp * 224 - lane * 8 + lane / 4 * 4;
    const std::uint32_t zeros_at = scales_at + 128 * a.group_rows - warp * 16 - lane / 4 * 2;
    Group groups[kTiles];
    int first_half = 0;  // of the present block: 1 where the piece begins in its middle

    const auto chunk_of = [&](int half, int i) { return 2 * half + (kChains == 1 ? i : group); };
    // Many rows: all loads first, and scales once for both halves of a block where they have the same.
    const auto decode_eagerly = [&](int half, std::uint32_t(&f)[kTiles][kSteps][4]) {
        const std::uint32_t at = ring.stage * S::kBlocks * block_bytes;
        uint2 codes[kTiles][kSteps / 2];
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) codes[t][i] = load_shared2(codes_at + at + t * block_bytes + chunk_of(half, i) * 1024);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) {
                const int row = chunk_of(half, i) * a.group_rows / 4;
                if (a.group_rows > 1 || (half == 0 && i == 0) || first_half == 1)
                    groups[t].template set<T>(load_shared(scales_at + at + t * block_bytes + 128 * row),
                                              a.has_zeros ? load_shared_half(zeros_at + at + t * block_bytes + 64 * row) : 0, a);
                decode(T{}, codes[t][i].x, groups[t], f[t][2 * i]);
                decode(T{}, codes[t][i].y, groups[t], f[t][2 * i + 1]);
            }
    };
    // Few rows: decoding is what takes the time, and the compiler finds the better order by itself.
    const auto decode_freely = [&](int half, std::uint32_t(&f)[kTiles][kSteps][4]) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const unsigned char* at = weights + (ring.stage * S::kBlocks + t) * block_bytes;
            const auto* scales = reinterpret_cast<const std::uint32_t*>(at) + kCodeWords;
            const auto* zeros = reinterpret_cast<const std::uint16_t*>(scales + 32 * a.group_rows);
            Group g;
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) {
                const int chunk = chunk_of(half, i), place = 32 * (chunk * a.group_rows / 4) + 8 * warp + lane / 4;
                if (i == 0 || a.group_rows == 4) g.set<T>(scales[place], a.has_zeros ? zeros[place] : 0, a);
                const uint2 w = reinterpret_cast<const uint2*>(at)[(chunk * 4 + warp) * 32 + lane];
                decode(T{}, w.x, g, f[t][2 * i]);
                decode(T{}, w.y, g, f[t][2 * i + 1]);
            }
        }
    };
    const auto decode_half = [&](int half, std::uint32_t(&f)[kTiles][kSteps][4]) {
        if constexpr (kRows >= 128)
            decode_eagerly(half, f);
        else
            decode_freely(half, f);
    };
    const auto multiply = [&](int half, float(&d)[kTiles][kRows / 2], std::uint32_t(&f)[kTiles][kSteps][4]) {
        const std::uint64_t x_at = descriptor(base + ring.stage * S::kXBytes + half * (S::kXBytes / 2)) + (kChains == 1 ? 0 : 4 * group);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int t = 0; t < kTiles; ++t) wgmma<T>(d[t], f[t][step], x_at + 2 * step);
        wgmma_commit();
    };

    for (int piece = first_piece(a); piece < behind_pieces(a); ++piece) {
        const Piece p = piece_of(a, piece);
        const int k_begin = p.k_begin, k_end = p.k_end;
#pragma unroll
        for (int s = 0; s < S::kSets; ++s)
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int i = 0; i < kRows / 2; ++i) {
                    acc[s][t][i] = 0.0f;
                    if constexpr (S::kTotal) total[t][i] = 0.0f;
                }
        std::uint32_t behind = 0;  // barrier of the stage that the tensor cores may still read
        const auto release = [&] {
            if (behind && lane == 0) barrier_arrive(behind);
            behind = 0;
        };
        for (int k = k_begin / kBlockRows * kBlockRows; k < k_end; k += kBlockRows) {
            ring.wait_full();
            first_half = k < k_begin;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (k + 64 * half < k_begin || k + 64 * half >= k_end) continue;
                decode_half(half, fragments[half]);
                if constexpr (S::kTotal)
                    if (half == 0 && a.cut && k != k_begin && k % a.cut == 0) {
                        wgmma_wait<0>();
#pragma unroll
                        for (int t = 0; t < kTiles; ++t)
#pragma unroll
                            for (int i = 0; i < kRows / 2; ++i) {
                                total[t][i] += acc[0][t][i];
                                acc[0][t][i] = 0.0f;
                            }
                    }
                multiply(half, acc[S::kSets == 2 ? half : 0], fragments[half]);
                wgmma_wait<1>();
                release();
            }
            behind = ring.empty_barrier();
            ring.advance();
        }
        wgmma_wait<0>();
        release();
        if constexpr (S::kTotal)
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int i = 0; i < kRows / 2; ++i) acc[0][t][i] += total[t][i];

        float own[S::kOwnTiles][S::kOwnGroups][4];
        const auto mine = [&](int s, int t, int j) {
            return make_float4(acc[s][t][4 * j], acc[s][t][4 * j + 1], acc[s][t][4 * j + 2], acc[s][t][4 * j + 3]);
        };
        const auto keep = [&](int t, int j, float4 v) { own[t][j][0] = v.x, own[t][j][1] = v.y, own[t][j][2] = v.z, own[t][j][3] = v.w; };
        auto* scratch = reinterpret_cast<float4*>(shared + S::kStages * (S::kXBytes + S::kBlocks * block_bytes)) + thread % 128;
        if constexpr (kChains == 1) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int j = 0; j < kRows / 8; ++j) keep(t, j, mine(0, t, j));
        } else if constexpr (kChains == 2) {
            // Each warpgroup hands the other its sums of half of the tiles.
            const auto place = [&](int g, int t, int j) { return scratch + ((g * S::kOwnTiles + t) * (kRows / 8) + j) * 128; };
            meet();
#pragma unroll
            for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
                for (int j = 0; j < kRows / 8; ++j) *place(group ^ 1, t, j) = group ? mine(0, t, j) : mine(0, t + S::kOwnTiles, j);
            meet();
#pragma unroll
            for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
                for (int j = 0; j < kRows / 8; ++j)
                    keep(t, j, (group ? mine(0, t + S::kOwnTiles, j) : mine(0, t, j)) + *place(group, t, j));
        } else {
            // Chains 0 and 2 are the first warpgroup's, 1 and 3 the second's; each finishes half of the rows.
            const auto place = [&](int g, int s, int t, int j) { return scratch + (((g * 2 + s) * kTiles + t) * S::kOwnGroups + j) * 128; };
            meet();
#pragma unroll
            for (int s = 0; s < 2; ++s)
#pragma unroll
                for (int t = 0; t < kTiles; ++t)
#pragma unroll
                    for (int j = 0; j < S::kOwnGroups; ++j)
                        *place(group ^ 1, s, t, j) = group ? mine(s, t, j) : mine(s, t, j + S::kOwnGroups);
            meet();
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int j = 0; j < S::kOwnGroups; ++j) {
                    const float4 here0 = group ? mine(0, t, j + S::kOwnGroups) : mine(0, t, j);
                    const float4 here1 = group ? mine(1, t, j + S::kOwnGroups) : mine(1, t, j);
                    const float4 there0 = *place(group, 0, t, j), there1 = *place(group, 1, t, j);
                    keep(t, j, group ? there0 + (here0 + (here1 + there1)) : here0 + (there0 + (there1 + here1)));
                }
        }

        const int end_row = p.row + p.rows, row = p.row + (kChains == 4 ? group * S::kOwnGroups * 8 : 0);
        const int column = p.column + (kChains == 4 ? 0 : group * S::kOwnTiles * kBlockColumns) + 16 * warp;
        const auto write = [&](int t, int j, const float(&v)[4]) {
            store<T>(a, row + 8 * j, end_row, column + kBlockColumns * t, v);
        };
        if (p.count() == 1) {
#pragma unroll
            for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
                for (int j = 0; j < S::kOwnGroups; ++j) write(t, j, own[t][j]);
            continue;
        }
        if (a.cluster > 1) {
            // One piece a thread block: its ring is idle by now and holds the sums.
            auto* kept = reinterpret_cast<float4*>(shared) + thread;
            meet();
#pragma unroll
            for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
                for (int j = 0; j < S::kOwnGroups; ++j)
                    kept[(t * S::kOwnGroups + j) * S::kComputing] = make_float4(own[t][j][0], own[t][j][1], own[t][j][2], own[t][j][3]);
            meet_cluster();
            for (int i = p.rank(); i < S::kOwnTiles * S::kOwnGroups; i += a.cluster) {
                const float4 sum = sum_of_ranks(shared_address(kept + i * S::kComputing), a.cluster);
                const float v[4] = {sum.x, sum.y, sum.z, sum.w};
                write(i / S::kOwnGroups, i % S::kOwnGroups, v);
            }
            meet_cluster();
            return;
        }
        const auto slot = [&](int rank, int t, int j) {
            return reinterpret_cast<float4*>(a.workspace) +
                   (((static_cast<long long>(p.first + rank) * S::kOwnTiles + t) * S::kOwnGroups + j) * S::kComputing + thread);
        };
#pragma unroll
        for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
            for (int j = 0; j < S::kOwnGroups; ++j)
                __stcg(slot(p.rank(), t, j), make_float4(own[t][j][0], own[t][j][1], own[t][j][2], own[t][j][3]));
        __threadfence();
        meet();
        int* const counter = a.counters + p.tile;
        // Where every thread block has one piece, those of a tile wait for each other and share the join.
        const bool share = a.share;
        if (thread == 0) {
            *arrived = atomicAdd(counter, 1);
            while (share && *static_cast<volatile int*>(counter) < p.count()) __nanosleep(20);
        }
        meet();
        if (!share && *arrived != p.count() - 1) continue;
        __threadfence();
        for (int i = share ? p.rank() : 0; i < S::kOwnTiles * S::kOwnGroups; i += share ? p.count() : 1) {
            const int t = i / S::kOwnGroups, j = i % S::kOwnGroups;
            float4 sum = __ldcg(slot(0, t, j));
#pragma unroll 4
            for (int r = 1; r < p.count(); ++r) sum = sum + __ldcg(slot(r, t, j));
            const float v[4] = {sum.x, sum.y, sum.z, sum.w};
            write(t, j, v);
        }
        meet();
        if (thread == 0 && (!share || atomicAdd(counter, 1) == 2 * p.count() - 1)) *counter = 0;
    }
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads, S::kTwo ? 2 : 1) int4_wgmma(const Arguments a, const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned char* const shared_start = shared_memory();
    __shared__ __align__(8) std::uint64_t barriers[2 * S::kStages];
    __shared__ int arrived;
    unsigned char* const shared = shared_start + (-shared_address(shared_start) & 1023u);
    const Ring<S::kStages> ring{shared_address(barriers), shared_address(barriers + S::kStages)};
    let_next_start();
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            barrier_init(ring.full + 8 * s, 1);
            barrier_init(ring.empty + 8 * s, S::kComputing / 32);
        }
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x >= S::kComputing) {
        give_registers<24>();
        if (threadIdx.x < S::kComputing + 32) load_for_wgmma<S>(a, &x_map, shared_address(shared), ring);
    } else {
        take_registers<S::kRegisters>();
        wait_for_previous();
        compute_wgmma<S, T>(a, shared, ring, &arrived);
    }
#endif
}

}  // namespace qlab::int4
