// qlab._cuda: launches behind integers. Every address is device memory of the current device; nothing waits for the GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda.hpp"
#include "int4_gemm.hpp"

namespace py = pybind11;
using qlab::cuda::HardwareInvariant;
using qlab::cuda::Int4;
using qlab::cuda::Int4Launch;
using qlab::cuda::Operands;
using qlab::cuda::Planned;
using qlab::cuda::StepRow;

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of qlab: INT4 GEMMs, the replay engine, the planned GEMM and a probe of one tensor-core instruction.";
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
    py::class_<Planned>(m, "Planned")
        .def(py::init([](int shape, int depth, bool half, bool whole, bool aligned, bool gathered, int levels, int blocks) {
            return Planned{shape, depth, half, whole, aligned, gathered, levels, blocks};
        }));
    m.def("planned_tile_sizes", &qlab::cuda::planned_tile_sizes, "Rows and columns of the planned GEMM's tiles.");
    m.def("planned_blocks", &qlab::cuda::planned_blocks, "Its blocks that a multiprocessor holds at once.");
    m.def("run_planned", &qlab::cuda::run_planned, "Programs, or chains, on this GPU's own tensor cores.");
    m.def("dot_tile_sizes", &qlab::cuda::dot_tile_sizes, "Rows and columns of the tiles of run_dots.");
    m.def("run_dots", &qlab::cuda::run_dots, "Chains of fused multiply-adds or of fp16 dots.");
    m.def("run_replayed_mma", &qlab::cuda::run_replayed_mma, "The same by the replay engine's arithmetic.");
    py::class_<HardwareInvariant>(m, "HardwareInvariant")
        .def(py::init([](std::uint64_t x, std::uint64_t blocks, std::uint64_t y, std::int64_t x_stride, int rows, int columns, int k,
                         int scale_rows, bool has_zeros, bool is_bf16, int slice_blocks, bool overlap) {
            return HardwareInvariant{x, blocks, y, x_stride, rows, columns, k, scale_rows, has_zeros, is_bf16, slice_blocks, overlap};
        }));
    m.def("hardware_invariant_tiles", &qlab::cuda::hardware_invariant_tiles, "Rows and columns of each tile.");
    m.def("run_hardware_invariant", &qlab::cuda::run_hardware_invariant, "One GEMM of fp32 fused multiply-adds.");
    py::class_<Int4>(m, "Int4")
        .def(py::init([](std::uint64_t x, std::int64_t x_stride, std::uint64_t blocks, std::uint64_t column_scales, std::uint64_t y,
                         std::uint64_t workspace, std::uint64_t counters, std::uint64_t pieces, std::uint64_t starts, int rows, int columns,
                         int k, int block_words, int group_rows, bool is_bf16, bool has_zeros, bool integer) {
            return Int4{x, x_stride, blocks, column_scales, y, workspace, counters, pieces, starts, rows, columns,
                        k, block_words, group_rows, is_bf16, has_zeros, integer};
        }));
    py::class_<Int4Launch>(m, "Int4Launch")
        .def(py::init([](int blocks, int cut, int cluster, int slices, int slice_rows, int columns, int join, bool overlap,
                         std::uint64_t stream) {
            return Int4Launch{blocks, cut, cluster, slices, slice_rows, columns, join, overlap, stream};
        }));
    m.def("int4_variants", &qlab::cuda::int4_variants, "Kernel, tile rows and columns, chains, running total and index of each.");
    m.def("run_int4", &qlab::cuda::run_int4, "One launch of an INT4 GEMM.");
}
