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
    for (const std::shared_ptr<Capture>& ring : sequence.captures) {
        const int64_t rows = ring ? static_cast<int64_t>(ring->position.size()) : 0;
        if (ring.use_count() > 1) return 0;
        if (rows < sequence.capture_rows) slots = std::min(slots, rows - (ring ? ring->seen : 0));
    }
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
    Rings rings = num_tokens ? larger_rings(sequence, 0, layouts_.size(), num_tokens) : Rings{};
    Claim claim(arena_);
    claim.add_bytes(rings.add);
    claim.remove_bytes(rings.remove);
    if (!reserve_heads(sequence, 0, sequence.heads.size(), num_tokens, sequence.next_position, claim, promised)) {
        return false;
    }
    take_rings(sequence, 0, rings);
    return true;
}

bool Store::reserve_heads(Sequence& sequence, size_t begin, size_t end, int64_t num_tokens, int64_t position,
                          Claim& claim, size_t promised) {
    if (num_tokens == 0) return true;
    struct Place {  // of a new tile; it may replace one that is there
        size_t head, index;
    };
    std::vector<Place> places;
    for (size_t h = begin; h < end; ++h) {
        Head& head = sequence.heads[h];
        const auto last = static_cast<size_t>(head.num_tokens / TILE);
        if (filled(head)) {
            const uint8_t* tile = head.tiles[last];
            const bool list = needs_list(head, position);
            if (list || shared(tile)) {
                places.push_back({h, last});
                claim.add(layout_for(h, recent_, list || layout(tile).listed));
                if (!shared(tile)) claim.remove_bytes(layout(tile).bytes);
            }
        }
        const auto needed = static_cast<size_t>(tiles_for(head.num_tokens + num_tokens));
        for (size_t i = head.tiles.size(); i < needed; ++i) {
            places.push_back({h, i});
            claim.add(layout_for(h, recent_, false));
        }
    }
    if (!try_grant(claim, promised)) return false;
    for (size_t h = begin; h < end; ++h) {
        reserve_capacity(sequence.heads[h].tiles,
                         static_cast<size_t>(tiles_for(sequence.heads[h].num_tokens + num_tokens)));
    }
    for (size_t i = 0; i < places.size(); ++i) {
        std::vector<uint8_t*>& tiles = sequence.heads[places[i].head].tiles;
        const size_t index = places[i].index;
        if (index == tiles.size()) {
            make_empty(claim.tile(i), claim.layout(i));
            tiles.push_back(claim.tile(i));
        } else {
            copy_tile(claim.tile(i), claim.layout(i), tiles[index]);
            drop_owner(tiles[index]);
            tiles[index] = claim.tile(i);
        }
    }
    claim.commit();
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
    Claim claim(arena_);
    if (list && !reserve_heads(sequence, begin, end, n, first_position, claim, 0)) {
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
        std::vector<uint8_t> done(end - begin);
        try {
            run_parallel(end - begin, [&](size_t i) {
                task(i);
                done[i] = 1;
            });
        } catch (const std::bad_alloc&) {
            // Sharing out the tasks takes memory, they take none: a layer has its rows in all heads or in none.
            for (size_t i = 0; i < done.size(); ++i) {
                if (!done[i]) task(i);
            }
        }
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
        if (slot + count == TILE) kernels_->write_mean(tile);
        head.num_tokens += count;
        i += count;
    }
}

void Store::quantize_aged(int32_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Sequence& sequence = sequence_locked(id);
    try {
        quantize_aged_locked(sequence);
    } catch (const std::exception&) {
        // Nothing has changed: those tiles wait for the next call.
    }
    tidy();
}

void Store::quantize_aged_locked(Sequence& sequence) {
    struct Due {
        size_t head, index;
        std::vector<int32_t> tokens;  // cached indices; none: those of this tile, in their order
    };
    std::vector<Due> due;
    Claim claim(arena_);
    for (size_t h = 0; h < sequence.heads.size(); ++h) {
        Head& head = sequence.heads[h];
        const int64_t num_tiles = num_target_tiles(head.num_tokens);
        const CodecPair target = sequence.precisions[h];
        if (target == recent_) head.num_target = std::max(head.num_target, num_tiles);
        // Several at once are rows of a text that goes on: they are grouped among themselves, if all of them fit.
        if (num_tiles - head.num_target > 1 && groups(h, head.num_tokens)) {
            const std::vector<int32_t> order = grouped_order(h, head, head.num_target, num_tiles);
            std::vector<const TileLayout*> layouts;
            size_t add = 0, freed = 0;
            PositionReader reader(head.tiles);
            for (size_t i = 0; i < order.size(); i += TILE) {
                int32_t positions[TILE];
                for (size_t t = 0; t < TILE; ++t) positions[t] = reader.read(order[i + t]);
                layouts.push_back(&layout_for(h, target, must_list(positions, TILE)));
                add += layouts.back()->bytes;
                const uint8_t* tile = head.tiles[static_cast<size_t>(head.num_target) + i / TILE];
                freed += shared(tile) ? 0 : layout(tile).bytes;
            }
            if (arena_.fits(claim.added() + add, claim.removed() + freed)) {
                for (size_t i = 0; i < layouts.size(); ++i) {
                    const auto from = order.begin() + static_cast<std::ptrdiff_t>(i * TILE);
                    due.push_back({h, static_cast<size_t>(head.num_target) + i, {from, from + TILE}});
                    claim.add(*layouts[i]);
                }
                claim.remove_bytes(freed);
                continue;
            }
        }
        for (int64_t i = head.num_target; i < num_tiles; ++i) {
            const uint8_t* tile = head.tiles[static_cast<size_t>(i)];
            int32_t positions[TILE];
            read_positions(tile, positions);
            const TileLayout& to = layout_for(h, target, must_list(positions, TILE));
            const size_t freed = shared(tile) ? 0 : layout(tile).bytes;
            if (!arena_.fits(claim.added() + to.bytes, claim.removed() + freed)) break;
            due.push_back({h, static_cast<size_t>(i), {}});
            claim.add(to);
            claim.remove_bytes(freed);
        }
    }
    if (due.empty() || !try_grant(claim)) return;
    run_parallel(due.size(), [&](size_t i) {
        const auto reader = std::make_unique<TokenReader>(*kernels_, sequence.heads[due[i].head].tiles);
        const auto buffer = std::make_unique<TokenBuffer>();
        for (size_t t = 0; t < TILE; ++t)
            reader->read(due[i].tokens.empty() ? static_cast<int64_t>(due[i].index * TILE + t) : due[i].tokens[t],
                         *buffer);
        write_tile(*kernels_, claim.tile(i), claim.layout(i), *buffer);
    });
    for (size_t i = 0; i < due.size(); ++i) {
        Head& head = sequence.heads[due[i].head];
        drop_owner(head.tiles[due[i].index]);
        head.tiles[due[i].index] = claim.tile(i);
        ++head.num_target;
    }
    claim.commit();
}

}  // namespace crush
