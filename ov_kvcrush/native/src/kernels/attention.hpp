// Attention of many requests over the tiles of a layer, balanced over threads; and the scores of a window of queries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/kernels.hpp"

namespace crush {

// tasks 0..n-1, each once, on any thread
using ParallelFor = std::function<void(size_t n, const std::function<void(size_t)>& task)>;

// The tiles of one KV head of one sequence, in any order of positions.
struct HeadView {
    const uint8_t* const* tiles;
    size_t num_tiles;
};

// Rows of one request in one step: num_rows rows from row_begin on, at positions first_position, first_position + 1,
// ...
struct AttendSpan {
    const HeadView* heads;  // [K], the rows' own keys and values are in them already
    size_t row_begin;
    size_t num_rows;
    int32_t first_position;
};

struct LayerShape {
    int num_heads, num_kv_heads, head_size;  // H, K, D; query head h reads KV head h / (H / K)
    int32_t window;                          // sliding window in tokens, 0 = none
    float scale;                             // of q . k
    float soft_cap = 0;                      // score = soft_cap * tanh(score / soft_cap); 0 = none
    std::vector<float> slopes = {};          // [H], ALiBi: score += slope * (position - row's position); or none
    std::vector<float> sinks = {};           // [H]: a score more, of no token, in the sum of the softmax; or none

    bool adjusts() const { return soft_cap > 0 || !slopes.empty() || !sinks.empty(); }
};

// out[row, H * D] = attention for all rows of all spans. q: [rows, H * D].
void attend(const Kernels&, const LayerShape&, const std::vector<AttendSpan>&, const float* q, float* out,
            int num_threads, const ParallelFor&);

// Numbers that attention_scores writes over these heads: G for each of their tokens.
size_t num_scores(const LayerShape&, const std::vector<HeadView>& heads);

// Scores of W query rows [W, H * D] at positions row_position [W]: for each query head h, softmax over all tokens that
// a row sees, reduced over the W rows. out: for KV head k the G heads of it, [G, tokens of k] each, one after the
// other; tokens in the order of the tiles (slots beyond a tile's count do not appear).
void attention_scores(const Kernels&, const LayerShape&, const HeadView* heads, const float* q,
                      const int32_t* row_position, size_t num_rows, Reduce, float* out, const ParallelFor&);

}  // namespace crush
