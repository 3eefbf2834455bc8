// Sequences made of others: compact keeps the tokens of a selection, fork shares tiles.
#include <algorithm>
#include <string>

#include "store/require.hpp"
#include "store/store.hpp"
#include "store/tokens.hpp"

namespace crush {

void Store::check_selection(const Selection& s, const std::function<int64_t(size_t)>& num_tokens) const {
    const size_t num_heads = layer_of_.size();
    require(s.num_offsets == num_heads + 1,
            "offsets must be one more than the " + std::to_string(num_heads) + " KV heads of all layers",
            s.num_offsets);
    require(s.offsets[0] == 0, "offsets must begin at 0", s.offsets[0]);
    const auto end = static_cast<int64_t>(s.num_indices);
    for (size_t h = 0; h < num_heads; ++h) {
        if (s.offsets[h + 1] < s.offsets[h] || s.offsets[h + 1] > end) {
            require(false, "offsets must ascend to the " + std::to_string(end) + " indices", s.offsets[h + 1]);
        }
    }
    require(s.offsets[num_heads] == end, "offsets must end at the number of indices, " + std::to_string(end),
            s.offsets[num_heads]);
    for (size_t h = 0; h < num_heads; ++h) {
        int64_t least = 0;
        const int64_t limit = num_tokens(h);
        for (int64_t i = s.offsets[h]; i < s.offsets[h + 1]; ++i) {
            if (s.indices[i] < least || s.indices[i] >= limit) {
                require(false,
                        "indices must ascend and be below the " + std::to_string(limit) + " tokens of head " +
                            std::to_string(h),
                        s.indices[i]);
            }
            least = static_cast<int64_t>(s.indices[i]) + 1;
        }
    }
}

namespace {

Codec lower(Codec own, Codec wanted) { return code_bits(own) > code_bits(wanted) ? wanted : own; }

// Codecs of a tile that has no more bits than wanted, in keys and in values: more would be bytes without information.
CodecPair lower(const TileLayout& l, CodecPair wanted) {
    return {lower(l.key, wanted.key), lower(l.value, wanted.value)};
}

bool has_more_bits(const TileLayout& l, CodecPair wanted) {
    return !(lower(l, wanted) == CodecPair{l.key, l.value});
}

}  // namespace

// -- compact ----------------------------------------------------------------------------------------------------------

// The new tiles of one head.
struct Store::CompactPlan {
    bool unchanged = false;
    std::vector<int64_t> tiles;  // in their new order: the old index of a kept one, -1 = a new one
    std::vector<int32_t> moved;  // old cached indices of the tokens of new tiles, 32 each
    std::vector<int32_t> order;  // old cached index of each new one
    std::vector<const TileLayout*> new_layouts;
    std::vector<uint8_t*> result;  // what `tiles` names
    size_t first_new = 0;          // number of its first new tile in the claim
    int64_t num_tokens = 0, num_target = 0;
    size_t remove = 0;  // bytes of tiles that lose their last owner
};

Store::CompactPlan Store::plan_compact(size_t h, const Head& head, const int32_t* kept, int64_t num_kept,
                                       CodecPair pair) const {
    CompactPlan plan;
    plan.num_tokens = num_kept;
    const auto target_end = head.tiles.begin() + static_cast<std::ptrdiff_t>(head.num_target);
    plan.unchanged = num_kept == head.num_tokens && std::none_of(head.tiles.begin(), target_end, [&](uint8_t* tile) {
                         return has_more_bits(layout(tile), pair);
                     });
    if (plan.unchanged) {
        plan.order.assign(kept, kept + num_kept);
        return plan;
    }
    // Whether the kept indices from i on begin with the `count` tokens of a tile. They ascend: first and last suffice.
    const auto whole = [&](const int32_t* i, const int32_t* end, int64_t tile, int64_t count) {
        return end - i >= count && i[0] == tile * TILE && i[count - 1] == tile * TILE + count - 1;
    };
    PositionReader reader(head.tiles);
    const auto add_new = [&](CodecPair codecs, const int32_t* i, int64_t count) {
        int32_t positions[TILE];
        for (int64_t t = 0; t < count; ++t) positions[t] = reader.read(i[t]);
        plan.tiles.push_back(-1);
        plan.new_layouts.push_back(&layout_for(h, codecs, must_list(positions, static_cast<int>(count))));
        plan.moved.insert(plan.moved.end(), i, i + count);
    };
    std::vector<int32_t> rewritten;
    const int32_t* const end = kept + num_kept;
    for (const int32_t* i = kept; i < end;) {
        const int64_t tile = *i / TILE;
        if (tile < head.num_target && whole(i, end, tile, TILE)) {
            const TileLayout& l = layout(head.tiles[static_cast<size_t>(tile)]);
            if (has_more_bits(l, pair)) {
                add_new(lower(l, pair), i, TILE);
            } else {
                plan.tiles.push_back(tile);
            }
            plan.order.insert(plan.order.end(), i, i + TILE);
            i += TILE;
        } else {
            rewritten.push_back(*i++);
        }
    }
    plan.num_target = std::max(static_cast<int64_t>(plan.tiles.size()), num_target_tiles(num_kept));
    plan.order.insert(plan.order.end(), rewritten.begin(), rewritten.end());

    const int32_t* const last = rewritten.data() + rewritten.size();
    for (const int32_t* i = rewritten.data(); i < last;) {
        const bool target = static_cast<int64_t>(plan.tiles.size()) < plan.num_target;
        const int64_t count = std::min<int64_t>(TILE, last - i), tile = *i / TILE;
        const bool all = count == std::min<int64_t>(TILE, head.num_tokens - tile * TILE) && whole(i, last, tile, count);
        if (all && tile >= head.num_target && (!target || pair == recent_)) {
            plan.tiles.push_back(tile);
        } else {
            add_new(target ? pair : recent_, i, count);
        }
        i += count;
    }
    std::vector<bool> stays(head.tiles.size());
    for (const int64_t tile : plan.tiles) {
        if (tile >= 0) stays[static_cast<size_t>(tile)] = true;
    }
    for (size_t t = 0; t < stays.size(); ++t) {
        if (!stays[t] && header(head.tiles[t]).refs.load() == 1) plan.remove += layout(head.tiles[t]).bytes;
    }
    return plan;
}

void Store::write_compact(const Head& head, CompactPlan& plan, const Claim& claim) const {
    if (plan.unchanged) return;
    const auto reader = std::make_unique<TokenReader>(*kernels_, head.tiles);
    const auto buffer = std::make_unique<TokenBuffer>();
    for (size_t i = 0; i < plan.moved.size(); i += TILE) {
        buffer->count = 0;
        const size_t end = std::min(plan.moved.size(), i + TILE), tile = plan.first_new + i / TILE;
        for (size_t t = i; t < end; ++t) reader->read(plan.moved[t], *buffer);
        write_tile(*kernels_, claim.tile(tile), claim.layout(tile), *buffer);
    }
    plan.result.reserve(plan.tiles.size());
    size_t next = plan.first_new;
    for (const int64_t tile : plan.tiles) {
        plan.result.push_back(tile < 0 ? claim.tile(next++) : head.tiles[static_cast<size_t>(tile)]);
    }
}

std::vector<int32_t> Store::compact(int32_t id, const Selection& selection, const Precisions* wanted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Sequence& sequence = sequence_locked(id);
    check_selection(selection, [&](size_t h) { return sequence.heads[h].num_tokens; });
    Precisions precisions = wanted ? checked(*wanted) : sequence.precisions;
    std::vector<CompactPlan> plans(sequence.heads.size());
    run_parallel(plans.size(), [&](size_t h) {
        plans[h] = plan_compact(h, sequence.heads[h], selection.indices + selection.offsets[h],
                                selection.offsets[h + 1] - selection.offsets[h], precisions[h]);
    });
    Claim claim(arena_);
    std::vector<int32_t> order;
    order.reserve(selection.num_indices);
    for (CompactPlan& plan : plans) {
        plan.first_new = claim.num_tiles();
        for (const TileLayout* layout : plan.new_layouts) claim.add(*layout);
        claim.remove_bytes(plan.remove);
        order.insert(order.end(), plan.order.begin(), plan.order.end());
    }
    grant(claim);
    run_parallel(plans.size(), [&](size_t h) { write_compact(sequence.heads[h], plans[h], claim); });
    for (size_t h = 0; h < plans.size(); ++h) {
        CompactPlan& plan = plans[h];
        if (plan.unchanged) continue;
        Head& head = sequence.heads[h];
        // A kept tile has two owners until the old list drops it.
        for (const int64_t tile : plan.tiles) {
            if (tile >= 0) header(head.tiles[static_cast<size_t>(tile)]).refs.fetch_add(1);
        }
        for (uint8_t* tile : head.tiles) drop_owner(tile);
        head.tiles.swap(plan.result);
        head.num_tokens = plan.num_tokens;
        head.num_target = plan.num_target;
    }
    sequence.precisions.swap(precisions);
    claim.commit();
    tidy();
    return order;
}

// -- fork -------------------------------------------------------------------------------------------------------------

void Store::check_prefix(const Sequence& sequence, int64_t num_tokens) const {
    for (const Head& head : sequence.heads) {
        require(num_tokens >= 0 && num_tokens <= head.num_tokens,
                "num_tokens must be in 0.." + std::to_string(head.num_tokens), num_tokens);
        PositionReader reader(head.tiles);
        for (int64_t i = 0; i < head.num_tokens; ++i) {
            const int32_t p = reader.read(i);
            require(
                p == i,
                "num_tokens must be left out for a sequence with tokens dropped: a head must hold positions 0, 1, ...",
                p);
        }
    }
}

// Gives `forked` the positions below num_tokens: full tiles are shared, a truncated one is written anew.
void Store::truncate(Sequence& forked, const Sequence& sequence, int64_t num_tokens, Claim& claim) {
    const auto num_full = static_cast<size_t>(num_tokens / TILE);
    const int rest = static_cast<int>(num_tokens % TILE);
    std::vector<size_t> cuts;  // heads with a tile to truncate
    for (size_t h = 0; h < forked.heads.size(); ++h) {
        if (rest == 0 || sequence.heads[h].num_tokens == num_tokens) continue;
        cuts.push_back(h);
        claim.add(layout_for(h, recent_, false));
    }
    grant(claim);
    run_parallel(cuts.size(), [&](size_t i) {
        const auto reader = std::make_unique<TokenReader>(*kernels_, sequence.heads[cuts[i]].tiles);
        const auto buffer = std::make_unique<TokenBuffer>();
        for (int64_t t = num_tokens - rest; t < num_tokens; ++t) reader->read(t, *buffer);
        write_tile(*kernels_, claim.tile(i), claim.layout(i), *buffer);
    });
    size_t next = 0;
    for (size_t h = 0; h < forked.heads.size(); ++h) {
        const Head& from = sequence.heads[h];
        Head& to = forked.heads[h];
        to.num_tokens = num_tokens;
        to.num_target = std::min(from.num_target, static_cast<int64_t>(num_full));
        to.tiles.reserve(num_full + 1);
        to.tiles.assign(from.tiles.begin(), from.tiles.begin() + static_cast<std::ptrdiff_t>(num_full));
        if (rest == 0) continue;
        const bool is_cut = next < cuts.size() && cuts[next] == h;
        to.tiles.push_back(is_cut ? claim.tile(next++) : from.tiles[num_full]);
    }
}

int32_t Store::fork(int32_t id, std::optional<int64_t> num_tokens) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Sequence& sequence = sequence_locked(id);
    require(sequence.staged_tokens == 0, "sequence must be committed before it is forked", id);
    auto made = std::make_unique<Sequence>();
    Sequence& forked = *made;
    Claim claim(arena_);
    forked.precisions = sequence.precisions;
    forked.capture_rows = sequence.capture_rows;
    forked.next_position = num_tokens.value_or(sequence.next_position);
    if (num_tokens) {
        check_prefix(sequence, *num_tokens);
        forked.captures.resize(sequence.captures.size());
        forked.heads.resize(sequence.heads.size());
        truncate(forked, sequence, *num_tokens, claim);
    } else {
        forked.captures = sequence.captures;
        forked.heads = sequence.heads;
        for (Head& head : forked.heads) head.tiles.resize(static_cast<size_t>((head.num_tokens + TILE - 1) / TILE));
    }
    sequences_.emplace(last_id_ + 1, std::move(made));
    for (Head& head : forked.heads) {
        for (uint8_t* tile : head.tiles) header(tile).refs.fetch_add(1);
    }
    for (size_t i = 0; i < claim.num_tiles(); ++i) header(claim.tile(i)).refs.fetch_sub(1);  // they had one owner
    claim.commit();
    return ++last_id_;
}

}  // namespace crush
