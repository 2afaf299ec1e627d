// Launches of the tensor-core probe.
#include "cuda.hpp"
#include "cuda_launch.hpp"
#include "tensor_core_probe.cuh"

namespace qlab::cuda {
namespace {

using namespace qlab::probe;

template <int K>
void launch(bool is_bf16, bool half, std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t d, int count, cudaStream_t s) {
    const auto *pa = reinterpret_cast<const std::uint16_t*>(a), *pb = reinterpret_cast<const std::uint16_t*>(b);
    const auto* pc = reinterpret_cast<const float*>(c);
    auto* pd = reinterpret_cast<float*>(d);
    const int blocks = (count - 1) / kWarps + 1, threads = 32 * kWarps;
    if (half)
        mma_half_tiles<K><<<blocks, threads, 0, s>>>(pa, pb, reinterpret_cast<const std::uint16_t*>(c),
                                                    reinterpret_cast<std::uint16_t*>(d), count);
    else if (is_bf16)
        mma_tiles<K, true><<<blocks, threads, 0, s>>>(pa, pb, pc, pd, count);
    else
        mma_tiles<K, false><<<blocks, threads, 0, s>>>(pa, pb, pc, pd, count);
}

template <int K>
void launch_replayed(const StepRow& step, bool is_bf16, bool fast, const void* a, const void* b, const void* c, void* d,
                     unsigned long long* took_fast, int count, cudaStream_t s) {
    const replay::Rule rule = rule_of(step);
    replayed_tiles<K><<<count, kM * kN, 0, s>>>(static_cast<const std::uint16_t*>(a), static_cast<const std::uint16_t*>(b), c, d,
                                                rule, is_bf16, fast && replay::fast_rule(rule, is_bf16), took_fast);
}

}  // namespace

void run_mma(int shape_k, bool is_bf16, bool half, std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t d, int count,
             std::uint64_t stream) {
    if (count == 0) return;
    const auto s = reinterpret_cast<cudaStream_t>(stream);
    if (shape_k == 16)
        launch<16>(is_bf16, half, a, b, c, d, count, s);
    else if (shape_k == 8)
        launch<8>(is_bf16, half, a, b, c, d, count, s);
    else
        throw std::invalid_argument("K of one instruction is 8 or 16");
    check(cudaGetLastError(), "mma");
}

void run_replayed_mma(int shape_k, const StepRow& step, bool is_bf16, bool fast, std::uint64_t a, std::uint64_t b, std::uint64_t c,
                      std::uint64_t d, std::uint64_t took_fast, int count, std::uint64_t stream) {
    if (count == 0) return;
    if ((shape_k != 8 && shape_k != 16) || step.terms < 1 || shape_k % step.terms)
        throw std::invalid_argument("K of one instruction is 8 or 16 and a multiple of the step's terms");
    const auto pointer = [](std::uint64_t address) { return reinterpret_cast<void*>(address); };
    (shape_k == 16 ? launch_replayed<16> : launch_replayed<8>)(step, is_bf16, fast, pointer(a), pointer(b), pointer(c), pointer(d),
                                                               reinterpret_cast<unsigned long long*>(took_fast), count,
                                                               reinterpret_cast<cudaStream_t>(stream));
    check(cudaGetLastError(), "replayed mma");
}

}  // namespace qlab::cuda
