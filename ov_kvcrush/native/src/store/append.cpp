// Slots for new tokens, appending tokens, and quantizing those that have left the recent window.
#include <algorithm>
#include <climits>

#include "store/require.hpp"
#include "store/store.hpp"
#include "store/tokens.hpp"

namespace crush {
namespace {

constexpr int64_t MAX_ROWS_AT_ONCE = 1 << 24;
constexpr int64_t FEW_TOKENS = 4;  // appending no more than this is not worth waking threads or encoding a whole tile

int64_t tiles_for(int64_t num_tokens) { return (num_tokens + TILE - 1) / TILE; }

int filled(const Head& head) { return static_cast<int>(head.num_tokens % TILE); }

bool shared(const uint8_t* tile) { return header(tile).refs.load() > 1; }

// Whether the partly filled last tile of a head must list its positions to take this one.
bool needs_list(const Head& head, int64_t position) {
    const uint8_t* tile = head.tiles[static_cast<size_t>(head.num_tokens / TILE)];
    return !layout(tile).listed && !can_follow(tile, position);
}

void reserve_capacity(std::vector<uint8_t*>& tiles, size_t size) {
    if (size > tiles.capacity()) tiles.reserve(std::max(size, 2 * tiles.capacity()));
}

}  // namespace

int64_t Store::free_slots(int32_t id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Sequence& sequence = sequence_locked(id);
    int64_t slots = INT64_MAX;
    for (const Head& head : sequence.heads) {
        slots = std::min(slots, static_cast<int64_t>(head.tiles.size()) * TILE - head.num_tokens);
        if (slots == 0) return 0;
        if (filled(head) == 0) continue;
        if (shared(head.tiles[static_cast<size_t>(head.num_tokens / TILE)])) return 0;
        if (needs_list(head, sequence.next_position)) return 0;
    }
    return slots;
}

bool Store::reserve(int32_t id, int64_t num_tokens, size_t promised) {
    require(num_tokens >= 0 && num_tokens <= MAX_ROWS_AT_ONCE, "num_tokens must be in 0..16777216", num_tokens);
    const std::lock_guard<std::mutex> lock(mutex_);
    Sequence& sequence = sequence_locked(id);
    return reserve_heads(sequence, 0, sequence.heads.size(), num_tokens, sequence.next_position, promised);
}

bool Store::reserve_heads(Sequence& sequence, size_t begin, size_t end, int64_t num_tokens, int64_t position,
                          size_t promised) {
    if (num_tokens == 0) return true;
    size_t add = 0, remove = 0;
    std::vector<NewTile> new_tiles;
    for (size_t h = begin; h < end; ++h) {
        Head& head = sequence.heads[h];
        const auto last = static_cast<size_t>(head.num_tokens / TILE);
        if (filled(head)) {
            const uint8_t* tile = head.tiles[last];
            const bool list = needs_list(head, position);
            if (list || shared(tile)) {
                const TileLayout& to = new_layout(h, false, list || layout(tile).listed);
                new_tiles.push_back({&head, last, &to, nullptr});
                add += to.bytes;
                if (!shared(tile)) remove += layout(tile).bytes;
            }
        }
        const auto needed = static_cast<size_t>(tiles_for(head.num_tokens + num_tokens));
        if (needed > head.tiles.size()) add += (needed - head.tiles.size()) * new_layout(h, false, false).bytes;
    }
    if (!arena_.claim(add, remove, promised)) return false;
    try {
        for (size_t h = begin; h < end; ++h) {
            Head& head = sequence.heads[h];
            const auto needed = static_cast<size_t>(tiles_for(head.num_tokens + num_tokens));
            reserve_capacity(head.tiles, needed);
            for (size_t i = head.tiles.size(); i < needed; ++i) {
                new_tiles.push_back({&head, i, &new_layout(h, false, false), nullptr});
            }
        }
        for (NewTile& added : new_tiles) added.tile = arena_.allocate(added.layout->bytes);
    } catch (...) {
        for (const NewTile& added : new_tiles) {
            if (added.tile) arena_.free(added.tile, added.layout->bytes);
        }
        arena_.unclaim(add, remove);
        throw;
    }
    for (const NewTile& added : new_tiles) {
        std::vector<uint8_t*>& tiles = added.head->tiles;
        if (added.index == tiles.size()) {
            make_empty(added.tile, *added.layout);
            tiles.push_back(added.tile);
        } else {
            copy_tile(added.tile, *added.layout, tiles[added.index]);
            drop_owner(tiles[added.index]);
            tiles[added.index] = added.tile;
        }
    }
    return true;
}

void Store::append(int32_t id, size_t layer, const float* k, const float* v, int64_t n, int64_t first_position) {
    require(layer < layouts_.size(), "layer must be below " + std::to_string(layouts_.size()), layer);
    require(first_position >= 0 && first_position <= INT_MAX, "first_position must be at least 0", first_position);
    const std::lock_guard<std::mutex> lock(mutex_);
    append_locked(sequence_locked(id), layer, k, v, n, static_cast<int32_t>(first_position));
}

void Store::append_locked(Sequence& sequence, size_t layer, const float* k, const float* v, int64_t n,
                          int32_t first_position) {
    if (n == 0) return;
    require(n > 0 && n <= MAX_ROWS_AT_ONCE, "rows must be at least 0", n);
    require(sequence.staged_tokens == 0, "sequence must be committed before it takes other tokens",
            sequence.staged_tokens);
    require(first_position >= 0 && first_position <= INT_MAX - n, "first_position must be at least 0", first_position);
    const size_t begin = first_head_[layer], end = first_head_[layer + 1];
    bool list = false;
    for (size_t h = begin; h < end; ++h) {
        const Head& head = sequence.heads[h];
        const bool room = static_cast<int64_t>(head.tiles.size()) * TILE - head.num_tokens >= n;
        if (!room || (filled(head) && shared(head.tiles[static_cast<size_t>(head.num_tokens / TILE)]))) {
            throw std::logic_error("append must follow a reserve of as many tokens, got " + std::to_string(n));
        }
        list = list || (filled(head) && needs_list(head, first_position));
    }
    if (list && !reserve_heads(sequence, begin, end, n, first_position, 0)) {
        throw StoreFull("max_bytes must leave room for tiles that list their positions, got " +
                        std::to_string(config_.max_bytes) + " with " + std::to_string(arena_.used()) + " in use");
    }
    const auto width = static_cast<size_t>(config_.layers[layer].head_size);
    const size_t stride = width * (end - begin);
    const auto task = [&](size_t i) {
        append_head(sequence.heads[begin + i], k + i * width, v + i * width, stride, n, first_position);
    };
    if (n <= FEW_TOKENS) {
        for (size_t i = 0; i < end - begin; ++i) task(i);
    } else {
        run_parallel(end - begin, task);
    }
    sequence.next_position = std::max<int64_t>(sequence.next_position, first_position + n);
}

void Store::append_head(Head& head, const float* k, const float* v, size_t stride, int64_t n,
                        int32_t first_position) const {
    for (int64_t i = 0; i < n;) {
        const int slot = filled(head);
        const auto count = static_cast<int>(std::min<int64_t>(TILE - slot, n - i));
        uint8_t* tile = head.tiles[static_cast<size_t>(head.num_tokens / TILE)];
        const float *first_k = k + static_cast<size_t>(i) * stride, *first_v = v + static_cast<size_t>(i) * stride;
        for (int t = 0; t < count; ++t) set_position(tile, slot + t, first_position + static_cast<int32_t>(i) + t);
        header(tile).count = slot + count;
        if (slot == 0 && count > FEW_TOKENS) {
            kernels_->encode(tile, first_k, stride, first_v, stride, count);
        } else {
            for (int t = 0; t < count; ++t) {
                const size_t row = static_cast<size_t>(t) * stride;
                kernels_->append_token(tile, slot + t, first_k + row, first_v + row);
            }
        }
        head.num_tokens += count;
        i += count;
    }
}

void Store::quantize_aged(int32_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Sequence& sequence = sequence_locked(id);
    std::vector<size_t> due;  // heads with tiles to quantize
    for (size_t h = 0; h < sequence.heads.size(); ++h) {
        Head& head = sequence.heads[h];
        const int64_t num_tiles = num_target_tiles(head.num_tokens);
        if (num_tiles <= head.num_target) continue;
        if (same_codecs_) {
            head.num_target = num_tiles;
        } else {
            due.push_back(h);
        }
    }
    const auto task = [&](size_t i) {
        Head& head = sequence.heads[due[i]];
        quantize_aged_head(due[i], head, num_target_tiles(head.num_tokens));
    };
    if (!due.empty()) run_parallel(due.size(), task);
}

void Store::quantize_aged_head(size_t h, Head& head, int64_t num_tiles) {
    const auto reader = std::make_unique<TokenReader>(*kernels_, head.tiles);
    const auto buffer = std::make_unique<TokenBuffer>();
    while (head.num_target < num_tiles) {
        uint8_t*& tile = head.tiles[static_cast<size_t>(head.num_target)];
        buffer->count = 0;
        for (int t = 0; t < TILE; ++t) reader->read(head.num_target * TILE + t, *buffer);
        const TileLayout& to = new_layout(h, true, must_list(buffer->positions, TILE));
        const size_t remove = shared(tile) ? 0 : layout(tile).bytes;
        if (!arena_.claim(to.bytes, remove)) return;
        try {
            uint8_t* quantized = arena_.allocate(to.bytes);
            write_tile(*kernels_, quantized, to, *buffer);
            drop_owner(tile);
            tile = quantized;
        } catch (const std::bad_alloc&) {
            arena_.unclaim(to.bytes, remove);
            return;
        }
        ++head.num_target;
    }
}

}  // namespace crush
