#include "kernels/product.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "kernels/kernels.hpp"
#include "kernels/split.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace crush {

extern const ProductKernels PRODUCT_SCALAR;
#if defined(CRUSH_X86)
extern const ProductKernels PRODUCT_AVX2, PRODUCT_AVXVNNI, PRODUCT_AVX512, PRODUCT_AVX512VNNI;
#endif

const ProductKernels& product_kernels(const std::string& isa) {
    const std::string name = kernels(isa).isa;
#if defined(CRUSH_X86)
    if (name == "avx2") return PRODUCT_AVX2;
    if (name == "avxvnni") return PRODUCT_AVXVNNI;
    if (name == "avx512") return PRODUCT_AVX512;
    // Few rows do not fill tiles of AMX, and kernels above those of VNNI are used only where there is VNNI.
    if (name != "scalar") return PRODUCT_AVX512VNNI;
#endif
    return PRODUCT_SCALAR;
}

QuantisedRows::QuantisedRows(size_t rows, size_t inputs, size_t weight_group)
    : num_rows(rows),
      num_inputs(inputs),
      group(weight_group),
      input_group(weight_group % INPUT_GROUP ? SMALL_INPUT_GROUP : INPUT_GROUP),
      codes(rows * inputs),
      scales(rows * inputs / input_group),
      sums(rows * inputs / input_group),
      group_sums(rows * inputs / group) {}

void QuantisedRows::sum_groups() {
    const size_t each = group / input_group;
    for (size_t i = 0; i < group_sums.size(); ++i) {
        float sum = 0;
        for (size_t j = 0; j < each; ++j) sum += sums[i * each + j];
        group_sums[i] = sum;
    }
}

namespace {

void check(bool holds, const char* rule, size_t got) {
    if (!holds) throw std::invalid_argument(std::string(rule) + ", got " + std::to_string(got));
}

constexpr size_t HUGE_PAGE = size_t{2} << 20;
constexpr size_t TASK_BYTES = 64 << 10;  // of weights: a few microseconds

// Of tasks that read `bytes` each, how many a thread takes at most at a time.
size_t at_once(size_t bytes) { return std::max<size_t>(1, TASK_BYTES / bytes); }

// tasks 0..n-1, up to `most` at a time
template <class Task>
void in_chunks(const ParallelFor& parallel, size_t n, size_t most, const Task& task) {
    const Split split = split_by_size(n, most);
    parallel(split.parts, [&](size_t i) {
        for (size_t j = split.begin(i); j < split.begin(i + 1); ++j) task(j);
    });
}

void quantise_rows(const ProductKernels& kernels, const float* x, QuantisedRows& rows) {
    kernels.quantise(x, rows.scales.size(), rows.input_group, rows.codes.data(), rows.scales.data(), rows.sums.data());
    rows.sum_groups();
}

class Linear final : public Product {
public:
    Linear(const CompressedWeights& weights, const ParallelFor& parallel) : weights_(weights, parallel) {}
    size_t num_inputs() const override { return weights_.num_inputs(); }
    size_t num_outputs() const override { return weights_.num_outputs(); }
    size_t nbytes() const override { return weights_.nbytes(); }

    void run(const ProductKernels& kernels, const float* x, size_t num_rows, float* out,
             const ParallelFor& parallel) const override {
        QuantisedRows rows(num_rows, num_inputs(), weights_.group());
        quantise_rows(kernels, x, rows);
        run(kernels, rows, out, parallel);
    }
    void run(const ProductKernels& kernels, const QuantisedRows& rows, float* out, const ParallelFor& parallel) const {
        const size_t width = num_outputs(), blocks = width / PRODUCT_COLUMNS;
        in_chunks(parallel, blocks, at_once(weights_.block_bytes()), [&](size_t block) {
            float made[PRODUCT_ROWS * PRODUCT_COLUMNS];
            for (size_t first = 0; first < rows.num_rows; first += PRODUCT_ROWS) {
                const size_t count = std::min<size_t>(PRODUCT_ROWS, rows.num_rows - first);
                weights_.multiply(kernels, rows, block, first, count, made);
                for (size_t r = 0; r < count; ++r)
                    std::copy_n(made + r * PRODUCT_COLUMNS, PRODUCT_COLUMNS,
                                out + (first + r) * width + block * PRODUCT_COLUMNS);
            }
        });
    }
    const PackedWeights& weights() const { return weights_; }

private:
    PackedWeights weights_;
};

// Two passes over the threads: hidden channels, quantised where they are made, then the outputs.
class Mlp final : public Product {
public:
    Mlp(const CompressedWeights& gate, const CompressedWeights& up, const CompressedWeights& down,
        Activation activation, const ParallelFor& parallel)
        : gate_(gate, parallel), up_(up, parallel), down_(down, parallel), activation_(activation) {
        check(gate_.num_inputs() == up_.num_inputs() && gate_.num_outputs() == up_.num_outputs(),
                "gate and up must have the same shape", up_.num_inputs());
        check(down_.num_inputs() == gate_.num_outputs(), "down must have an input for each output of gate",
                down_.num_inputs());
        check(gate_.num_outputs() % GATE_COLUMNS == 0, "outputs of gate must be a multiple of 32",
                gate_.num_outputs());
        check(gate_.group() % INPUT_GROUP == up_.group() % INPUT_GROUP,
                "groups of gate and up must both be 16, or neither", up_.group());
    }
    size_t num_inputs() const override { return gate_.num_inputs(); }
    size_t num_outputs() const override { return down_.num_outputs(); }
    size_t nbytes() const override { return gate_.nbytes() + up_.nbytes() + down_.nbytes(); }

    void run(const ProductKernels& kernels, const float* x, size_t num_rows, float* out,
             const ParallelFor& parallel) const override {
        QuantisedRows rows(num_rows, num_inputs(), gate_.group());
        quantise_rows(kernels, x, rows);
        QuantisedRows of_up(0, num_inputs(), up_.group());
        if (up_.group() != gate_.group()) {
            of_up = QuantisedRows(num_rows, num_inputs(), up_.group());
            quantise_rows(kernels, x, of_up);
        }
        const QuantisedRows& up_rows = up_.group() != gate_.group() ? of_up : rows;
        QuantisedRows hidden(num_rows, gate_.num_outputs(), down_.weights().group());
        const size_t bytes = (gate_.block_bytes() + up_.block_bytes()) * GATE_COLUMNS / PRODUCT_COLUMNS;
        in_chunks(parallel, gate_.num_outputs() / GATE_COLUMNS, at_once(bytes),
                  [&](size_t i) { make_hidden(kernels, rows, up_rows, i, hidden); });
        hidden.sum_groups();
        down_.run(kernels, hidden, out, parallel);
    }

private:
    // Channels [32 * i, 32 * i + 32)
    void make_hidden(const ProductKernels& kernels, const QuantisedRows& rows, const QuantisedRows& up_rows, size_t i,
                     QuantisedRows& hidden) const {
        constexpr size_t blocks = GATE_COLUMNS / PRODUCT_COLUMNS;
        float made[2][PRODUCT_ROWS * PRODUCT_COLUMNS];
        float gate[PRODUCT_ROWS][GATE_COLUMNS], up[PRODUCT_ROWS][GATE_COLUMNS];
        const size_t groups = GATE_COLUMNS / hidden.input_group;
        for (size_t first = 0; first < rows.num_rows; first += PRODUCT_ROWS) {
            const size_t count = std::min<size_t>(PRODUCT_ROWS, rows.num_rows - first);
            for (size_t b = 0; b < blocks; ++b) {
                gate_.multiply(kernels, rows, i * blocks + b, first, count, made[0]);
                up_.multiply(kernels, up_rows, i * blocks + b, first, count, made[1]);
                for (size_t r = 0; r < count; ++r) {
                    std::copy_n(made[0] + r * PRODUCT_COLUMNS, PRODUCT_COLUMNS, gate[r] + b * PRODUCT_COLUMNS);
                    std::copy_n(made[1] + r * PRODUCT_COLUMNS, PRODUCT_COLUMNS, up[r] + b * PRODUCT_COLUMNS);
                }
            }
            for (size_t r = 0; r < count; ++r) {
                kernels.gate(activation_, gate[r], up[r]);
                const size_t at = (first + r) * hidden.num_inputs + i * GATE_COLUMNS;
                kernels.quantise(gate[r], groups, hidden.input_group, hidden.codes.data() + at,
                                 hidden.scales.data() + at / hidden.input_group,
                                 hidden.sums.data() + at / hidden.input_group);
            }
        }
    }

    PackedWeights gate_, up_;
    Linear down_;
    Activation activation_;
};

// One block of 16 outputs.
void pack_block(const CompressedWeights& w, size_t block, uint8_t* to) {
    const size_t first = block * PRODUCT_COLUMNS, groups = w.num_inputs / w.group;
    const size_t row_bytes = w.num_inputs * static_cast<size_t>(w.bits) / 8;
    for (size_t g = 0; g < groups; ++g) {
        for (size_t n = 0; n < PRODUCT_COLUMNS; ++n) {
            const size_t from = (first + n) * groups + g;
            std::memcpy(to + 2 * n, w.scales + from, 2);
            std::memcpy(to + 2 * (PRODUCT_COLUMNS + n), w.zeros + from, 2);
        }
        to += PRODUCT_HEADER;
        const size_t step = 32 / static_cast<size_t>(w.bits);  // inputs in a dword
        for (size_t k = g * w.group; k < (g + 1) * w.group; k += step, to += 4 * PRODUCT_COLUMNS) {
            for (size_t n = 0; n < PRODUCT_COLUMNS; ++n) {
                const uint8_t* from = w.codes + (first + n) * row_bytes + k * static_cast<size_t>(w.bits) / 8;
                if (w.bits == 8) {
                    std::memcpy(to + 4 * n, from, 4);
                    continue;
                }
                for (size_t i = 0; i < 4; ++i) {
                    const int shift = i % 2 ? 4 : 0;
                    const int low = from[i / 2] >> shift & 15, high = from[2 + i / 2] >> shift & 15;
                    to[4 * n + i] = static_cast<uint8_t>(low | high << 4);
                }
            }
        }
    }
}

}  // namespace

void PackedWeights::Free::operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{HUGE_PAGE}); }

PackedWeights::PackedWeights(const CompressedWeights& w, const ParallelFor& parallel)
    : bits_(w.bits), num_outputs_(w.num_outputs), num_inputs_(w.num_inputs), group_(w.group) {
    check(bits_ == 8 || bits_ == 4, "bits must be 8 or 4", static_cast<size_t>(bits_));
    check(group_ == SMALL_INPUT_GROUP || (group_ > 0 && group_ % INPUT_GROUP == 0),
            "group must be 16 or a multiple of 32", group_);
    check(group_ <= MAX_CODES_OF_GROUP, "group must be at most 65536", group_);
    check(num_outputs_ > 0 && num_outputs_ % PRODUCT_COLUMNS == 0, "outputs must be a multiple of 16", num_outputs_);
    check(num_inputs_ > 0 && num_inputs_ % group_ == 0, "inputs must be a multiple of the group", num_inputs_);
    block_bytes_ = num_inputs_ / group_ * PRODUCT_HEADER +
                   num_inputs_ * PRODUCT_COLUMNS * static_cast<size_t>(bits_) / 8;
    data_.reset(static_cast<uint8_t*>(::operator new[](nbytes(), std::align_val_t{HUGE_PAGE})));
#if defined(__linux__)
    madvise(data_.get(), nbytes() / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);  // refused, they are small
#endif
    in_chunks(parallel, num_outputs_ / PRODUCT_COLUMNS, at_once(block_bytes_),
              [&](size_t block) { pack_block(w, block, data_.get() + block * block_bytes_); });
}

void PackedWeights::multiply(const ProductKernels& kernels, const QuantisedRows& rows, size_t block, size_t first,
                             size_t count, float* out) const {
    kernels.multiply({data_.get() + block * block_bytes_, bits_, static_cast<int>(count), num_inputs_ / group_, group_,
                      rows.input_group, rows.codes.data() + first * num_inputs_,
                      rows.scales.data() + first * (num_inputs_ / rows.input_group),
                      rows.group_sums.data() + first * (num_inputs_ / group_), out});
}

std::unique_ptr<Product> make_linear(const CompressedWeights& weights, const ParallelFor& parallel) {
    return std::make_unique<Linear>(weights, parallel);
}

std::unique_ptr<Product> make_mlp(const CompressedWeights& gate, const CompressedWeights& up,
                                  const CompressedWeights& down, Activation activation, const ParallelFor& parallel) {
    return std::make_unique<Mlp>(gate, up, down, activation, parallel);
}

}  // namespace crush
