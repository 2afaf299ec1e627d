// qlab._native: the replay engine's inner loops behind numpy arrays. Meaning and arithmetic are in the headers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "tensor_core.hpp"

namespace py = pybind11;

namespace {

using Bits16 = py::array_t<std::uint16_t, py::array::c_style>;
using Bits32 = py::array_t<std::uint32_t, py::array::c_style>;

template <class Input>
void run_rows(const std::uint16_t* a, const std::uint16_t* b, const std::uint32_t* c, std::uint32_t* d, py::ssize_t rows,
              py::ssize_t k, const qlab::Step& step) {
    for (py::ssize_t i = 0; i < rows; ++i) d[i] = qlab::chain<Input>(a + i * k, b + i * k, c[i], k, step);
}

Bits32 fused_dot_add(const Bits16& a, const Bits16& b, const Bits32& c, int fraction_bits, int terms, int zero_exponent,
                     bool bf16) {
    if (a.ndim() != 2 || b.ndim() != 2 || c.ndim() != 1 || a.shape(0) != b.shape(0) || a.shape(1) != b.shape(1) ||
        a.shape(0) != c.shape(0))
        throw std::invalid_argument("a and b must be [R, K] and c [R]");
    if (terms < 1 || terms > qlab::kMaxTerms || fraction_bits < 0 || fraction_bits > qlab::kMaxFractionBits)
        throw std::invalid_argument("terms must be 1 to 64 and fraction_bits 0 to 48");
    if (a.shape(1) % terms != 0) throw std::invalid_argument("K must be a multiple of the step's terms");

    const py::ssize_t rows = a.shape(0), k = a.shape(1);
    const qlab::Step step{fraction_bits, terms, zero_exponent};
    Bits32 d(rows);
    const auto *pa = a.data(), *pb = b.data();
    const auto* pc = c.data();
    auto* pd = d.mutable_data();
    {
        const py::gil_scoped_release release;
        if (bf16)
            run_rows<qlab::Bf16>(pa, pb, pc, pd, rows, k, step);
        else
            run_rows<qlab::Fp16>(pa, pb, pc, pd, rows, k, step);
    }
    return d;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled inner loops of qlab.replay.";
    m.def("fused_dot_add", &fused_dot_add, py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("c").noconvert(),
          py::arg("fraction_bits"), py::arg("terms"), py::arg("zero_exponent"), py::arg("bf16"),
          "d[r] = c[r] + sum of a[r, k] * b[r, k] as a tensor core adds it, in chunks of `terms`: a, b uint16 [R, K] bits of "
          "fp16 or bf16, c and d uint32 [R] bits of fp32.");
}
