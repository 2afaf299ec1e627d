// qlab._native: the replay engine behind numpy arrays. Meaning and arithmetic are in the headers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#define QLAB_LANES 4
#include "replay.hpp"
#include "replay_check.hpp"
#include "tensor_core.hpp"

namespace py = pybind11;

namespace {

using Bits16 = py::array_t<std::uint16_t, py::array::c_style>;
using Bits32 = py::array_t<std::uint32_t, py::array::c_style>;
using Int32 = py::array_t<std::int32_t, py::array::c_style>;

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

// Those that this processor has, the fastest first.
std::vector<const qlab::Isa*> usable() {
    std::vector<const qlab::Isa*> found;
#if defined(__x86_64__)
    for (const qlab::Isa* isa : {&qlab::kAvx512, &qlab::kAvx2})
        if (isa->usable()) found.push_back(isa);
#endif
    found.push_back(&qlab::kPortable);
    return found;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const qlab::Isa* isa : usable()) names.emplace_back(isa->name);
    return names;
}

const qlab::Isa& choose(const std::string& name) {
    std::string known = "auto";
    for (const qlab::Isa* isa : usable()) {
        if (name == "auto" || name == isa->name) return *isa;
        known += std::string(", ") + isa->name;
    }
    throw std::invalid_argument("isa '" + name + "' is not among those of this processor: " + known);
}

void execute(const Bits16& x, const Bits16& w, const Bits16& scales, const Int32& group, const Bits16& bias, const Int32& order,
             const Int32& steps, const Int32& ops, const Int32& regions, bool bf16, py::array& y, int threads,
             const std::string& isa) {
    namespace replay = qlab::replay;
    const auto table = [](const Int32& a, int columns) { return a.ndim() == 2 && a.shape(1) == columns; };
    const bool fp32 = py::isinstance<Bits32>(y);
    if (!fp32 && !py::isinstance<Bits16>(y)) throw std::invalid_argument("y must be contiguous, uint16 or uint32");
    if (x.ndim() != 2 || w.ndim() != 2 || y.ndim() != 2 || x.shape(1) != w.shape(0) || y.shape(0) != x.shape(0) ||
        y.shape(1) != w.shape(1))
        throw std::invalid_argument("x must be [M, K], w [K, N] and y [M, N]");
    if (scales.ndim() != 2 || scales.shape(1) != w.shape(1)) throw std::invalid_argument("scales must be [G, N], G 0 for none");
    if (group.ndim() != 1 || (group.size() != 0 && group.shape(0) != w.shape(0)))
        throw std::invalid_argument("group must be [K], or [0] for none");
    if (bias.ndim() != 1 || (bias.size() != 0 && bias.shape(0) != w.shape(1)))
        throw std::invalid_argument("bias must be [N], or [0] for none");
    if (order.ndim() != 1 || !table(steps, replay::kStepColumns) || !table(ops, replay::kOpColumns) ||
        !table(regions, replay::kRegionColumns))
        throw std::invalid_argument("order must be [T], steps [S, 6], ops [P, 4] and regions [R, 6]");

    replay::Program program{};
    program.M = x.shape(0), program.K = x.shape(1), program.N = w.shape(1), program.G = scales.shape(0);
    program.order_length = order.shape(0), program.step_count = steps.shape(0);
    program.op_count = ops.shape(0), program.region_count = regions.shape(0);
    program.bf16 = bf16, program.has_group = group.size() != 0, program.has_bias = bias.size() != 0;
    program.x = x.data(), program.w = w.data(), program.scales = scales.data(), program.bias = bias.data();
    program.group = group.data(), program.order = order.data(), program.steps = steps.data();
    program.ops = ops.data(), program.regions = regions.data();
    if (fp32)
        program.y_fp32 = static_cast<std::uint32_t*>(y.mutable_data());
    else
        program.y = static_cast<std::uint16_t*>(y.mutable_data());
    const qlab::Isa& chosen = choose(isa);
    const py::gil_scoped_release release;
    const int depth = replay::Checker(program).run();
    replay::execute(program, chosen, threads, depth);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled inner loops of qlab.replay.";
    m.def("fused_dot_add", &fused_dot_add, py::arg("a").noconvert(), py::arg("b").noconvert(), py::arg("c").noconvert(),
          py::arg("fraction_bits"), py::arg("terms"), py::arg("zero_exponent"), py::arg("bf16"),
          "d[r] = c[r] + sum of a[r, k] * b[r, k] as a tensor core adds it, in chunks of `terms`: a, b uint16 [R, K] bits of "
          "fp16 or bf16, c and d uint32 [R] bits of fp32.");
    m.def("isas", &isas, "Instruction sets that this processor has a compiled engine for, the fastest first.");
    m.def("execute", &execute, py::arg("x").noconvert(), py::arg("w").noconvert(), py::arg("scales").noconvert(),
          py::arg("group").noconvert(), py::arg("bias").noconvert(), py::arg("order").noconvert(), py::arg("steps").noconvert(),
          py::arg("ops").noconvert(), py::arg("regions").noconvert(), py::arg("bf16"), py::arg("y").noconvert(),
          py::arg("threads") = 0, py::arg("isa") = "auto",
          "Runs a replay program (qlab/replay/program.py) and writes the bits of its regions into y [M, N]: uint16, of x's "
          "type, or uint32, of fp32 and not rounded. threads 0: all processors; "
          "isa: auto, portable, avx2 or avx512. Any of them gives the same bits. Raises ValueError for a malformed program.");
}
