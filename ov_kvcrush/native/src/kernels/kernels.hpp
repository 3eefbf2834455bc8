// The kernels of one instruction set. Arguments and results are float32; a tile's header has its layout.
#pragma once

#include <string>
#include <vector>

#include "kernels/tile.hpp"

// Whether there are kernels above the scalar ones, which run on every x86-64. CRUSH_SCALAR_ONLY leaves them out: they take
// most of the time to compile, and what a test says of the store holds without them.
#if defined(__x86_64__) && !defined(CRUSH_SCALAR_ONLY)
#define CRUSH_X86
#endif

namespace crush {

constexpr int MAX_ROWS = 8;  // query rows that one kernel call takes: they share one pass over the tiles
constexpr int CHUNK = 16;    // tiles of one softmax step: their scores stay in the L1 cache
constexpr float RANK_BOUND = 1e30f;

// Rows of queries of one KV head against tiles [0, num_tiles). Row r sees tokens with
//   position <= row_position[r], and position > row_position[r] - window if window > 0.
struct AttendArgs {
    const uint8_t* const* tiles;
    size_t num_tiles;
    const uint8_t* const* next_tiles;  // [num_next] tiles that this thread reads next, to prefetch
    size_t num_next;
    int rows;                     // 1..MAX_ROWS
    const float* q;               // [rows, D], already times the softmax scale
    const int32_t* row_position;  // [rows]
    int32_t window;               // 0 = none
    float soft_cap;               // score = soft_cap * tanh(score / soft_cap); 0 = none
    const float* slope;           // [rows] score += slope * (position - row_position); null = none
    float* max;                   // [rows] running maximum, -inf at the beginning
    float* sum;                   // [rows] running sum of exp(score - max), 0 at the beginning
    float* acc;                   // [rows, D] running sum of exp(score - max) * value, rotated as *rotation tells
    int* rotation;                // as in TileLayout; ANY_ROTATION at the beginning, while acc is 0
};
constexpr int ANY_ROTATION = -1;

enum class Reduce : int32_t { mean = 1, max = 2, sum_squares = 3 };

// Scores of some query heads of one KV head over keys as PagedAttention stages them: see attention_scores.
struct StagedScores {
    const uint8_t* const* blocks;  // where the keys of 32 tokens lie, bf16 [32, D] each, the last one whole too
    size_t num_tokens;             // at positions 0, 1, 2, ...
    int head_size;                 // D, at least MIN_STAGED_HEAD
    const float* q;                // head h of row r is at q + r * q_stride + h * D
    size_t q_stride;
    int num_heads, num_rows;
    const int32_t* row_position;  // [num_rows]
    int32_t window;               // 0 = none
    float scale;                  // of q . k
    Reduce reduce;
    float* scratch;  // staged_scratch(num_tokens) floats
    float* out;      // [num_heads, num_tokens], zeros
};
constexpr int STAGED_LANES = 16;     // query rows that are scored at a time; those of a head fill staged_lanes
constexpr int MIN_STAGED_HEAD = 32;  // D
static inline int staged_lanes(int num_rows) { return (num_rows + 3) / 4 * 4; }
static inline size_t staged_scratch(size_t num_tokens) {
    return ((num_tokens + TILE - 1) / TILE * (TILE + 1) + 1) * STAGED_LANES;
}

// Rows of a prompt, and the query heads of one KV head, over what is staged of it: row r sees the tokens of index
//   <= first_position + r, and > first_position + r - window if window > 0.
struct Prefill {
    const uint8_t *const *keys, *const *values;  // where 32 tokens lie, bf16 [32, D] each, the last block whole too
    size_t num_tokens;                           // staged so far, at least first_position + num_rows
    int head_size;                               // D, a multiple of 32
    int group, num_rows;                         // query heads; rows: together at most PREFILL_MAX_COLUMNS
    const float* q;                              // head g of row r is at q + r * stride + g * D
    size_t stride;
    int32_t first_position;
    int32_t window;               // 0 = none
    float scale;                  // of q . k, above 0
    float soft_cap;               // as in AttendArgs; 0 = none
    const float *slopes, *sinks;  // [group], as in LayerShape; null = none
    float* scratch;               // prefill_scratch(head_size, group * num_rows) floats
    float* out;                   // as q
};
constexpr int PREFILL_COLUMNS = 32, PREFILL_STEP = 128, PREFILL_MAX_COLUMNS = 256;
static inline size_t prefill_scratch(int head_size, int columns) {
    const int each = 3 * head_size * PREFILL_COLUMNS / 2 + 2 * PREFILL_COLUMNS;
    const int once = 3 * PREFILL_STEP * PREFILL_COLUMNS + head_size * PREFILL_STEP / 2;
    return static_cast<size_t>((columns + PREFILL_COLUMNS - 1) / PREFILL_COLUMNS * each + once) + ALIGNMENT;
}

struct Kernels {
    const char* isa;
    // Online softmax over the tiles; updates max, sum, acc and rotation. May be called again for more tiles.
    void (*attend)(const AttendArgs&);
    // s[r * stride + TILE * i + t] = q_r . key_t of tile i, unmasked; slots beyond the count of a tile give 0.
    void (*scores)(const uint8_t* const* tiles, size_t num_tiles, const float* q, int rows, float* s, size_t stride);
    // s = exp(s - max(s)) / sum: softmax in place over n numbers, -inf gives 0; all -inf gives all 0.
    void (*softmax)(float* s, size_t n);
    // s = cap * tanh(s / cap) of n numbers, in place.
    void (*cap)(float* s, size_t n, float cap);
    // Fill a tile with count tokens from k, v [count, D] (row strides in floats), and zero codes beyond. Only codes,
    // scales and mins are written; the header is the caller's, with layout and count set.
    void (*encode)(uint8_t* tile, const float* k, size_t k_stride, const float* v, size_t v_stride, int count);
    // k, v [32, D] of all slots.
    void (*decode)(const uint8_t* tile, float* k, float* v);
    // Write the mean of the keys of a full tile, as they decode, where its layout has one.
    void (*write_mean)(uint8_t* tile);
    // s[r * stride + i] = q_r . mean of tile i, within +-RANK_BOUND whatever the tiles hold.
    void (*rank)(const uint8_t* const* tiles, size_t num_tiles, const float* q, int rows, float* s, size_t stride);
    // Write one token into `slot` of a tile with float codecs (f32, bf16, f16).
    void (*append_token)(uint8_t* tile, int slot, const float* k, const float* v);
    // Rotates rows [num_rows, head_size] in blocks of so many channels, as in TileLayout, or back.
    void (*rotate)(float* rows, int num_rows, int head_size, int channels);
    // Null where there is none: then staged keys are scored as tiles.
    void (*staged_scores)(const StagedScores&);
    // Null where there is none: then prompts go through PagedAttention.
    void (*prefill)(const Prefill&);
};

// The environment variable OV_KVCRUSH_ISA names the best kernels that may be used; it is read at the first call of one
// of these functions. Each of them throws std::invalid_argument if it is not a name of kernels.

// The best kernels of this CPU, or those of a name ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16",
// "amx"), or BF16_EMULATED. Throws std::invalid_argument with the names this CPU can run for any other one.
const Kernels& kernels(const std::string& isa = "");
// Kernels for tests, where avx512 may be used: these and the prompt kernel of avx512bf16, its products emulated.
constexpr const char* BF16_EMULATED = "avx512bf16-emulated";
std::vector<std::string> available_isas();  // slowest first, without the emulated ones
std::string isa_cap();                      // "" = all may be used

}  // namespace crush
