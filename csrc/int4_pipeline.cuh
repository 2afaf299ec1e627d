// How both INT4 kernels go through their work, and the ring of stages in shared memory of the one for many rows.
//
// In the ring each stage has an mbarrier that says it is full (the bytes of bulk copies) and one that says it is empty (one arrival
// per computing warp).
#pragma once

#include "int4_fragments.cuh"

namespace qlab::int4 {

__device__ __forceinline__ float4 operator+(float4 u, float4 v) { return make_float4(u.x + v.x, u.y + v.y, u.z + v.z, u.w + v.w); }

// ((P0 + P1) + P2) + ... over the ranks of a cluster, each sum at the same place of its thread block.
__device__ __forceinline__ float4 sum_of_ranks(std::uint32_t address, int count) {
    float4 sum = load_of_rank(address, 0);
#pragma unroll 8
    for (int r = 1; r < count; ++r) sum = sum + load_of_rank(address, r);
    return sum;
}

// Which stage comes next, and how often the ring has gone round.
template <int kStages>
struct Ring {
    std::uint32_t full;  // address of the stages' barriers: those that say full, then those that say empty
    int stage = 0, phase = 0;

    __device__ void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
    __device__ std::uint32_t full_barrier() const { return full + 8 * stage; }
    __device__ std::uint32_t empty_barrier() const { return full + 8 * (kStages + stage); }
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
