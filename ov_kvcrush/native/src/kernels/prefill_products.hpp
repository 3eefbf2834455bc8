// Panels of bf16 products of the prompts' attention, and their order.
// A panel is 32 rows by 32 columns of sums, over pairs of numbers. How it is computed is a trait P:
//   P::Setup         made before the first panel of a thread, destroyed behind the last one
//   P::OVERLAPS      whether the processor makes products beside vector instructions
//   P::steps(parts)  parts of a panel's work, steps 0, 1, ... in this order
//   P::step(panel, i)
#pragma once

#include "kernels/kernels.hpp"
#include "kernels/simd_avx512.hpp"

namespace crush {
namespace {

constexpr int COLUMNS = PREFILL_COLUMNS;  // query rows of a pass
constexpr int PANEL_ROWS = 32;            // tokens of a block, or channels
static_assert(COLUMNS == 32 && PANEL_ROWS == TILE);

// sums [32][COLUMNS] (+)= left [32][pairs] . right [pairs][COLUMNS]; a pair is two bf16 numbers in a dword.
struct Panel {
    const uint8_t* left;
    int left_stride;  // bytes
    const uint32_t* right;
    int parts;  // of 16 pairs
    float* sums;
    bool adds;  // else the sums are written
};

// Products of a pass with values, then those of another pass with keys, interleaved with other work.
template <class P>
class Products {
public:
    struct Keys {
        const uint8_t* const* blocks;
        const uint32_t* queries;  // [D / 2][COLUMNS]
        float* logits;            // [tokens][COLUMNS], to be written
    };
    struct Values {
        const uint32_t *values, *powers;  // [D][PREFILL_STEP / 2], [tokens / 2][COLUMNS]
        float* out;                       // [D][COLUMNS], to be added to
    };
    // calls: of interleave() that shall make all that was added
    Products(int head_size, int blocks, int calls)
        : size_(head_size),
          blocks_(blocks),
          calls_(calls),
          value_steps_(P::steps(blocks)),
          key_steps_(P::steps(head_size / 32)) {}

    void add_values(const Values& values) {
        values_ = values;
        left_values_ = size_ / PANEL_ROWS * value_steps_;
        count();
    }
    void add_keys(const Keys& keys) {
        keys_ = keys;
        left_keys_ = blocks_ * key_steps_;
        count();
    }
    void interleave() {
        if constexpr (P::OVERLAPS)
            for (due_ += total_; due_ >= calls_; due_ -= calls_) step();
    }
    void finish() {
        while (left_values_ + left_keys_ > 0) step();
        total_ = due_ = 0;
    }

private:
    void count() {
        total_ = left_values_ + left_keys_;
        due_ = 0;
    }
    void step() {
        if (left_values_ > 0) {
            const int i = size_ / PANEL_ROWS * value_steps_ - left_values_--;
            P::step(channels(i / value_steps_), i % value_steps_);
        } else if (left_keys_ > 0) {
            const int i = blocks_ * key_steps_ - left_keys_--;
            P::step(block(i / key_steps_), i % key_steps_);
        }
    }
    // 32 channels of the sums, over all tokens.
    Panel channels(int i) const {
        constexpr int row = PREFILL_STEP / 2;
        const auto* left = reinterpret_cast<const uint8_t*>(values_.values + i * PANEL_ROWS * row);
        return {left, 4 * row, values_.powers, blocks_, values_.out + i * PANEL_ROWS * COLUMNS, true};
    }
    // The logits of a block, over all channels.
    Panel block(int i) const {
        return {keys_.blocks[i], 2 * size_, keys_.queries, size_ / 32, keys_.logits + i * TILE * COLUMNS, false};
    }

    const int size_, blocks_, calls_, value_steps_, key_steps_;
    Keys keys_{};
    Values values_{};
    int left_values_ = 0, left_keys_ = 0;  // steps
    int total_ = 0, due_ = 0;
};

}  // namespace
}  // namespace crush
