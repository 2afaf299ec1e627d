// INT4 GEMM for a few rows of x: y^T = w^T x^T with mma.sync m16n8k16, the weight decoded into registers as operand A.
//
// A thread block takes its pieces in turn. One warp brings blocks of the weight and the matching 128 columns of x into a ring of
// stages, on across the pieces. With one chain a warp computes one or two tiles of 16 columns; with R chains four warps share 64
// columns, and warp w takes the 32-row chunks c with c % R = w % R, for R tiles. The R sums of an output are joined in shared
// memory, pieces of one tile through a workspace by the thread block that arrives last; the order is fixed in both.
#pragma once

#include "int4_pipeline.cuh"

namespace qlab::int4 {

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    if constexpr (T::kIsBf16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int kTileRows, int kTileColumns, int kChainCount>
struct MmaShape {
    static constexpr int kRows = kTileRows, kColumns = kTileColumns, kChains = kChainCount, kStages = 8;
    static constexpr int kBlocks = kColumns / kBlockColumns, kGroups = kRows / 8;
    // Tiles of a warp before and after its chains are joined: two chains side by side hide each other's latency.
    static constexpr int kTiles = kChains > 1 ? kChains : kBlocks, kOwn = kChains > 1 ? 1 : kTiles;
    static constexpr int kBlockWarps = kChains > 1 ? 4 : 4 / kTiles, kWarps = kBlockWarps * kBlocks;
    static constexpr int kThreads = 32 * (kWarps + 1);
    static constexpr int kPitch = 2 * kBlockRows + 16;  // bytes from row to row of x: ldmatrix meets every bank once
    static constexpr int kXBytes = kRows * kPitch;
    // Room for the sums that chains, or the thread blocks of a cluster, hand to each other.
    static constexpr int kScratch = 32 * kWarps * kTiles * kGroups * 16;

    static int shared_bytes(int block_words) { return kStages * (kBlocks * 4 * block_words + kXBytes) + kScratch; }
};

template <class S>
__device__ void load_for_mma(const Arguments& a, std::uint32_t base, Ring<S::kStages> ring) {
    const int lane = threadIdx.x % 32, block_bytes = 4 * a.block_words, stage_bytes = S::kBlocks * block_bytes + S::kXBytes;
    const long long pitch = static_cast<long long>((a.k + kBlockRows - 1) / kBlockRows) * a.block_words;
    const int last_block = (a.n + kBlockColumns - 1) / kBlockColumns - 1;
    [[maybe_unused]] const std::uint64_t policy = evict_first();

    const auto blocks_of = [&](const Cursor& at) { return min(S::kBlocks, last_block - at.column / kBlockColumns + 1); };
    const auto x_bytes = [&](const Cursor& at) { return 2 * min(kBlockRows, a.k - at.k); };  // of a row
    const auto load_weight = [&](const Cursor& at, std::uint32_t stage, std::uint32_t full) {
        const std::uint32_t* from = a.blocks + at.column / kBlockColumns * pitch + static_cast<long long>(at.k / kBlockRows) * a.block_words;
#if QLAB_HOPPER
        if (lane == 0) barrier_expect(full, blocks_of(at) * block_bytes + at.rows * x_bytes(at));
        __syncwarp();
        if (lane < blocks_of(at)) stream_bulk(stage + lane * block_bytes, from + lane * pitch, block_bytes, full, policy);
#else
        for (int b = 0; b < blocks_of(at); ++b)
            for (int i = lane; i < block_bytes / 16; i += 32) copy16(stage + b * block_bytes + 16 * i, from + b * pitch + 4 * i);
#endif
    };
    const auto load_x = [&](const Cursor& at, std::uint32_t stage, std::uint32_t full) {
        const std::uint32_t to = stage + S::kBlocks * block_bytes;
#if QLAB_HOPPER
        if (lane < at.rows) copy_bulk(to + lane * S::kPitch, a.x + (at.row + lane) * a.x_stride + at.k, x_bytes(at), full);
#else
        const int parts = x_bytes(at) / 16;
        for (int i = lane; i < at.rows * 16; i += 32)
            if (i % 16 < parts) copy16(to + i / 16 * S::kPitch + i % 16 * 16, a.x + (at.row + i / 16) * a.x_stride + at.k + i % 16 * 8);
        barrier_arrive_after_copies(full);
#endif
    };

    // No kernel before this one wrote the weight: as much of it as there is room for is on its way while that one ends.
    Cursor at(a), x_at = at;
    for (int s = 0; s < S::kStages && at.valid(); ++s, at.advance(a)) load_weight(at, base + s * stage_bytes, ring.full + 8 * s);
    wait_for_previous();
    for (int s = 0; s < S::kStages && x_at.valid(); ++s, x_at.advance(a)) load_x(x_at, base + s * stage_bytes, ring.full + 8 * s);
    for (ring.phase = 1; at.valid(); at.advance(a), ring.advance()) {
        ring.wait_empty();
        load_weight(at, base + ring.stage * stage_bytes, ring.full_barrier());
        load_x(at, base + ring.stage * stage_bytes, ring.full_barrier());
    }
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads) int4_mma(const Arguments a) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ __align__(8) std::uint64_t barriers[2 * S::kStages];
    __shared__ int arrived;
    constexpr int kChains = S::kChains, kGroups = S::kGroups, kStages = S::kStages, kComputing = 32 * S::kWarps;
    constexpr int kTiles = S::kTiles, kOwn = S::kOwn;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % S::kBlockWarps, block = thread / 32 / S::kBlockWarps;
    const int weight_bytes = S::kBlocks * 4 * a.block_words, stage_bytes = weight_bytes + S::kXBytes;
    Ring<kStages> ring{shared_address(barriers), shared_address(barriers + kStages)};

    let_next_start();
    if (thread == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(ring.full + 8 * s, QLAB_HOPPER ? 1 : 32);
            barrier_init(ring.empty + 8 * s, S::kWarps);
        }
        barriers_ready();
    }
    __syncthreads();
    if (thread >= kComputing) {
        load_for_mma<S>(a, shared_address(shared), ring);
        return;
    }
    wait_for_previous();
    const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(kComputing) : "memory"); };

    const int chain = warp % kChains, first_tile = warp / kChains * kTiles;
    for (int piece = a.starts[blockIdx.x]; piece < a.starts[blockIdx.x + 1]; ++piece) {
        const int k_begin = a.pieces[piece].k_begin, k_end = a.pieces[piece].k_end;
        float acc[kTiles][kGroups][4] = {};
        for (int k_block = k_begin / kBlockRows * kBlockRows; k_block < k_end; k_block += kBlockRows) {
            ring.wait_full();
            const unsigned char* at = shared + ring.stage * stage_bytes;
            const auto* words = reinterpret_cast<const std::uint32_t*>(at) + block * a.block_words;
            const std::uint32_t* scales = words + kCodeWords;
            const auto* zeros = reinterpret_cast<const std::uint16_t*>(scales + 32 * a.group_rows);
            const std::uint32_t x_at = shared_address(at) + weight_bytes + lane % 8 * S::kPitch + lane / 8 * 16;
            Group group[kTiles];
            const auto load_group = [&](int row) {
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
                    const int place = 32 * row + 8 * (first_tile + t) + lane / 4;
                    group[t].template set<T>(scales[place], a.has_zeros ? zeros[place] : 0, a);
                }
            };
            const auto take_chunk = [&](int c) {
                std::uint32_t b[kGroups][4];
#pragma unroll
                for (int j = 0; j < kGroups; ++j)
                    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(b[j][0]), "=r"(b[j][1]), "=r"(b[j][2]), "=r"(b[j][3])
                                 : "r"(x_at + j * 8 * S::kPitch + c * 64));
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
                    const uint2 w = reinterpret_cast<const uint2*>(words)[(c * 4 + first_tile + t) * 32 + lane];
                    std::uint32_t f[4];
                    decode(T{}, w.x, group[t], f);
#pragma unroll
                    for (int j = 0; j < kGroups; ++j) mma<T>(acc[t][j], f, b[j][0], b[j][1]);
                    decode(T{}, w.y, group[t], f);
#pragma unroll
                    for (int j = 0; j < kGroups; ++j) mma<T>(acc[t][j], f, b[j][2], b[j][3]);
                }
            };
            if (a.group_rows == 1 && k_block >= k_begin && k_block + kBlockRows <= k_end) {
                load_group(0);
#pragma unroll
                for (int turn = 0; turn < 4 / kChains; ++turn) take_chunk(chain + turn * kChains);
            } else {
                for (int c = chain; c < 4; c += kChains) {
                    const int k = k_block + kChunk * c;
                    if (k < k_begin || k >= k_end) continue;
                    load_group(c * a.group_rows / 4);
                    take_chunk(c);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(ring.empty_barrier());
            ring.advance();
        }

        // With several chains each warp joins those of tile `warp` of the four: a0 + (a1 + (a3 + a2)).
        float sum[kOwn][kGroups][4];
        const auto keep = [&](int t, int j, float4 v) { sum[t][j][0] = v.x, sum[t][j][1] = v.y, sum[t][j][2] = v.z, sum[t][j][3] = v.w; };
        const auto vector = [](const float(&v)[4]) { return make_float4(v[0], v[1], v[2], v[3]); };
        if constexpr (kChains == 1) {
#pragma unroll
            for (int t = 0; t < kOwn; ++t)
#pragma unroll
                for (int j = 0; j < kGroups; ++j) keep(t, j, vector(acc[t][j]));
        } else {
            auto* scratch = reinterpret_cast<float4*>(shared + kStages * stage_bytes);
            const auto place = [&](int w, int t, int j) { return (((block * 4 + w) * kTiles + t) * kGroups + j) * 32 + lane; };
            meet();
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
                for (int j = 0; j < kGroups; ++j) scratch[place(warp, t, j)] = vector(acc[t][j]);
            meet();
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                const auto part = [&](int c) { return scratch[place(first_tile + c, chain, j)]; };
                keep(0, j, part(0) + (kChains == 2 ? part(1) : part(1) + (part(kChains - 1) + part(kChains - 2))));
            }
        }

        const Piece p = a.pieces[piece];
        const int column = p.column + block * kBlockColumns + 16 * (kChains > 1 ? warp : first_tile);
        const auto write = [&](int t, int j, const float(&v)[4]) { store<T>(a, p.row + 8 * j, p.row + p.rows, column + 16 * t, v); };
        if (a.cluster > 1) {
            auto* mine = reinterpret_cast<float4*>(shared + kStages * stage_bytes) + thread;
            if constexpr (kChains > 1) meet();
#pragma unroll
            for (int t = 0; t < kOwn; ++t)
#pragma unroll
                for (int j = 0; j < kGroups; ++j) mine[(t * kGroups + j) * kComputing] = vector(sum[t][j]);
            meet_cluster();
            for (int i = 0; i < kOwn * kGroups; ++i)
                if ((thread / 32 * kOwn * kGroups + i) % a.cluster == p.rank()) {
                    const float4 v = sum_of_ranks(shared_address(mine + i * kComputing), a.cluster);
                    const float joined[4] = {v.x, v.y, v.z, v.w};
                    write(i / kGroups, i % kGroups, joined);
                }
            meet_cluster();
            return;
        }
        bool complete = true;
        if (p.count() > 1) {
            const auto slot = [&](int rank, int t, int j) {
                return reinterpret_cast<float4*>(a.workspace) +
                       (((static_cast<long long>(p.first + rank) * kOwn + t) * kGroups + j) * kComputing + thread);
            };
#pragma unroll
            for (int t = 0; t < kOwn; ++t)
#pragma unroll
                for (int j = 0; j < kGroups; ++j) __stcg(slot(p.rank(), t, j), vector(sum[t][j]));
            __threadfence();
            meet();
            if (thread == 0) arrived = atomicAdd(a.counters + p.tile, 1);
            meet();
            complete = arrived == p.count() - 1;
            if (complete) {
                __threadfence();
#pragma unroll
                for (int t = 0; t < kOwn; ++t)
#pragma unroll
                    for (int j = 0; j < kGroups; ++j) {
                        float4 total = __ldcg(slot(0, t, j));
#pragma unroll 8
                        for (int r = 1; r < p.count(); ++r) total = total + __ldcg(slot(r, t, j));
                        keep(t, j, total);
                    }
                if (thread == 0) a.counters[p.tile] = 0;
            }
        }
        if (complete) {
#pragma unroll
            for (int t = 0; t < kOwn; ++t)
#pragma unroll
                for (int j = 0; j < kGroups; ++j) write(t, j, sum[t][j]);
        }
    }
}

}  // namespace qlab::int4
