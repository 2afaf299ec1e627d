// qlab._cuda: launches behind integers. Every address is device memory of the current device; nothing waits for the GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda.hpp"

namespace py = pybind11;
using qlab::cuda::Operands;
using qlab::cuda::StepRow;

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of qlab: the replay engine and a probe of one tensor-core instruction.";
    py::class_<Operands>(m, "Operands")
        .def(py::init([](std::uint64_t x, std::uint64_t w, std::uint64_t order, std::uint64_t scales, std::uint64_t group,
                         std::uint64_t bias, int k, int n, bool is_bf16) {
            return Operands{x, w, order, scales, group, bias, k, n, is_bf16};
        }));
    py::class_<StepRow>(m, "StepRow").def(py::init([](int kind, int fraction_bits, int terms, int zero_exponent, int accumulator) {
        return StepRow{kind, fraction_bits, terms, zero_exponent, accumulator};
    }));
    m.def("set_device", &qlab::cuda::set_device, "The device of later launches.");
    m.def("chain_tiles", &qlab::cuda::chain_tiles, "Rows and columns of each shape of tile; the last one takes any step.");
    m.def("is_fast", &qlab::cuda::is_fast, "Whether the shapes before the last take this step.");
    m.def("run_chains", &qlab::cuda::run_chains, "One chain per tile into its part of the results.");
    m.def("run_join", &qlab::cuda::run_join, "The program of each output over the results of its chains.");
    m.def("run_mma", &qlab::cuda::run_mma, "One mma.sync per tile.");
    m.def("run_replayed_mma", &qlab::cuda::run_replayed_mma, "The same by the replay engine's arithmetic.");
}
