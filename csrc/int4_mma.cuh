// INT4 GEMM for a few rows of x: y^T = w^T x^T with mma.sync m16n8k16, the weight decoded into registers as operand A.
//
// A thread block takes its pieces in turn, tiles of 64 columns; each of four warps owns 16 of them. A warp reads its codes from
// memory straight into registers, a step ahead of the products and on across the pieces: no weight goes through shared memory,
// only x does, in a ring of stages. With R chains a warp holds all R sums of its columns, the 32-row chunk c of K in sum c % R, so
// that R products are under way at once; or two or four such teams of warps take turns of chunks, where there are too few pieces
// to keep a multiprocessor busy otherwise. The pieces of a tile are joined through the shared memory of a cluster, or through a
// workspace by the thread block that arrives last; the order is fixed in both.
#pragma once

#include <cuda.h>

#include "int4_pipeline.cuh"

namespace qlab::int4 {

// kFineGroups: a block has several rows of scales, for groups of 32 or 64.
template <int kTileRows, int kChainCount, bool kFineGroups, int kTeamCount>
struct MmaShape {
    static constexpr int kRows = kTileRows, kColumns = kBlockColumns, kChains = kChainCount, kGroups = kRows / 8;
    static constexpr int kTeams = kTeamCount, kTeamThreads = 128, kThreads = kTeams * kTeamThreads;
    static constexpr int kPerSm = kTeams > 1 ? 4 / kTeams : kRows * kChains > (kFineGroups ? 16 : 32) ? 3 : 4;
    static constexpr int kChunks = 4 / kTeams, kOwnChains = kChains > kTeams ? kChains / kTeams : 1;  // of a team, in a block
    static constexpr bool kFine = kFineGroups;
    static constexpr int kScaleRows = kFine ? kChunks : 1;
    // Of a step: as many as registers hold, and with two teams and 16 rows as shared memory has room for twice.
    static constexpr int kBlocks = kTeams == 4 ? 10 : kFine ? 2 * kTeams : kTeams == 2 && kRows > 8 ? 6 : 4 * kTeams;
    static constexpr int kStepRows = kBlocks * kBlockRows;
    static constexpr int kStages = 3;
    // Of x: boxes of 64 k, their rows 128 bytes apart.
    static constexpr int kBoxes = kStepRows / 64, kBoxBytes = kRows * 128, kStageBytes = kBoxes * kBoxBytes;
    // Room for the sums that teams, or the thread blocks of a cluster, hand to each other.
    static constexpr int kScratch = kTeamThreads * (kTeams > 1 ? kChains : 1) * kGroups * 16;
    static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kScratch;
    static_assert(kChains % kTeams == 0);
};

// What a thread reads of a block: codes of its team's chunks; scales and zero points of its two columns.
template <class S>
struct BlockPart {
    uint2 codes[S::kChunks];
    std::uint32_t scales[S::kScaleRows], zeros[S::kScaleRows];
};

// The weight from a thread block's first piece to its last, a step at a time; `part` holds one step.
template <class S>
struct WeightStream {
    const Arguments& a;
    Cursor<S::kStepRows> at;
    const int block_bytes = 4 * a.block_words, team = threadIdx.x / S::kTeamThreads, thread = threadIdx.x % S::kTeamThreads;
    const int column = thread / 4;  // of the block's 32 pairs
    const int scales_behind = 4 * (kCodeWords + column) - 8 * thread - 1024 * team;
    const int zeros_behind = scales_behind + 128 * a.group_rows - 2 * column;
    const std::uint64_t policy = evict_first();
    const unsigned char* codes = nullptr;  // of this thread, in the first block of the step
    BlockPart<S> part[S::kBlocks] = {};

    __device__ __forceinline__ explicit WeightStream(const Arguments& arguments) : a(arguments), at(arguments) { aim(); }

    __device__ __forceinline__ void aim() {
        const long long pitch = static_cast<long long>((a.k + kBlockRows - 1) / kBlockRows) * block_bytes;
        codes = reinterpret_cast<const unsigned char*>(a.blocks) + at.column / kBlockColumns * pitch +
                static_cast<long long>(at.k / kBlockRows) * block_bytes + 8 * thread + 1024 * team;
    }

    __device__ __forceinline__ void fetch(int b) {
        if (at.k + b * kBlockRows >= at.k_end) return;
        const unsigned char* from = codes + b * block_bytes;
        constexpr int kTurn = 1024 * S::kTeams;
        part[b].codes[0] = stream2<0>(from, policy);
        if constexpr (S::kChunks > 1) part[b].codes[1] = stream2<kTurn>(from, policy);
        if constexpr (S::kChunks > 2) {
            part[b].codes[2] = stream2<2 * kTurn>(from, policy);
            part[b].codes[3] = stream2<3 * kTurn>(from, policy);
        }
        const auto* scales = reinterpret_cast<const std::uint32_t*>(from + scales_behind);
        const auto* zeros = reinterpret_cast<const std::uint16_t*>(from + zeros_behind);
#pragma unroll
        for (int r = 0; r < S::kScaleRows; ++r) {
            const int row = S::kFine ? (r * S::kTeams + team) * a.group_rows / 4 : 0;
            part[b].scales[r] = __ldg(scales + 32 * row);
            if (a.has_zeros) part[b].zeros[r] = __ldg(zeros + 32 * row);
        }
    }

    __device__ __forceinline__ void advance() {
        codes += S::kBlocks * block_bytes;
        if (at.advance(a)) aim();
    }
};

// One step of x into a stage: rows of 128 bytes whose 16-byte parts are exchanged by the row, so that ldmatrix meets every bank once.
template <class S>
__device__ __forceinline__ void load_x(const Arguments& a, [[maybe_unused]] const CUtensorMap* x_map, const Cursor<S::kStepRows>& at,
                                       std::uint32_t stage, std::uint32_t full) {
#if QLAB_HOPPER
    if (threadIdx.x > 0) return;
    barrier_expect(full, S::kStageBytes);
    copy_boxes(stage, x_map, at.row, at.k / 64, full);
#else
    for (int i = threadIdx.x; i < S::kStageBytes / 16; i += S::kThreads) {
        const int part = i % 8, row = i / 8 % S::kRows, box = i / 8 / S::kRows, k = at.k + 64 * box + 8 * part;
        if (row < at.rows && k < at.k_end)
            copy16(stage + box * S::kBoxBytes + row * 128 + (part ^ row % 8) * 16, a.x + (at.row + row) * a.x_stride + k);
    }
    barrier_arrive_after_copies(full);
#endif
}

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads, S::kPerSm) int4_mma(const Arguments a, const __grid_constant__ CUtensorMap x_map) {
    unsigned char* const shared_start = shared_memory();
    __shared__ __align__(8) std::uint64_t barriers[S::kStages];
    __shared__ int arrived;
    constexpr int kChains = S::kChains, kGroups = S::kGroups, kStages = S::kStages, kBlocks = S::kBlocks, kTeams = S::kTeams;
    const int team = threadIdx.x / S::kTeamThreads, thread = threadIdx.x % S::kTeamThreads, lane = thread % 32, warp = thread / 32;
    unsigned char* const shared = shared_start + (-shared_address(shared_start) & 1023u);
    const std::uint32_t x_base = shared_address(shared), full = shared_address(barriers);

    // No kernel before this one wrote the weight: its first step is on its way while that one ends.
    let_next_start();
    if (threadIdx.x == 0) {
        prefetch_map(&x_map);
        for (int i = 0; i < kStages; ++i) barrier_init(full + 8 * i, QLAB_HOPPER ? 1 : S::kThreads);
        copies_see_all();
    }
    WeightStream<S> weight(a);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) weight.fetch(b);
    weight.advance();
    __syncthreads();
    wait_for_previous();

    Cursor<S::kStepRows> at(a), x_at = at;
    const auto bring_x = [&](int stage) {
        if (!x_at.valid()) return;
        load_x<S>(a, &x_map, x_at, x_base + stage * S::kStageBytes, full + 8 * stage);
        x_at.advance(a);
    };
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) bring_x(s);

    // Of this lane in the team's first chunk; the next one is in the other half of the rows.
    const int x_lane = team / 2 * S::kBoxBytes + ((lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16) ^ team % 2 * 64);
    float acc[S::kOwnChains][kGroups][4] = {};
    for (int stage = 0, phase = 0, last_stage = kStages - 1; at.valid();) {
        __syncthreads();  // everyone is done with the last stage
        bring_x(last_stage);
        barrier_wait(full + 8 * stage, phase);
        const std::uint32_t x_first = x_base + stage * S::kStageBytes + x_lane, x_second = x_first ^ 64;
        last_stage = stage;
        if (++stage == kStages) stage = 0, phase ^= 1;

        Group group;
        const auto set_group = [&](int b, int row) { group.template set<T>(weight.part[b].scales[row], weight.part[b].zeros[row], a); };
        const auto take_chunk = [&](int b, int i) {  // the team's chunk i of block b
            std::uint32_t x[kGroups][4];
            const std::uint32_t from = (kTeams == 1 && i % 2 ? x_second : x_first) + (b * 2 + i * kTeams / 2) * S::kBoxBytes;
#pragma unroll
            for (int j = 0; j < kGroups; ++j) load_matrices(x[j], from + j * 1024);
            if (i == 0 || S::kScaleRows > 1) set_group(b, i % S::kScaleRows);
            std::uint32_t w[4];
            decode(T{}, weight.part[b].codes[i].x, group, w);
#pragma unroll
            for (int j = 0; j < kGroups; ++j) mma<T::kIsBf16>(acc[i % S::kOwnChains][j], w, x[j][0], x[j][1]);
            decode(T{}, weight.part[b].codes[i].y, group, w);
#pragma unroll
            for (int j = 0; j < kGroups; ++j) mma<T::kIsBf16>(acc[i % S::kOwnChains][j], w, x[j][2], x[j][3]);
        };
        if (at.k >= at.k_begin && at.k + S::kStepRows <= at.k_end) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
                for (int i = 0; i < S::kChunks; ++i) take_chunk(b, i);
                weight.fetch(b);
            }
        } else {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                set_group(b, 0);
#pragma unroll
                for (int i = 0; i < S::kChunks; ++i) {
                    const int k = at.k + b * kBlockRows + (i * kTeams + team) * kChunk;
                    if (k >= at.k_begin && k < at.k_end) take_chunk(b, i);
                }
                weight.fetch(b);
            }
        }
        weight.advance();
        const int piece = at.piece;
        if (!at.advance(a)) continue;

        // The chains of an output: a0 + (a1 + (a3 + a2)). A team holds those whose chunks it takes, the first joins all.
        float4 sum[kGroups];
        auto* const scratch = reinterpret_cast<float4*>(shared + kStages * S::kStageBytes) + thread;
        const auto own = [&](int i, int j) { return make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]); };
        if constexpr (kTeams > 1) {
#pragma unroll
            for (int i = 0; i < S::kOwnChains; ++i)
#pragma unroll
                for (int j = 0; j < kGroups; ++j) scratch[((i * kTeams + team) * kGroups + j) * S::kTeamThreads] = own(i, j);
            __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
            const auto chain = [&](int c) { return kTeams > 1 ? scratch[(c * kGroups + j) * S::kTeamThreads] : own(c % S::kOwnChains, j); };
            sum[j] = chain(0);
            if constexpr (kChains == 2) sum[j] = chain(0) + chain(1);
            if constexpr (kChains == 4) sum[j] = chain(0) + (chain(1) + (chain(3) + chain(2)));
#pragma unroll
            for (int i = 0; i < S::kOwnChains; ++i) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
        }

        const Piece p = piece_of(a, piece);
        const auto write = [&](int j, float4 v) {
            const float values[4] = {v.x, v.y, v.z, v.w};
            store<T>(a, p.row + 8 * j, p.row + p.rows, p.column + 16 * warp, values);
        };
        if (a.cluster > 1) {  // one piece a thread block
            __syncthreads();
            if (team == 0)
#pragma unroll
                for (int j = 0; j < kGroups; ++j) scratch[j * S::kTeamThreads] = sum[j];
            meet_cluster();
            for (int j = 0; j < kGroups; ++j)
                if (team == 0 && (warp * kGroups + j) % a.cluster == p.rank())
                    write(j, sum_of_ranks(shared_address(scratch + j * S::kTeamThreads), a.cluster));
            meet_cluster();
            return;
        }
        if (p.count() > 1) {
            const auto slot = [&](int rank, int j) {
                return reinterpret_cast<float4*>(a.workspace) +
                       ((static_cast<long long>(p.first + rank) * kGroups + j) * S::kTeamThreads + thread);
            };
            if (team == 0) {
#pragma unroll
                for (int j = 0; j < kGroups; ++j) __stcg(slot(p.rank(), j), sum[j]);
                __threadfence();
            }
            __syncthreads();
            if (threadIdx.x == 0) arrived = atomicAdd(a.counters + p.tile, 1);
            __syncthreads();
            if (arrived != p.count() - 1) continue;
            if (team == 0) {
                __threadfence();
#pragma unroll
                for (int j = 0; j < kGroups; ++j) {
                    sum[j] = __ldcg(slot(0, j));
#pragma unroll 8
                    for (int r = 1; r < p.count(); ++r) sum[j] = sum[j] + __ldcg(slot(r, j));
                }
            }
            if (threadIdx.x == 0) a.counters[p.tile] = 0;
        }
        if (team == 0)
#pragma unroll
            for (int j = 0; j < kGroups; ++j) write(j, sum[j]);
    }
}

}  // namespace qlab::int4
