// Sequences made of others: compact keeps the tokens of a selection, fork shares tiles.
#include <algorithm>
#include <numeric>
#include <string>

#include "store/recall.hpp"
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

struct Store::TokenRows {
    size_t width;
    float *k, *v;  // [tokens, width]; v may be null, and positions are then
    int32_t* positions;
};

struct Store::Kept {
    const int32_t *begin, *end;   // cached indices, ascending
    const uint8_t* tiers;         // of each; null: all are in tier 0
    const CodecPair* precisions;  // [tiers]

    int64_t size() const { return end - begin; }
    uint8_t tier(const int32_t* i) const { return tiers ? tiers[i - begin] : 0; }
    // Whether the tokens from i on begin with the 32 of a tile, all of one tier.
    bool has_tile(const int32_t* i, int64_t tile) const {
        if (end - i < TILE || i[0] != tile * TILE || i[TILE - 1] != tile * TILE + TILE - 1) return false;
        for (int t = 1; tiers && t < TILE; ++t) {
            if (tier(i + t) != tier(i)) return false;
        }
        return true;
    }
};

// Plans a tile of these tokens.
void Store::plan_new(size_t h, CodecPair pair, const MovedToken* tokens, int64_t count, CompactPlan& plan) const {
    int32_t positions[TILE];
    for (int64_t t = 0; t < count; ++t) {
        positions[t] = tokens[t].position;
        plan.moved.push_back(tokens[t].index);
    }
    plan.tiles.push_back(-1);
    plan.new_layouts.push_back(&layout_for(h, pair, must_list(positions, static_cast<int>(count))));
}

Store::CompactPlan Store::plan_compact(size_t h, const Head& head, const Kept& kept) const {
    CompactPlan plan;
    plan.num_tokens = kept.size();
    plan.unchanged = kept.size() == head.num_tokens;
    PositionReader reader(head.tiles);
    std::vector<MovedToken> others;  // those of no whole tile
    for (const int32_t* i = kept.begin; i < kept.end;) {
        const int64_t tile = *i / TILE;
        const bool target = tile < head.num_target, whole = target && kept.has_tile(i, tile);
        plan.unchanged = plan.unchanged && target == whole;
        if (!whole) {
            others.push_back({*i, reader.read(*i), kept.tier(i)});
            ++i;
            continue;
        }
        const TileLayout& l = layout(head.tiles[static_cast<size_t>(tile)]);
        const CodecPair wanted = kept.precisions[kept.tier(i)];
        if (has_more_bits(l, wanted)) {
            MovedToken tokens[TILE];
            for (int t = 0; t < TILE; ++t) tokens[t] = {i[t], reader.read(i[t]), 0};
            plan_new(h, lower(l, wanted), tokens, TILE, plan);
            plan.unchanged = false;
        } else {
            plan.tiles.push_back(tile);
        }
        plan.order.insert(plan.order.end(), i, i + TILE);
        i += TILE;
    }
    if (plan.unchanged) {
        plan.order.assign(kept.begin, kept.end);
        return plan;
    }
    const auto num_whole = static_cast<int64_t>(plan.tiles.size());
    plan.num_target = std::max(num_whole, num_target_tiles(kept.size()));
    const int64_t num_new = plan.num_target - num_whole;
    const bool group = groups(h, kept.size());
    if (kept.tiers || group) arrange(others, num_new);
    if (group) group_tokens(h, head, others, num_new);

    const MovedToken* const last = others.data() + others.size();
    for (const MovedToken* i = others.data(); i < last;) {
        const bool target = static_cast<int64_t>(plan.tiles.size()) < plan.num_target;
        const int64_t count = std::min<int64_t>(TILE, last - i), tile = i->index / TILE;
        const CodecPair pair = target ? kept.precisions[best_tier(i, count)] : recent_;
        // A recent tile may stay one, as it is.
        bool stays = pair == recent_ && tile >= head.num_target &&
                     count == std::min<int64_t>(TILE, head.num_tokens - tile * TILE);
        for (int64_t t = 0; stays && t < count; ++t) stays = i[t].index == tile * TILE + t;
        if (stays) {
            plan.tiles.push_back(tile);
        } else {
            plan_new(h, pair, i, count, plan);
        }
        for (int64_t t = 0; t < count; ++t) plan.order.push_back(i[t].index);
        i += count;
    }
    std::vector<bool> stay(head.tiles.size());
    for (const int64_t tile : plan.tiles) {
        if (tile >= 0) stay[static_cast<size_t>(tile)] = true;
    }
    for (size_t t = 0; t < stay.size(); ++t) {
        if (!stay[t] && header(head.tiles[t]).refs.load() == 1) plan.remove += layout(head.tiles[t]).bytes;
    }
    return plan;
}

// Reads tokens in any order, each tile once.
void Store::read_tokens(const Head& head, const std::vector<int32_t>& indices, TokenRows& to) const {
    std::vector<size_t> order(indices.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return indices[a] < indices[b]; });
    const auto reader = std::make_unique<TokenReader>(*kernels_, head.tiles);
    const auto buffer = std::make_unique<TokenBuffer>();
    for (const size_t i : order) {
        buffer->count = 0;
        reader->read(indices[i], *buffer);
        std::copy_n(buffer->k, to.width, to.k + i * to.width);
        if (!to.v) continue;
        std::copy_n(buffer->v, to.width, to.v + i * to.width);
        to.positions[i] = buffer->positions[0];
    }
}

void Store::group_tokens(size_t h, const Head& head, std::vector<MovedToken>& tokens, int64_t num_tiles) const {
    group_tiles(tokens, num_tiles, head_size(h), [&](const std::vector<MovedToken>& run, float* to) {
        std::vector<int32_t> indices;
        for (const MovedToken& token : run) indices.push_back(token.index);
        TokenRows rows{head_size(h), to, nullptr, nullptr};
        read_tokens(head, indices, rows);
    });
}

std::vector<int32_t> Store::grouped_order(size_t h, const Head& head, int64_t begin, int64_t end) const {
    PositionReader reader(head.tiles);
    std::vector<MovedToken> tokens;
    for (int64_t i = begin * TILE; i < end * TILE; ++i) tokens.push_back({static_cast<int32_t>(i), reader.read(i), 0});
    group_tokens(h, head, tokens, end - begin);
    std::vector<int32_t> order;
    for (const MovedToken& token : tokens) order.push_back(token.index);
    return order;
}

void Store::write_compact(const Head& head, CompactPlan& plan, const Claim& claim) const {
    if (plan.unchanged) return;
    const auto reader = std::make_unique<TokenReader>(*kernels_, head.tiles);
    const auto buffer = std::make_unique<TokenBuffer>();
    // Where tiles take tokens from all over the old ones, these are decoded once, not for each token.
    const bool scattered = !plan.moved.empty() && !std::is_sorted(plan.moved.begin(), plan.moved.end());
    const size_t width = scattered ? static_cast<size_t>(layout(head.tiles[0]).head_size) : 0;
    std::vector<float> k(plan.moved.size() * width), v(k.size());
    std::vector<int32_t> positions(scattered ? plan.moved.size() : 0);
    if (scattered) {
        TokenRows rows{width, k.data(), v.data(), positions.data()};
        read_tokens(head, plan.moved, rows);
    }
    for (size_t i = 0; i < plan.moved.size(); i += TILE) {
        buffer->count = 0;
        const size_t end = std::min(plan.moved.size(), i + TILE), tile = plan.first_new + i / TILE;
        for (size_t t = i; t < end && !scattered; ++t) reader->read(plan.moved[t], *buffer);
        if (scattered) {
            buffer->count = static_cast<int>(end - i);
            std::copy(k.begin() + i * width, k.begin() + end * width, buffer->k);
            std::copy(v.begin() + i * width, v.begin() + end * width, buffer->v);
            std::copy(positions.begin() + i, positions.begin() + end, buffer->positions);
        }
        write_tile(*kernels_, claim.tile(tile), claim.layout(tile), *buffer);
    }
    plan.result.reserve(plan.tiles.size());
    size_t next = plan.first_new;
    for (const int64_t tile : plan.tiles) {
        plan.result.push_back(tile < 0 ? claim.tile(next++) : head.tiles[static_cast<size_t>(tile)]);
    }
}

std::vector<int32_t> Store::compact(int32_t id, const Selection& selection, const Wanted* given) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return compact_locked(sequence_locked(id), selection, given);
}

std::vector<int32_t> Store::compact_locked(Sequence& sequence, const Selection& selection, const Wanted* given) {
    check_selection(selection, [&](size_t h) { return sequence.heads[h].num_tokens; });
    const Wanted wanted = wanted_of(sequence, given, selection.num_indices);
    Precisions precisions = wanted.best();
    std::vector<CompactPlan> plans(sequence.heads.size());
    run_parallel(plans.size(), [&](size_t h) {
        const int64_t begin = selection.offsets[h];
        plans[h] = plan_compact(h, sequence.heads[h],
                                {selection.indices + begin, selection.indices + selection.offsets[h + 1],
                                 wanted.tiers ? wanted.tiers + begin : nullptr, wanted.of_head(h)});
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

bool Store::check_prefix(const Sequence& sequence, int64_t num_tokens) const {
    bool ascend = true;
    for (const Head& head : sequence.heads) {
        require(num_tokens >= 0 && num_tokens <= head.num_tokens,
                "num_tokens must be in 0.." + std::to_string(head.num_tokens), num_tokens);
        PositionReader reader(head.tiles);
        std::vector<bool> seen(static_cast<size_t>(head.num_tokens));
        for (int64_t i = 0; i < head.num_tokens; ++i) {
            const int32_t p = reader.read(i);
            const bool is_next = p == i, is_new = p < head.num_tokens && !seen[static_cast<size_t>(p)];
            require(
                config_.recall.is_on() ? is_new : is_next,
                "num_tokens must be left out for a sequence with tokens dropped: a head must hold positions 0, 1, ...",
                p);
            seen[static_cast<size_t>(p)] = true;
            ascend = ascend && is_next;
        }
    }
    return ascend;
}

// The same where tokens are grouped: those that stay are compacted, since few tiles hold none of the others.
void Store::truncate_grouped(Sequence& forked, int64_t num_tokens) {
    std::vector<int64_t> offsets{0};
    std::vector<int32_t> indices;
    for (const Head& head : forked.heads) {
        PositionReader reader(head.tiles);
        for (int64_t i = 0; i < head.num_tokens; ++i) {
            if (reader.read(i) < num_tokens) indices.push_back(static_cast<int32_t>(i));
        }
        offsets.push_back(static_cast<int64_t>(indices.size()));
    }
    compact_locked(forked, {offsets.data(), offsets.size(), indices.data(), indices.size()});
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
    const bool is_grouped = num_tokens && !check_prefix(sequence, *num_tokens);
    if (num_tokens) forked.captures.resize(sequence.captures.size());
    if (num_tokens && !is_grouped) {
        forked.heads.resize(sequence.heads.size());
        truncate(forked, sequence, *num_tokens, claim);
    } else {
        if (!num_tokens) forked.captures = sequence.captures;
        forked.heads = sequence.heads;
        for (Head& head : forked.heads) head.tiles.resize(static_cast<size_t>((head.num_tokens + TILE - 1) / TILE));
    }
    sequences_.emplace(last_id_ + 1, std::move(made));
    for (Head& head : forked.heads) {
        for (uint8_t* tile : head.tiles) header(tile).refs.fetch_add(1);
    }
    for (size_t i = 0; i < claim.num_tiles(); ++i) header(claim.tile(i)).refs.fetch_sub(1);  // they had one owner
    claim.commit();
    ++last_id_;
    if (is_grouped) {
        try {
            truncate_grouped(forked, *num_tokens);
        } catch (...) {
            release_locked(last_id_);
            throw;
        }
    }
    return last_id_;
}

}  // namespace crush
