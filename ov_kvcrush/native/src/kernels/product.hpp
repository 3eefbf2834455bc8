// Products of a few rows with compressed weights, as decode steps have them: x [M, K] times w [N, K] transposed.
//
// Cost model: a decode step reads every weight once and does two operations with it, so the time is that of reading.
// Codes of 16 outputs lie together, 4 inputs each in a dword, and one instruction (vpdpbusd) multiplies 64 bytes of them
// with 4 inputs of a row: an ordered stream, read once for 4 rows. Rows are quantised as the CPU plugin does
// (DYNAMIC_QUANTIZATION_GROUP_SIZE=32): 32 inputs of a row have a scale, codes in -127..127. So an input is wrong by
// at most 1/254 of the largest of its 32, everything after that is exact in integers or rounded in float32.
//
// Packed weights, for each 16 outputs and in them for each group of G inputs:
//   scales f16 [16], zero points f16 [16]
//   codes, 64 bytes each for all outputs: of 8 bits for 4 inputs k..k+3, output n in bytes 4n..4n+3; of 4 bits for 8
//   inputs, k..k+3 in the low halves of the bytes and k+4..k+7 in the high ones
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/attention.hpp"

namespace crush {

constexpr int PRODUCT_COLUMNS = 16;                         // outputs that lie together
constexpr int PRODUCT_ROWS = 4;                             // rows that one call of a kernel takes
constexpr int GATE_COLUMNS = 32;                            // hidden channels of an MLP that are made at a time
constexpr int INPUT_GROUP = 32, SMALL_INPUT_GROUP = 16;     // inputs that share a scale; the second where weights have 16
constexpr size_t MAX_CODES_OF_GROUP = 65536;                // inputs: the sums of a group are floats of integers
constexpr size_t PRODUCT_HEADER = 4 * PRODUCT_COLUMNS;      // bytes of a group's scales and zero points

// Weights [N, K] as they come: w = (code - zero point) * scale, the last two f16 [N, K / G].
struct CompressedWeights {
    int bits;              // of a code, 8 or 4
    const uint8_t* codes;  // [N, K], or [N, K / 2] with the first of two in the low half
    const uint16_t *scales, *zeros;
    size_t num_outputs, num_inputs, group;  // N, K, G
};

// Rows of inputs in 8 bits.
struct QuantisedRows {
    size_t num_rows, num_inputs, group, input_group;  // M, K, G of the weights, A
    std::vector<int8_t> codes;                        // [M, K]
    std::vector<float> scales;                        // [M, K / A]
    std::vector<float> sums;                          // [M, K / A]: of scale * code
    std::vector<float> group_sums;                    // [M, K / G]

    QuantisedRows(size_t rows, size_t inputs, size_t weight_group);
    void sum_groups();  // group_sums from sums
};

// A block of 16 outputs and up to PRODUCT_ROWS rows.
struct BlockProduct {
    const uint8_t* block;
    int bits, rows;
    size_t num_groups, group;   // K / G, G
    size_t input_group;         // A
    const int8_t* codes;        // of the first row, as QuantisedRows has them
    const float *scales, *group_sums;
    float* out;                 // [rows, 16]
};

enum class Activation : int32_t { silu = 0, gelu_tanh = 1 };

struct ProductKernels {
    void (*multiply)(const BlockProduct&);
    // num_groups groups of A floats (16 or 32): codes [groups, A], scales and sums [groups]. One that is not finite
    // makes its scale NaN.
    void (*quantise)(const float* x, size_t num_groups, size_t input_group, int8_t* codes, float* scales, float* sums);
    // gate = activation(gate) * up, GATE_COLUMNS floats
    void (*gate)(Activation, float* gate, const float* up);
};

// The kernels of kernels(isa). Throws std::invalid_argument for an instruction set that this CPU has not.
const ProductKernels& product_kernels(const std::string& isa = "");

// Weights repacked; they do not change.
class PackedWeights {
public:
    // Throws std::invalid_argument unless N and K are multiples of 16 and of the group, and the group is 16 or a
    // multiple of 32.
    PackedWeights(const CompressedWeights&, const ParallelFor&);

    size_t num_outputs() const { return num_outputs_; }
    size_t num_inputs() const { return num_inputs_; }
    size_t group() const { return group_; }
    size_t nbytes() const { return num_outputs_ / PRODUCT_COLUMNS * block_bytes_; }
    size_t block_bytes() const { return block_bytes_; }
    // Outputs [16 * block, 16 * block + 16) of rows [first, first + count): out [count, 16]
    void multiply(const ProductKernels&, const QuantisedRows&, size_t block, size_t first, size_t count,
                  float* out) const;

private:
    struct Free {
        void operator()(uint8_t* p) const;
    };
    int bits_;
    size_t num_outputs_, num_inputs_, group_, block_bytes_;
    std::unique_ptr<uint8_t[], Free> data_;
};

// What stands in a graph for one product, or for all of an MLP.
class Product {
public:
    virtual ~Product() = default;
    virtual size_t num_inputs() const = 0;
    virtual size_t num_outputs() const = 0;
    virtual size_t nbytes() const = 0;
    // x [num_rows, inputs] to out [num_rows, outputs]. A row's results do not depend on the others.
    virtual void run(const ProductKernels&, const float* x, size_t num_rows, float* out, const ParallelFor&) const = 0;
};

std::unique_ptr<Product> make_linear(const CompressedWeights&, const ParallelFor&);
// down(activation(gate(x)) * up(x)). Throws std::invalid_argument unless the sizes fit together, and unless the hidden
// ones are a multiple of 32.
std::unique_ptr<Product> make_mlp(const CompressedWeights& gate, const CompressedWeights& up,
                                  const CompressedWeights& down, Activation, const ParallelFor&);

}  // namespace crush
