// Which tiles some row of a call sees, CHUNK at a time, and prefetching of the next ones. (No standard library: see
// attend_impl.hpp)
#pragma once

#include "kernels/kernels.hpp"

namespace crush {
namespace {

constexpr float INF = __builtin_inff();
constexpr float LOG2E = 1.44269504f;
// 2^x on [0, 1), relative error 7.5e-8 (Remez)
constexpr float EXP2_POLY[6] = {1.f, 0.6931530833f, 0.2401536107f, 0.05582631752f, 0.008989339694f, 0.001877576695f};

constexpr int STRIDE = CHUNK * TILE + 16;  // floats from row to row of a buffer; + 16: not in the same cache set

struct VisibleTile {
    const uint8_t* tile;
    const TileLayout* layout;
    bool masked;  // some row does not see some slot
};

// Prefetches the tiles of the next step into the L2 cache, a few lines at a time between arithmetic. (Bursts, and
// prefetches to the L1 cache, run into the limit of 16 outstanding lines.)
template <class I>
class TilePrefetcher {
public:
    TilePrefetcher(const VisibleTile* tiles, int num_tiles, int steps) : tile_(tiles), end_tile_(tiles + num_tiles) {
        size_t bytes = 0;
        for (int i = 0; i < num_tiles; ++i) bytes += tiles[i].layout->bytes;
        lines_ = static_cast<int>(bytes / ALIGNMENT) / (steps > 0 ? steps : 1) + 1;
        open();
    }
    void step() {
        for (int i = 0; i < lines_ && line_ != end_; ++i) {
            I::prefetch(line_);
            line_ += ALIGNMENT;
            if (line_ == end_) open();
        }
    }

private:
    void open() {
        if (tile_ == end_tile_) return;
        line_ = tile_->tile;
        end_ = line_ + tile_->layout->bytes;
        ++tile_;
    }
    const VisibleTile *tile_, *end_tile_;
    const uint8_t *line_ = nullptr, *end_ = nullptr;
    int lines_;
};

struct RowBounds {
    int32_t low[MAX_ROWS], high[MAX_ROWS];  // row r sees positions low[r] < position <= high[r]
    int32_t min_low, max_low, min_high, max_high;

    explicit RowBounds(const AttendArgs& a) {
        for (int r = 0; r < a.rows; ++r) {
            high[r] = a.row_position[r] < INT32_MAX ? a.row_position[r] : INT32_MAX - 1;
            low[r] = a.window > 0 && high[r] >= INT32_MIN + a.window ? high[r] - a.window : INT32_MIN;
            min_low = r == 0 || low[r] < min_low ? low[r] : min_low;
            max_low = r == 0 || low[r] > max_low ? low[r] : max_low;
            min_high = r == 0 || high[r] < min_high ? high[r] : min_high;
            max_high = r == 0 || high[r] > max_high ? high[r] : max_high;
        }
    }
};

// Up to CHUNK tiles that some row sees, from tile `next` on, which is moved behind them.
template <class I>
int collect_visible(const AttendArgs& a, const RowBounds& rows, size_t& next, VisibleTile* out) {
    int n = 0;
    for (; next < a.num_tiles && n < CHUNK; ++next) {
        if (next + CHUNK < a.num_tiles)
            I::prefetch(a.tiles[next + CHUNK]);
        else if (next + CHUNK - a.num_tiles < a.num_next)
            I::prefetch(a.next_tiles[next + CHUNK - a.num_tiles]);
        const TileHeader& h = header(a.tiles[next]);
        if (h.count <= 0 || h.min_position > rows.max_high || h.max_position <= rows.min_low) continue;
        const bool all = h.count == TILE && h.max_position <= rows.min_high && h.min_position > rows.max_low;
        out[n++] = {a.tiles[next], h.layout, !all};
    }
    return n;
}
// The first of the next tiles of this thread: only to be prefetched.
template <class I>
int collect_next(const AttendArgs& a, VisibleTile* out) {
    int n = 0;
    for (; n < CHUNK && static_cast<size_t>(n) < a.num_next; ++n)
        out[n] = {a.next_tiles[n], &layout(a.next_tiles[n]), false};
    return n;
}

// Attention over visible tiles by other kernels, which look at them again.
inline void attend_visible(void (*attend)(const AttendArgs&), const AttendArgs& a, const VisibleTile* chunk, int n,
                           const VisibleTile* after, int num_after) {
    const uint8_t *tiles[CHUNK], *next[CHUNK];
    for (int i = 0; i < n; ++i) tiles[i] = chunk[i].tile;
    for (int i = 0; i < num_after; ++i) next[i] = after[i].tile;
    AttendArgs args = a;
    args.tiles = tiles;
    args.num_tiles = static_cast<size_t>(n);
    args.next_tiles = next;
    args.num_next = static_cast<size_t>(num_after);
    attend(args);
}

// cap * tanh(x / cap) = cap * (1 - 2 / (1 + e^(2 x / cap))). Where the exponent of 2 is beyond +-100 that is +-cap.
template <class I>
typename I::V soft_capped(typename I::V x, float cap) {
    const auto one = I::set1(1), two = I::set1(2);
    const auto t = I::max(I::min(I::mul(x, I::set1(2 * LOG2E / cap)), I::set1(100)), I::set1(-100));
    return I::mul(I::set1(cap), I::sub(one, I::div(two, I::add(one, I::exp2(t, EXP2_POLY)))));
}

inline bool adjusts(const AttendArgs& a) { return a.soft_cap > 0 || a.slope; }

// What some models make of the scores of a tile, before the mask. `unit`: what the scores are multiplied by.
// Cost of a tile and row: some 40 instructions for the cap, 6 for the slope.
template <class I>
void adjust(const VisibleTile& v, const AttendArgs& a, float unit, float* s) {
    if (a.soft_cap > 0)
        for (int r = 0; r < a.rows; ++r)
            for (int t = 0; t < TILE; t += 16) {
                float* at = s + r * STRIDE + t;
                I::store(at, soft_capped<I>(I::load(at), a.soft_cap * unit));
            }
    if (!a.slope) return;
    int32_t position[TILE] = {};
    read_positions(v.tile, position);
    for (int r = 0; r < a.rows; ++r) {
        const float slope = a.slope[r] * unit;
        for (int t = 0; t < TILE; ++t)
            s[r * STRIDE + t] += slope * static_cast<float>(position[t] - a.row_position[r]);
    }
}

template <class I>
void mask(const VisibleTile& v, const RowBounds& rows, int num_rows, float* s) {
    int32_t at[TILE];
    read_positions(v.tile, at);
    for (int t = header(v.tile).count; t < TILE; ++t) at[t] = INT32_MAX;
    for (int r = 0; r < num_rows; ++r, s += STRIDE)
        for (int t = 0; t < TILE; t += 16)
            I::store(s + t, I::keep_between(I::load(s + t), at + t, rows.low[r], rows.high[r]));
}

}  // namespace
}  // namespace crush
