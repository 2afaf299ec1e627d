// Refuses a replay program that the engine could not run as it is meant, with one sentence that names the place.
#pragma once

#include <stdexcept>
#include <string>

#include "replay.hpp"
#include "tensor_core.hpp"

namespace qlab::replay {

class Checker {
public:
    explicit Checker(const Program& program) : p_(program) {}

    // The deepest stack of any region.
    int run() {
        for (std::int64_t i = 0; i < p_.order_length; ++i)
            if (p_.order[i] < 0 || p_.order[i] >= p_.K)
                refuse("order", i, "is k = " + text(p_.order[i]) + ", outside 0 to K = " + text(p_.K));
        if (p_.has_group)
            for (std::int64_t k = 0; k < p_.K; ++k)
                if (p_.group[k] < 0 || p_.group[k] >= p_.G)
                    refuse("group", k, "is " + text(p_.group[k]) + ", and scales have " + text(p_.G) + " rows");
        for (std::int64_t i = 0; i < p_.step_count; ++i) step(i, p_.steps + i * kStepColumns);
        for (std::int64_t i = 0; i < p_.op_count; ++i) op(i, p_.ops + i * kOpColumns);
        int deepest = 1;
        for (std::int64_t i = 0; i < p_.region_count; ++i)
            deepest = std::max(deepest, region(i, p_.regions + i * kRegionColumns));
        return deepest;
    }

private:
    static std::string text(std::int64_t number) { return std::to_string(number); }

    [[noreturn]] static void refuse(const char* what, std::int64_t i, const std::string& why) {
        throw std::invalid_argument(std::string(what) + "[" + text(i) + "] " + why);
    }

    void step(std::int64_t i, const std::int32_t* s) const {
        const ChainStep step = s[0] >= 0 && s[0] <= 2 ? p_.step(i) : ChainStep{};
        if (s[0] < 0 || s[0] > 2) refuse("steps", i, "has kind " + text(s[0]) + "; 0 to 2 are known");
        if (s[4] < 0 || s[4] > 1) refuse("steps", i, "has accumulator " + text(s[4]) + "; 0 (fp32) and 1 (fp16) are known");
        if (step.kind == StepKind::fma) return;
        if (step.terms < 1 || step.terms > kMaxTerms) refuse("steps", i, "has " + text(step.terms) + " terms; 1 to 64 can be");
        if (step.kind == StepKind::half_dot && step.terms % 2) refuse("steps", i, "pairs an odd number of terms");
        if (step.kind == StepKind::tensor_core && (s[1] < 0 || s[1] > kMaxFractionBits))
            refuse("steps", i, "has F = " + text(s[1]) + "; 0 to 48 can be");
        if (step.kind == StepKind::tensor_core && (s[3] < -1024 || s[3] > 1024))
            refuse("steps", i, "has e_zero = " + text(s[3]) + "; -1024 to 1024 can be");
    }

    void op(std::int64_t i, const std::int32_t* o) const {
        if (o[0] < 0 || o[0] > 5) refuse("ops", i, "has opcode " + text(o[0]) + "; 0 to 5 are known");
        const auto code = static_cast<Op>(o[0]);
        if (code == Op::chain) return chain(i, o);
        if (o[1] < 0 || o[1] > 2) refuse("ops", i, "has type " + text(o[1]) + "; 0 to 2 are known");
        if ((code == Op::scale || code == Op::scale_bias) && p_.G == 0) refuse("ops", i, "scales, and there are no scales");
        if ((code == Op::bias || code == Op::scale_bias) && !p_.has_bias) refuse("ops", i, "adds a bias, and there is none");
    }

    void chain(std::int64_t i, const std::int32_t* o) const {
        if (o[1] < 0 || o[1] >= p_.step_count)
            refuse("ops", i, "names step " + text(o[1]) + " of " + text(p_.step_count));
        const std::string slice = text(o[2]) + ":" + text(o[3]);
        if (o[2] < 0 || o[2] > o[3] || o[3] > p_.order_length)
            refuse("ops", i, "takes order[" + slice + "] of " + text(p_.order_length));
        const ChainStep step = p_.step(o[1]);
        if ((o[3] - o[2]) % step.terms)
            refuse("ops", i, "takes order[" + slice + "], not a multiple of its step's " + text(step.terms) + " terms");
        if (step.kind == StepKind::half_dot && (p_.G == 0 || !p_.has_group))
            refuse("ops", i, "takes a step that scales by group, and there are no scales or no groups");
    }

    int region(std::int64_t i, const std::int32_t* r) const {
        if (r[0] < 0 || r[0] > r[1] || r[1] > p_.M || r[2] < 0 || r[2] > r[3] || r[3] > p_.N)
            refuse("regions", i, "is outside of the output [" + text(p_.M) + ", " + text(p_.N) + "]");
        if (r[4] < 0 || r[4] > r[5] || r[5] > p_.op_count)
            refuse("regions", i, "takes ops outside of 0 to " + text(p_.op_count));
        int depth = 0, deepest = 0;
        for (int o = r[4]; o < r[5]; ++o) {
            const auto code = static_cast<Op>(p_.ops[o * std::int64_t{kOpColumns}]);
            const int needs = code == Op::chain ? 0 : code == Op::add ? 2 : 1;
            if (depth < needs) refuse("ops", o, "finds too few values on the stack");
            depth += code == Op::chain ? 1 : 1 - needs;
            if (depth > kMaxDepth) refuse("ops", o, "needs more than " + text(kMaxDepth) + " values on the stack");
            deepest = std::max(deepest, depth);
        }
        if (depth != 1) refuse("regions", i, "leaves " + text(depth) + " values on the stack; one is the output");
        return deepest;
    }

    const Program& p_;
};

}  // namespace qlab::replay
