// INT4 GEMM for many rows of x on Hopper: y^T = w^T x^T with wgmma, the weight decoded into registers as operand A.
//
// A thread block takes its pieces in turn. One warp brings blocks of the weight and the matching 128 columns of x (128-byte
// swizzled rows, which wgmma reads by itself) into a ring of stages, on across the pieces. Two warpgroups compute, 64 k at a
// time: each decodes the next codes while the tensor cores work on the ones before. With one chain a warpgroup owns half of the
// columns; with two or four both own all of them and take the 32-row chunks in turn. Chains are joined in shared memory, pieces
// of one tile through a workspace (Join in int4_fragments.cuh says by whom) or the shared memory of a cluster, in an order that is
// fixed.
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
    static constexpr int kPerSm = kChains == 1 && kTiles == 1 && kRows <= 64 ? 2 : 1;
    static constexpr int kRegisters = kPerSm == 2 ? 104 : 240;
    static constexpr int kXBytes = kRows * 2 * kBlockRows, kMostBlockBytes = 4 * (kCodeWords + 4 * 48);
    static constexpr int kRoom = (kPerSm == 2 ? 112 : 226) * 1024 - 1024 - kScratch;
    static constexpr int kFit = kRoom / (kXBytes + kBlocks * kMostBlockBytes), kStages = kFit < 8 ? kFit : 8;
    static_assert(kStages >= 3);
    static_assert(4 * kRows * kColumns <= kStages * (kXBytes + kBlocks * 4 * kCodeWords));  // the ring has room for a tile's sums

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

// The sums that a thread keeps of a piece: one chain's, or a0 + a1, or a0 + (a1 + (a3 + a2)). `scratch` is this thread's place in the
// shared memory through which the warpgroups hand chains to each other.
template <class S>
__device__ __forceinline__ void join_chains(const float (&acc)[S::kSets][S::kTiles][S::kRows / 2], float (&own)[S::kOwnTiles][S::kOwnGroups][4],
                                            float4* scratch, int group) {
    const auto mine = [&](int s, int t, int j) {
        return make_float4(acc[s][t][4 * j], acc[s][t][4 * j + 1], acc[s][t][4 * j + 2], acc[s][t][4 * j + 3]);
    };
    const auto keep = [&](int t, int j, float4 v) { own[t][j][0] = v.x, own[t][j][1] = v.y, own[t][j][2] = v.z, own[t][j][3] = v.w; };
    if constexpr (S::kChains == 1) {
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
            for (int j = 0; j < S::kOwnGroups; ++j) keep(t, j, mine(0, t, j));
    } else if constexpr (S::kChains == 2) {
        // Each warpgroup hands the other its sums of half of the tiles.
        const auto place = [&](int g, int t, int j) { return scratch + ((g * S::kOwnTiles + t) * S::kOwnGroups + j) * 128; };
        meet_threads<S::kComputing>();
#pragma unroll
        for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
            for (int j = 0; j < S::kOwnGroups; ++j) *place(group ^ 1, t, j) = group ? mine(0, t, j) : mine(0, t + S::kOwnTiles, j);
        meet_threads<S::kComputing>();
#pragma unroll
        for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
            for (int j = 0; j < S::kOwnGroups; ++j)
                keep(t, j, (group ? mine(0, t + S::kOwnTiles, j) : mine(0, t, j)) + *place(group, t, j));
    } else {
        // Chains 0 and 2 are the first warpgroup's, 1 and 3 the second's; each finishes half of the rows.
        const auto place = [&](int g, int s, int t, int j) { return scratch + (((g * 2 + s) * S::kTiles + t) * S::kOwnGroups + j) * 128; };
        meet_threads<S::kComputing>();
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
                for (int j = 0; j < S::kOwnGroups; ++j)
                    *place(group ^ 1, s, t, j) = group ? mine(s, t, j) : mine(s, t, j + S::kOwnGroups);
        meet_threads<S::kComputing>();
#pragma unroll
        for (int t = 0; t < S::kTiles; ++t)
#pragma unroll
            for (int j = 0; j < S::kOwnGroups; ++j) {
                const float4 here0 = group ? mine(0, t, j + S::kOwnGroups) : mine(0, t, j);
                const float4 here1 = group ? mine(1, t, j + S::kOwnGroups) : mine(1, t, j);
                const float4 there0 = *place(group, 0, t, j), there1 = *place(group, 1, t, j);
                keep(t, j, group ? there0 + (here0 + (here1 + there1)) : here0 + (there0 + (there1 + here1)));
            }
    }
}

// kFine: whether a block has more than one row of scales.
template <class S, class T, bool kFine>
__device__ void compute_wgmma(const Arguments& a, unsigned char* shared, Ring<S::kStages> ring, int* arrived) {
    constexpr int kRows = S::kRows, kChains = S::kChains, kTiles = S::kTiles, kSteps = S::kSteps;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % 4;
    const int group = __shfl_sync(0xffffffffu, thread / 128, 0), first_tile = kChains == 1 ? group * kTiles : 0;
    const int block_bytes = 4 * a.block_words;
    const std::uint32_t base = shared_address(shared);
    const std::uint32_t joining = ring.full + 16 * S::kStages;
    const auto meet = [] { meet_threads<S::kComputing>(); };

    // Two batches of operands: the tensor cores read one while the other is decoded.
    std::uint32_t fragments[2][kTiles][kSteps][4];
    float acc[S::kSets][kTiles][kRows / 2], total[kTiles][S::kTotal ? kRows / 2 : 1];

    // Of this thread, in stage 0: codes of chunk 0, scales and zero points of the block's first row of them.
    const std::uint32_t codes_at = base + S::kStages * S::kXBytes + first_tile * block_bytes + warp * 256 + lane * 8;
    const std::uint32_t scales_at = codes_at + 4 * kCodeWords - warp * 224 - lane * 8 + lane / 4 * 4;
    const std::uint32_t zeros_at = a.has_zeros ? scales_at + 128 * a.group_rows - warp * 16 - lane / 4 * 2 : scales_at;
    const std::uint32_t x_descriptor = descriptor(base + (kChains == 1 ? 0 : 64 * group));
    uint2 codes[2][kTiles][kSteps / 2];
    Group groups[kTiles];

    const auto chunk_of = [&](int half, int i) { return 2 * half + (kChains == 1 ? i : group); };
    const auto set_group = [&](std::uint32_t at, int t, int row) {
        const std::uint32_t zeros = load_shared_half(zeros_at + at + t * block_bytes + 64 * row);  // without any, something else
        groups[t].template set<T>(load_shared(scales_at + at + t * block_bytes + 128 * row), zeros, a);
    };
    const auto load_codes = [&](int half) {
        const std::uint32_t at = ring.stage * S::kBlocks * block_bytes;
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) codes[half][t][i] = load_shared2(codes_at + at + t * block_bytes + chunk_of(half, i) * 1024);
    };
    const auto set_groups = [&] {
        if constexpr (!kFine)
#pragma unroll
            for (int t = 0; t < kTiles; ++t) set_group(ring.stage * S::kBlocks * block_bytes, t, 0);
    };
    const auto decode_half = [&](int half, std::uint32_t(&f)[kTiles][kSteps][4]) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) {
                if constexpr (kFine) set_group(ring.stage * S::kBlocks * block_bytes, t, chunk_of(half, i) * a.group_rows / 4);
                decode(T{}, codes[half][t][i].x, groups[t], f[t][2 * i]);
                decode(T{}, codes[half][t][i].y, groups[t], f[t][2 * i + 1]);
            }
    };
    const auto multiply = [&](int half, float(&d)[kTiles][kRows / 2], std::uint32_t(&f)[kTiles][kSteps][4]) {
        const std::uint32_t x_at = x_descriptor + (ring.stage * S::kXBytes + half * (S::kXBytes / 2)) / 16;
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
            for (int step = 0; step < kSteps; ++step) pin(f[t][step]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int t = 0; t < kTiles; ++t) wgmma<T>(d[t], f[t][step], x_at + 2 * step);
        wgmma_commit();
    };

    // Of 64 columns and 8 rows that this thread keeps sums of.
    constexpr int kOwn = S::kOwnTiles * S::kOwnGroups;
    const auto write = [&](const Piece& p, int t, int j, const float(&v)[4]) {
        const int row = p.row + (kChains == 4 ? group * S::kOwnGroups * 8 : 0);
        const int column = p.column + (kChains == 4 ? 0 : group * S::kOwnTiles * kBlockColumns) + 16 * warp;
        store<T>(a, row + 8 * j, p.row + p.rows, column + kBlockColumns * t, v);
    };
    const auto write_sum = [&](const Piece& p, int i, float4 sum) {
        const float v[4] = {sum.x, sum.y, sum.z, sum.w};
        write(p, i / S::kOwnGroups, i % S::kOwnGroups, v);
    };
    const auto partials_of = [&](const Piece& p) {
        float4* at = reinterpret_cast<float4*>(a.workspace) + (static_cast<long long>(p.first) * kOwn * S::kComputing + thread);
        pin(at);
        return at;
    };

    for (int piece = first_piece(a); piece < behind_pieces(a); ++piece) {
        const int k_begin = piece_of(a, piece).k_begin, k_end = piece_of(a, piece).k_end;
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
        // 64 k whose codes are in registers; a running total is added to where a new chain begins.
        const auto take_half = [&](int half, [[maybe_unused]] int k) {
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
        };
        for (int k = k_begin / kBlockRows * kBlockRows; k < k_end; k += kBlockRows) {
            ring.wait_full();
            set_groups();
            load_codes(0);
            load_codes(1);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (k + 64 * half >= k_begin && k + 64 * half < k_end) take_half(half, k);
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

        pin(piece);  // what else there is to know of it is read behind the loop, which needs all registers
        const Piece p = piece_of(a, piece);
        float own[S::kOwnTiles][S::kOwnGroups][4];
        join_chains<S>(acc, own, reinterpret_cast<float4*>(shared + S::kStages * (S::kXBytes + S::kBlocks * block_bytes)) + thread % 128, group);

        int* const counter = a.counters + p.tile;
        const auto wait_for = [&](int count) {
            while (handed_on(counter) < count) __nanosleep(20);
        };
        const bool keeps = a.join == Join::kFirst && p.k_begin == 0;
        if (keeps && p.count() > 1) {
            const float4* const partials = partials_of(p) - thread;
            const auto add = [&](int i, float4 v) {
                float(&sum)[4] = own[i / S::kOwnGroups][i % S::kOwnGroups];
                sum[0] = sum[0] + v.x, sum[1] = sum[1] + v.y, sum[2] = sum[2] + v.z, sum[3] = sum[3] + v.w;
            };
            meet();  // nobody reads the ring any more: it takes the other sums, one piece after the other
            if (thread == 0) wait_for(p.count() - 1), *counter = 0;
            if (p.rank() < 2) {  // as planned: then the others' come in their order, for own + P0 is P0 + own
                const auto* brought = reinterpret_cast<const float4*>(shared) + thread;
                for (int r = 0, phase = 0; r < p.count(); ++r) {
                    if (r == p.rank()) continue;
                    if (thread == 0) {
                        copies_see_all();
                        barrier_expect(joining, kOwn * S::kComputing * 16);
                        copy_bulk(base, partials + r * kOwn * S::kComputing, kOwn * S::kComputing * 16, joining);
                    }
                    barrier_wait(joining, phase);
                    phase ^= 1;
#pragma unroll
                    for (int i = 0; i < kOwn; ++i) add(i, brought[i * S::kComputing]);
                    meet();
                }
            }
        }
        if (keeps || p.count() == 1) {
#pragma unroll
            for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
                for (int j = 0; j < S::kOwnGroups; ++j) write(p, t, j, own[t][j]);
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
            for (int i = p.rank(); i < kOwn; i += a.cluster)
                write_sum(p, i, sum_of_ranks(shared_address(kept + i * S::kComputing), a.cluster));
            meet_cluster();
            return;
        }
        float4* const kept = partials_of(p) + p.rank() * kOwn * S::kComputing;
#pragma unroll
        for (int t = 0; t < S::kOwnTiles; ++t)
#pragma unroll
            for (int j = 0; j < S::kOwnGroups; ++j)
                __stcg(kept + (t * S::kOwnGroups + j) * S::kComputing, make_float4(own[t][j][0], own[t][j][1], own[t][j][2], own[t][j][3]));
        meet();
        if (thread == 0) *arrived = hand_on(counter);
        if (a.join == Join::kFirst) continue;
        const bool shared = a.join == Join::kShared;
        if (thread == 0 && shared) wait_for(p.count());
        meet();
        if (!shared && *arrived != p.count() - 1) continue;
        const float4* const partials = partials_of(p);
        const auto load = [&](int rank, int i) { return __ldcg(partials + (rank * kOwn + i) * S::kComputing); };
        for (int i = shared ? p.rank() : 0; i < kOwn; i += shared ? p.count() : 1) {
            float4 sum = load(0, i);
#pragma unroll 4
            for (int r = 1; r < p.count(); ++r) sum = sum + load(r, i);
            write_sum(p, i, sum);
        }
        meet();
        if (thread == 0 && (!shared || hand_on(counter) == 2 * p.count() - 1)) *counter = 0;
    }
}

template <class S, class T, bool kFine>
__global__ void __launch_bounds__(S::kThreads, S::kPerSm) int4_wgmma(const Arguments a, const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned char* const shared_start = shared_memory();
    __shared__ __align__(8) std::uint64_t barriers[2 * S::kStages + 1];  // of the ring, and of the join
    __shared__ int arrived;
    unsigned char* const shared = shared_start + (-shared_address(shared_start) & 1023u);
    Ring<S::kStages> ring{shared_address(barriers)};
    pin(ring.full);
    let_next_start();
    if (threadIdx.x == 0) {
        for (int s = 0; s < S::kStages; ++s) {
            barrier_init(ring.full + 8 * s, 1);
            barrier_init(ring.full + 8 * (S::kStages + s), S::kComputing / 32);
        }
        barrier_init(ring.full + 16 * S::kStages, 1);
        copies_see_all();
    }
    __syncthreads();
    if (threadIdx.x >= S::kComputing) {
        give_registers<24>();
        if (threadIdx.x < S::kComputing + 32) load_for_wgmma<S>(a, &x_map, shared_address(shared), ring);
    } else {
        take_registers<S::kRegisters>();
        wait_for_previous();
        compute_wgmma<S, T, kFine>(a, shared, ring, &arrived);
    }
#endif
}

}  // namespace qlab::int4
