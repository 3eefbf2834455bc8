// Recall: decode steps read the tiles whose mean keys their queries are closest to, and sinks and the recent window.
#include "store/recall.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/half.hpp"
#include "store/clusters.hpp"
#include "store/require.hpp"
#include "store/store.hpp"

namespace crush {
namespace {

constexpr size_t FEW_TILES = 512;  // ranking no more of them is not worth waking threads
constexpr size_t AHEAD = 12;       // tiles

bool is_sink(const uint8_t* tile) { return header(tile).min_position < SINK_TOKENS; }

void prefetch(const uint8_t* tile, size_t bytes) {
    for (size_t at = 0; at < bytes; at += ALIGNMENT) __builtin_prefetch(tile + at, 0, 2);
}

}  // namespace

void group_tiles(std::vector<MovedToken>& tokens, int64_t num_tiles, size_t size, const ReadKeys& read) {
    const auto tile = [&](int64_t i) { return tokens.data() + i * TILE; };
    const auto stays = [&](int64_t i) {
        return std::any_of(tile(i), tile(i + 1), [](const MovedToken& t) { return t.position < SINK_TOKENS; });
    };
    for (int64_t begin = 0, end; begin < num_tiles; begin = end) {
        end = begin + 1;
        if (stays(begin)) continue;
        const uint8_t tier = best_tier(tile(begin), TILE);
        while (end < num_tiles && !stays(end) && best_tier(tile(end), TILE) == tier) ++end;
        if (end == begin + 1) continue;
        // In the order of the text, so that tokens of a tile are.
        std::sort(tile(begin), tile(end), [](const MovedToken& a, const MovedToken& b) {
            return a.position != b.position ? a.position < b.position : a.index < b.index;
        });
        const std::vector<MovedToken> run(tile(begin), tile(end));
        std::vector<float> keys(run.size() * size);
        read(run, keys.data());
        const std::vector<int32_t> order = cluster(keys.data(), run.size(), size);
        for (size_t i = 0; i < order.size(); ++i) tile(begin)[i] = run[static_cast<size_t>(order[i])];
    }
}

int64_t RecallConfig::num_tiles(int64_t num_tokens) const {
    const double wanted = tokens ? static_cast<double>(tokens) : std::ceil(fraction * static_cast<double>(num_tokens));
    return (static_cast<int64_t>(wanted) + TILE - 1) / TILE;
}

bool Store::groups(size_t head, int64_t num_tokens) const {
    // A tile of a sliding window is left with its last token: there they stay in the order of the text.
    return config_.recall.is_on() && config_.layers[layer_of_[head]].window == 0 &&
           num_target_tiles(num_tokens) - 1 > config_.recall.num_tiles(num_tokens);
}

// A head's tiles before its recent window, ranked for a few rows. Tiles count by the mean, over rows and query heads,
// of softmax(q . mean key): logits of different heads are not on one scale.
std::vector<int32_t> Store::recalled(const RowSpan& span, size_t h, const float* q) const {
    const Head& head = span.sequence->heads[h];
    const LayerShape& shape = config_.layers[layer_of_[h]];
    const int64_t before_recent = num_target_tiles(head.num_tokens), most = config_.recall.num_tiles(head.num_tokens);
    if (before_recent <= most) return {};
    const auto num_all = static_cast<size_t>((head.num_tokens + TILE - 1) / TILE);
    const auto size = static_cast<size_t>(shape.head_size);
    const int64_t low = shape.window > 0 ? int64_t{span.first_position} - shape.window : -1;

    std::vector<int32_t> chosen, asked;
    std::vector<const uint8_t*> tiles;
    asked.reserve(static_cast<size_t>(before_recent));
    tiles.reserve(static_cast<size_t>(before_recent));
    for (size_t i = 0; i < static_cast<size_t>(before_recent); ++i) {
        if (i + AHEAD < static_cast<size_t>(before_recent))
            prefetch(head.tiles[i + AHEAD], sizeof(TileHeader) + 2 * size);
        const uint8_t* tile = head.tiles[i];
        if (header(tile).max_position <= low) continue;  // no row sees it
        if (is_sink(tile)) {
            chosen.push_back(static_cast<int32_t>(i));
        } else {
            asked.push_back(static_cast<int32_t>(i));
            tiles.push_back(tile);
        }
    }
    const auto num_read = static_cast<size_t>(most);
    if (tiles.size() <= num_read) return {};

    const auto group = static_cast<size_t>(shape.num_heads / shape.num_kv_heads), num_rows = span.num_rows * group;
    const size_t first = (h - first_head_[layer_of_[h]]) * group, stride = static_cast<size_t>(shape.num_heads) * size;
    std::vector<float> rows(MAX_ROWS * size), scores(MAX_ROWS * tiles.size()), weight(tiles.size());
    for (size_t from = 0; from < num_rows; from += MAX_ROWS) {
        const size_t n = std::min<size_t>(MAX_ROWS, num_rows - from);
        for (size_t r = 0; r < n; ++r) {
            const size_t row = span.row_begin + (from + r) / group, of = first + (from + r) % group;
            for (size_t c = 0; c < size; ++c) rows[r * size + c] = q[row * stride + of * size + c] * shape.scale;
        }
        kernels_->rank(tiles.data(), tiles.size(), rows.data(), static_cast<int>(n), scores.data(), tiles.size());
        for (size_t r = 0; r < n; ++r) {
            float* s = scores.data() + r * tiles.size();
            kernels_->softmax(s, tiles.size());
            for (size_t i = 0; i < tiles.size(); ++i) weight[i] += s[i];
        }
    }
    std::vector<int32_t> best(tiles.size());
    std::iota(best.begin(), best.end(), 0);
    std::nth_element(best.begin(), best.begin() + most, best.end(), [&](int32_t a, int32_t b) {
        const float x = weight[static_cast<size_t>(a)], y = weight[static_cast<size_t>(b)];
        return x != y ? x > y : a > b;  // of equal ones the later
    });
    for (size_t i = 0; i < num_read; ++i) chosen.push_back(asked[static_cast<size_t>(best[i])]);
    for (size_t i = static_cast<size_t>(before_recent); i < num_all; ++i) chosen.push_back(static_cast<int32_t>(i));
    std::sort(chosen.begin(), chosen.end());
    return chosen;
}

std::vector<std::vector<int32_t>> Store::recalled_locked(const RowSpan& span, size_t layer, const float* q) const {
    std::vector<std::vector<int32_t>> chosen(first_head_[layer + 1] - first_head_[layer]);
    if (!config_.recall.is_on() || span.num_rows > RECALL_ROWS) return chosen;
    for (size_t i = 0; i < chosen.size(); ++i) chosen[i] = recalled(span, first_head_[layer] + i, q);
    return chosen;
}

void Store::attend_locked(size_t layer, const std::vector<RowSpan>& spans, const float* q, float* out,
                          int num_threads) const {
    const size_t num_heads = first_head_[layer + 1] - first_head_[layer];
    std::vector<std::vector<HeadView>> views;
    std::vector<AttendSpan> attend_spans;
    size_t to_rank = 0;
    for (const RowSpan& span : spans) {
        views.push_back(views_locked(*span.sequence, layer));
        attend_spans.push_back({views.back().data(), span.row_begin, span.num_rows, span.first_position});
        if (!config_.recall.is_on() || span.num_rows > RECALL_ROWS) continue;
        for (const HeadView& view : views.back()) to_rank += view.num_tiles;
    }
    std::vector<std::vector<const uint8_t*>> read;
    if (to_rank) {
        // A request's tiles depend on its own rows only: it gives the same bits alone and in a batch.
        read.resize(spans.size() * num_heads);
        const auto task = [&](size_t i) {
            const RowSpan& span = spans[i / num_heads];
            if (span.num_rows > RECALL_ROWS) return;
            HeadView& view = views[i / num_heads][i % num_heads];
            for (const int32_t tile : recalled(span, first_head_[layer] + i % num_heads, q))
                read[i].push_back(view.tiles[static_cast<size_t>(tile)]);
            if (!read[i].empty()) view = {read[i].data(), read[i].size()};
        };
        if (to_rank <= FEW_TILES || num_threads <= 1) {
            for (size_t i = 0; i < read.size(); ++i) task(i);
        } else {
            run_parallel(read.size(), task);
        }
    }
    attend(*kernels_, config_.layers[layer], attend_spans, q, out, num_threads, parallel_);
}

std::vector<float> Store::means(int32_t id, size_t layer, size_t head) const {
    require(config_.recall.is_on(), "recall_tokens must be given for tiles to have means", 0);
    const std::lock_guard<std::mutex> lock(mutex_);
    const Head& h = sequence_locked(id).heads[check_head(layer, head)];
    std::vector<float> means;
    for (int64_t i = 0; i < num_target_tiles(h.num_tokens); ++i) {
        const uint8_t* tile = h.tiles[static_cast<size_t>(i)];
        for (int c = 0; c < config_.layers[layer].head_size; ++c) {
            uint16_t bits;
            std::memcpy(&bits, tile + crush::layout(tile).mean + 2 * c, sizeof(bits));
            means.push_back(float_of_half(bits));
        }
    }
    return means;
}

}  // namespace crush
