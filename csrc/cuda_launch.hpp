// What the launches share: a step as the kernels take it, and a failed call as an exception that names the kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda.hpp"
#include "replay_fast.cuh"

namespace qlab::cuda {

inline replay::Rule rule_of(const StepRow& s) {
    return {s.kind, s.fraction_bits, s.terms, s.zero_exponent, s.accumulator, replay::kMiddle};
}

inline void check(cudaError_t status, const char* kernel) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("CUDA refused to launch ") + kernel + ": " + cudaGetErrorString(status));
}

}  // namespace qlab::cuda
