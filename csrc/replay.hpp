// Executes a replay program (qlab/replay/program.py): for each region of the output a postfix program over a stack of fp32
// values, whose leaves are chains. The output is cut into tiles; a tile's stack holds one value per output element and level,
// and threads take tiles in turn, so that their number cannot change a bit.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "chain.hpp"
#include "chain_lanes.hpp"
#include "rounding.hpp"

namespace qlab::replay {

enum class Op : int { chain = 0, add = 1, round = 2, scale = 3, bias = 4, scale_bias = 5 };

inline constexpr int kMaxDepth = 8;
inline constexpr int kStepColumns = 6, kOpColumns = 4, kRegionColumns = 6;

// Views of the caller's arrays; see qlab/replay/program.py for what they hold.
struct Program {
    std::int64_t M, K, N, G, order_length, step_count, op_count, region_count;
    bool bf16, has_group, has_bias;
    const std::uint16_t *x, *w, *scales, *bias;
    const std::int32_t *group, *order, *steps, *ops, *regions;
    std::uint16_t* y;       // [M, N] bits of x's type, or
    std::uint32_t* y_fp32;  // null, or [M, N] bits of fp32: what the programs leave, not rounded

    ChainStep step(std::int64_t i) const {
        const std::int32_t* s = steps + i * kStepColumns;
        const auto kind = static_cast<StepKind>(s[0]);
        const int terms = kind == StepKind::tensor_core ? s[2] : kind == StepKind::fma ? 1 : s[5];
        return {kind, s[1], terms, s[3], s[4] == 1};
    }
};

// IEEE arithmetic, to nearest and with subnormals, while it lives: the caller may have set the processor to flush them.
class DefaultArithmetic {
public:
    DefaultArithmetic() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultArithmetic() { std::fesetenv(&before_); }

private:
    std::fenv_t before_;
};

struct alignas(64) CacheLine {
    float values[16];
};

struct Tile {
    int row, column;  // the first ones
    int rows, columns;
    const std::int32_t* region;
};

// One worker: its stack of values and its decoded operands.
class Worker {
public:
    Worker(const Program& program, const Isa& isa, int depth, std::int64_t elements)
        : program_(program), isa_(isa), scratch_(new ChainScratch()), elements_(elements),
          stack_(static_cast<std::size_t>(depth * elements) / 16), scale_(kMaxColumns), bias_(kMaxColumns) {}

    void run(const Tile& tile) {
        tile_ = tile;
        stride_ = (tile.columns + kBlock - 1) / kBlock * kBlock;
        count_ = tile.rows * stride_;
        for (std::int64_t n = 0; n < tile.columns; ++n) {
            if (program_.G > 0) scale_[n] = value(program_.scales[tile.column + n]);
            if (program_.has_bias) bias_[n] = value(program_.bias[tile.column + n]);
        }
        int depth = 0;
        for (int i = tile.region[4]; i < tile.region[5]; ++i) apply(program_.ops + i * kOpColumns, depth);
        store(level(0));
    }

private:
    float value(std::uint16_t bits) const { return program_.bf16 ? from_bf16(bits) : from_half(bits); }
    float* level(int i) { return stack_.data()->values + i * elements_; }

    void apply(const std::int32_t* op, int& depth) {
        const auto type = static_cast<Type>(op[1]);
        float* top = level(depth - 1);
        switch (static_cast<Op>(op[0])) {
            case Op::chain: return chain(op, level(depth++));
            case Op::add: --depth; return add(level(depth - 1), top, type);
            case Op::round: return round(top, type);
            case Op::scale: return each(top, type, [this](float a, std::int64_t n) { return double{a} * scale_[n]; });
            case Op::bias: return each(top, type, [this](float a, std::int64_t n) { return add_to_odd(a, bias_[n]); });
            case Op::scale_bias:
                return each(top, type, [this](float a, std::int64_t n) { return add_to_odd(double{a} * scale_[n], bias_[n]); });
        }
    }

    void chain(const std::int32_t* op, float* sum) {
        const Program& p = program_;
        isa_.run({p.step(op[1]), p.bf16, p.x + tile_.row * p.K, p.K, tile_.rows, p.w + tile_.column, p.N, tile_.columns,
                  p.scales + tile_.column, p.group, p.order + op[2], op[3] - op[2], sum, stride_},
                 *scratch_);
    }

    void add(float* a, const float* b, Type type) {
        using F = Lanes::F;
        for (std::int64_t i = 0; i < count_; i += Lanes::width) {
            const F x = Lanes::load<F>(a + i), y = Lanes::load<F>(b + i);
            Lanes::store(a + i, type == Type::fp32 ? x + y : narrow(Lanes::add_to_odd(x, y), type));
        }
    }

    void round(float* a, Type type) {
        if (type == Type::fp32) return;
        for (std::int64_t i = 0; i < count_; i += Lanes::width) Lanes::store(a + i, narrow(Lanes::load<Lanes::F>(a + i), type));
    }

    static Lanes::F narrow(Lanes::F x, Type type) {
        return type == Type::fp16 ? Lanes::round_half(x) : Lanes::round_bf16(x);
    }

    // `exact` gives a double that is exact or odd, of a value and its column.
    template <class Exact>
    void each(float* a, Type type, Exact exact) {
        for (std::int64_t r = 0; r < tile_.rows; ++r)
            for (std::int64_t n = 0; n < tile_.columns; ++n) a[r * stride_ + n] = nearest(exact(a[r * stride_ + n], n), type);
    }

    void store(const float* a) {
        for (std::int64_t r = 0; r < tile_.rows; ++r) {
            const std::int64_t first = (tile_.row + r) * program_.N + tile_.column;
            const float* row = a + r * stride_;
            if (program_.y_fp32)
                for (std::int64_t n = 0; n < tile_.columns; ++n) program_.y_fp32[first + n] = fp32_bits(row[n]);
            else
                for (std::int64_t n = 0; n < tile_.columns; ++n)
                    program_.y[first + n] = program_.bf16 ? bf16_bits(row[n]) : half_bits(row[n]);
        }
    }

    const Program& program_;
    const Isa& isa_;
    std::unique_ptr<ChainScratch> scratch_;
    std::int64_t elements_;
    std::vector<CacheLine> stack_;
    std::vector<float> scale_, bias_;
    Tile tile_{};
    std::int64_t stride_ = 0, count_ = 0;
};

// Tiles of at most `rows` by `columns`, and of at most `elements` in all.
inline std::vector<Tile> tiles(const Program& p, int rows, int columns, int elements) {
    std::vector<Tile> found;
    for (std::int64_t i = 0; i < p.region_count; ++i) {
        const std::int32_t* r = p.regions + i * kRegionColumns;
        for (int m = r[0]; m < r[1]; m += rows) {
            const int height = std::min(rows, r[1] - m);
            const int width = std::clamp(elements / height / kBlock * kBlock, kBlock, columns);
            for (int n = r[2]; n < r[3]; n += width) found.push_back({m, n, height, std::min(width, r[3] - n), r});
        }
    }
    return found;
}

// Runs a program that check() (replay_check.hpp) has passed; `depth` is the deepest stack, threads below 1 mean all processors.
inline void execute(const Program& program, const Isa& isa, int threads, int depth) {
    if (threads < 1) threads = std::max(1u, std::thread::hardware_concurrency());
    constexpr int kElements = 32 * 256;  // a tile's sums stay in a core's own cache
    int rows = 32, columns = kMaxColumns;
    std::vector<Tile> todo = tiles(program, rows, columns, kElements);
    while (static_cast<int>(todo.size()) < 4 * threads && threads > 1 && (columns > kBlock || rows > 4)) {
        columns > kBlock ? columns /= 2 : rows /= 2;
        todo = tiles(program, rows, columns, kElements);
    }
    threads = std::min<int>(threads, std::max<std::size_t>(todo.size(), 1));

    std::atomic<std::size_t> next{0};
    std::vector<std::exception_ptr> failed(threads);
    const auto work = [&](int thread) {
        try {
            const DefaultArithmetic arithmetic;
            Worker worker(program, isa, depth, kElements);
            for (std::size_t i = next++; i < todo.size(); i = next++) worker.run(todo[i]);
        } catch (...) {
            failed[thread] = std::current_exception();
        }
    };
    std::vector<std::thread> pool;
    try {
        for (int i = 1; i < threads; ++i) pool.emplace_back(work, i);
    } catch (const std::system_error&) {
        // The system gives no more threads; those that there are do the work.
    }
    work(0);
    for (std::thread& t : pool) t.join();
    for (const std::exception_ptr& e : failed)
        if (e) std::rethrow_exception(e);
}

}  // namespace qlab::replay
