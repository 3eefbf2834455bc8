// The plan of a step: which rows of an inference belong to which sequence. An int32 tensor from the engine, checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/attention.hpp"

namespace crush {

// The tensor: version, rows, prompt rows, entries; then 6 numbers for each entry:
//   sequence, first row, rows, position of the first row, kind, reduce
// Rows of fresh prompts that attend through PagedAttention, the prompt rows, come first. All other rows follow in the
// order of the entries.
struct PlanEntry {
    enum Kind : int32_t {
        stored = 0,   // append to the store, attend to it
        staged = 1,   // rows of a fresh prompt, whose keys and values PagedAttention wrote: only queries are captured
        prefill = 2,  // rows of a fresh prompt without PagedAttention: write to the staging blocks, attend to them
    };
    int32_t sequence;
    int32_t row_begin;
    int32_t num_rows;
    int32_t first_position;
    int32_t kind;
    int32_t reduce;  // 0 = no scores wanted, else a Reduce

    bool wants_scores() const { return reduce != 0; }
};

struct Plan {
    static constexpr int32_t VERSION = 1;

    size_t num_prompt_rows = 0;
    std::vector<PlanEntry> entries;

    // Throws std::invalid_argument naming the first thing that is wrong: size, version, rows that overlap, are left out
    // or are not there. num_rows: rows of the tensors of this inference.
    static Plan parse(const int32_t* data, size_t size, size_t num_rows);
};

}  // namespace crush
