// Prompts in staging blocks: attention scores over their keys, and their commit into the store.
#include <algorithm>
#include <climits>
#include <cstring>

#include "kernels/half.hpp"
#include "store/recall.hpp"
#include "store/require.hpp"
#include "store/store.hpp"
#include "store/tokens.hpp"

namespace crush {
namespace {

// n numbers at `from`, which need not be aligned, as float32.
void widen(Codec codec, const uint8_t* from, size_t n, float* to) {
    if (codec == Codec::f32) {
        std::memcpy(to, from, n * sizeof(float));
        return;
    }
    for (size_t i = 0; i < n; ++i) {
        uint16_t x;
        std::memcpy(&x, from + 2 * i, sizeof(x));
        to[i] = codec == Codec::bf16 ? float_of_bits(static_cast<uint32_t>(x) << 16) : float_of_half(x);
    }
}

// [count, D] numbers to [D, 32], zero beyond count.
template <class Number>
void transpose(const uint8_t* from, int count, int width, uint8_t* to) {
    auto* codes = reinterpret_cast<Number*>(to);
    std::vector<Number> rows(static_cast<size_t>(TILE) * static_cast<size_t>(width));
    std::memcpy(rows.data(), from, static_cast<size_t>(count) * static_cast<size_t>(width) * sizeof(Number));
    for (int c = 0; c < width; ++c) {
        for (int t = 0; t < TILE; ++t) codes[c * TILE + t] = rows[static_cast<size_t>(t * width + c)];
    }
}

TileLayout keys_only(Codec codec, int head_size) {
    TileLayout l = make_layout(codec, codec, head_size, 16, false);
    l.bytes = l.value_codes;
    return l;
}

}  // namespace

void Store::set_staging(size_t layer, Staging staging) {
    require(layer < layouts_.size(), "layer must be below " + std::to_string(layouts_.size()), layer);
    require(!is_quantised(staging.codec), "precision must be f32, bf16 or f16", code_bits(staging.codec));
    require(staging.num_blocks <= INT_MAX, "num_blocks must be below 2147483648", staging.num_blocks);
    const std::lock_guard<std::mutex> lock(mutex_);
    layouts_[layer].staging = staging;
    layouts_[layer].staged_keys = keys_only(staging.codec, config_.layers[layer].head_size);
    layouts_[layer].staged = make_layout(staging.codec, staging.codec, config_.layers[layer].head_size, 16, false);
}

void Store::check_staged(const Sequence& sequence, size_t layer) const {
    const auto num_blocks = static_cast<int64_t>(layouts_[layer].staging.num_blocks);
    for (const int32_t block : sequence.staged_blocks) {
        require(block >= 0 && block < num_blocks,
                "blocks must be below the " + std::to_string(num_blocks) + " staging blocks of layer " +
                    std::to_string(layer),
                block);
    }
}

void Store::attach_prefill(int32_t id, std::vector<int32_t> blocks, int64_t num_tokens) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Sequence& sequence = sequence_locked(id);
    const auto room = static_cast<int64_t>(blocks.size()) * TILE;
    require(num_tokens >= 0 && num_tokens <= std::min<int64_t>(room, INT_MAX),
            "num_tokens must be in 0.." + std::to_string(room) + ", the room of the blocks", num_tokens);
    for (const Head& head : sequence.heads) {
        require(head.num_tokens == 0, "sequence must be empty to be staged", head.num_tokens);
    }
    Sequence staged;
    staged.staged_blocks = std::move(blocks);
    for (size_t layer = 0; layer < layouts_.size(); ++layer) check_staged(staged, layer);
    sequence.staged_blocks = std::move(staged.staged_blocks);
    sequence.staged_tokens = num_tokens;
}

std::vector<HeadView> Store::staged_views_locked(const Sequence& sequence, size_t layer, const TileLayout& layout,
                                                 size_t first_tile, size_t num_tokens, std::vector<uint8_t>& storage,
                                                 std::vector<const uint8_t*>& pointers) const {
    check_staged(sequence, layer);
    const Staging& staging = layouts_[layer].staging;
    const size_t num_tiles = (num_tokens + TILE - 1) / TILE - first_tile;
    const size_t num_heads = first_head_[layer + 1] - first_head_[layer];
    const int width = config_.layers[layer].head_size;
    const size_t block_bytes = static_cast<size_t>(TILE * width) * bytes_per_number(staging.codec);

    storage.resize(num_heads * num_tiles * layout.bytes + ALIGNMENT);
    pointers.resize(num_heads * num_tiles);
    const size_t shift = (ALIGNMENT - reinterpret_cast<uintptr_t>(storage.data()) % ALIGNMENT) % ALIGNMENT;
    run_parallel(pointers.size(), [&](size_t i) {
        const size_t head = i / num_tiles, tile = first_tile + i % num_tiles;
        uint8_t* to = storage.data() + shift + i * layout.bytes;
        auto* h = new (to) TileHeader{};
        h->layout = &layout;
        h->min_position = static_cast<int32_t>(tile * TILE);
        h->count = static_cast<int32_t>(std::min<size_t>(TILE, num_tokens - tile * TILE));
        h->max_position = h->min_position + h->count - 1;
        const auto block = static_cast<size_t>(sequence.staged_blocks[tile]);
        const uint8_t* from = staging.keys + (block * num_heads + head) * block_bytes;
        if (staging.codec == Codec::f32) {
            transpose<uint32_t>(from, h->count, width, to + layout.key_codes);
        } else {
            transpose<uint16_t>(from, h->count, width, to + layout.key_codes);
        }
        if (layout.bytes > layout.value_codes) {  // rows of tokens, as they are staged; zeros beyond the last
            std::memcpy(to + layout.value_codes, staging.values + (from - staging.keys),
                        static_cast<size_t>(h->count * width) * bytes_per_number(staging.codec));
        }
        pointers[i] = to;
    });
    std::vector<HeadView> views;
    for (size_t head = 0; head < num_heads; ++head) views.push_back({pointers.data() + head * num_tiles, num_tiles});
    return views;
}

void Store::scores_locked(const Sequence& sequence, size_t layer, const float* q, const int32_t* row_position,
                          size_t num_rows, Reduce reduce, std::vector<float>& out) const {
    StagedScores rows{};
    rows.q = q;
    rows.num_rows = static_cast<int>(num_rows);
    rows.row_position = row_position;
    rows.reduce = reduce;
    if (sequence.staged_tokens && score_blocks(sequence, layer, rows, out)) return;
    std::vector<uint8_t> storage;
    std::vector<const uint8_t*> pointers;
    const std::vector<HeadView> views =
        sequence.staged_tokens ? staged_views_locked(sequence, layer, layouts_[layer].staged_keys, 0,
                                                     static_cast<size_t>(sequence.staged_tokens), storage, pointers)
                               : views_locked(sequence, layer);
    const LayerShape& shape = config_.layers[layer];
    const size_t begin = out.size();
    out.resize(begin + num_scores(shape, views));
    attention_scores(*kernels_, shape, views.data(), q, row_position, num_rows, reduce, out.data() + begin, parallel_);
}

bool Store::score_blocks(const Sequence& sequence, size_t layer, StagedScores rows, std::vector<float>& out) const {
    const LayerShape& shape = config_.layers[layer];
    const Staging& staging = layouts_[layer].staging;
    if (!kernels_->staged_scores || staging.codec != Codec::bf16 || shape.head_size < MIN_STAGED_HEAD) return false;
    if (shape.adjusts()) return false;
    check_staged(sequence, layer);
    const auto num_kv_heads = static_cast<size_t>(shape.num_kv_heads), size = static_cast<size_t>(shape.head_size);
    const size_t group = static_cast<size_t>(shape.num_heads) / num_kv_heads;
    const auto num_tokens = static_cast<size_t>(sequence.staged_tokens), num_blocks = (num_tokens + TILE - 1) / TILE;
    std::vector<const uint8_t*> blocks(num_kv_heads * num_blocks);
    for (size_t i = 0; i < blocks.size(); ++i) {
        const auto block = static_cast<size_t>(sequence.staged_blocks[i % num_blocks]);
        blocks[i] =
            staging.keys + (block * num_kv_heads + i / num_blocks) * TILE * size * bytes_per_number(Codec::bf16);
    }
    const size_t begin = out.size();
    out.resize(begin + static_cast<size_t>(shape.num_heads) * num_tokens);
    rows.num_tokens = num_tokens;
    rows.head_size = shape.head_size;
    rows.q_stride = static_cast<size_t>(shape.num_heads) * size;
    rows.window = shape.window;
    rows.scale = shape.scale;
    // Each task takes as many query heads of a KV head as fit the lanes of the kernel.
    const auto at_once = std::clamp<size_t>(STAGED_LANES / staged_lanes(std::max(rows.num_rows, 1)), 1, group);
    const size_t parts = (group + at_once - 1) / at_once;
    run_parallel(num_kv_heads * parts, [&](size_t i) {
        const size_t kv_head = i / parts, first = i % parts * at_once, head = kv_head * group + first;
        const std::unique_ptr<float[]> scratch(new float[staged_scratch(num_tokens)]);
        StagedScores part = rows;
        part.blocks = blocks.data() + kv_head * num_blocks;
        part.q += head * size;
        part.num_heads = static_cast<int>(std::min(at_once, group - first));
        part.scratch = scratch.get();
        part.out = out.data() + begin + head * num_tokens;
        kernels_->staged_scores(part);
    });
    return true;
}

void Store::read_staged(const Sequence& sequence, size_t layer, size_t head, const int32_t* tokens, int count,
                        TokenBuffer& to) const {
    const Staging& staging = layouts_[layer].staging;
    const size_t num_heads = first_head_[layer + 1] - first_head_[layer];
    const auto width = static_cast<size_t>(config_.layers[layer].head_size);
    const size_t row_bytes = width * bytes_per_number(staging.codec);
    for (int i = 0; i < count; ++i) {
        const auto block = static_cast<size_t>(sequence.staged_blocks[static_cast<size_t>(tokens[i] / TILE)]);
        const size_t row = (block * num_heads + head) * TILE + static_cast<size_t>(tokens[i] % TILE);
        widen(staging.codec, staging.keys + row * row_bytes, width, to.k + static_cast<size_t>(i) * width);
        widen(staging.codec, staging.values + row * row_bytes, width, to.v + static_cast<size_t>(i) * width);
        to.positions[i] = tokens[i];
    }
    to.count = count;
}

void Store::read_staged_keys(const Sequence& sequence, size_t h, const std::vector<MovedToken>& tokens,
                             float* to) const {
    const size_t layer = layer_of_[h], num_heads = first_head_[layer + 1] - first_head_[layer];
    const Staging& staging = layouts_[layer].staging;
    const size_t row_bytes = head_size(h) * bytes_per_number(staging.codec);
    for (const MovedToken& token : tokens) {
        const auto block = static_cast<size_t>(sequence.staged_blocks[static_cast<size_t>(token.index / TILE)]);
        const size_t row =
            (block * num_heads + h - first_head_[layer]) * TILE + static_cast<size_t>(token.index % TILE);
        widen(staging.codec, staging.keys + row * row_bytes, head_size(h), to);
        to += head_size(h);
    }
}

// In chunks of 32, each of which becomes a tile.
struct Store::Chunks {
    const int32_t* indices = nullptr;  // null: all, 0, 1, 2, ...
    int64_t num_tokens = 0;
    std::vector<int32_t> arranged;  // what `indices` names, with tiers or where they are grouped
    std::vector<uint8_t> tiers;     // of the first chunks, with tiers

    int64_t size() const { return (num_tokens + TILE - 1) / TILE; }
    int count(int64_t chunk) const { return static_cast<int>(std::min<int64_t>(TILE, num_tokens - chunk * TILE)); }
    bool must_list(int64_t chunk) const { return indices && crush::must_list(indices + chunk * TILE, count(chunk)); }
    size_t tier(int64_t chunk) const { return tiers.empty() ? 0 : tiers[static_cast<size_t>(chunk)]; }
    void copy(int64_t chunk, int32_t* to) const {
        for (int i = 0; i < count(chunk); ++i) {
            to[i] = indices ? indices[chunk * TILE + i] : static_cast<int32_t>(chunk * TILE + i);
        }
    }
    // By tiers, unless they are null, and then by `group`, if it is there, which moves tokens between tiles of a tier.
    void sort(const uint8_t* tier_of, int64_t num_target, const std::function<void(std::vector<MovedToken>&)>& group) {
        if (!tier_of && !group) return;
        std::vector<MovedToken> tokens;
        tokens.reserve(static_cast<size_t>(num_tokens));
        for (int64_t i = 0; i < num_tokens; ++i) {
            const int32_t index = indices ? indices[i] : static_cast<int32_t>(i);
            tokens.push_back({index, index, tier_of ? tier_of[i] : uint8_t{0}});
        }
        if (tier_of) {
            arrange(tokens, num_target);
            for (int64_t i = 0; i < num_target; ++i) tiers.push_back(best_tier(tokens.data() + i * TILE, TILE));
        }
        if (group) group(tokens);
        for (const MovedToken& token : tokens) arranged.push_back(token.index);
        indices = arranged.data();
    }
};

void Store::commit_head(const Sequence& sequence, size_t h, const Chunks& chunks, const Claim& claim,
                        size_t first) const {
    const size_t layer = layer_of_[h];
    const auto buffer = std::make_unique<TokenBuffer>();
    int32_t tokens[TILE];
    for (int64_t c = 0; c < chunks.size(); ++c) {
        const size_t tile = first + static_cast<size_t>(c);
        chunks.copy(c, tokens);
        read_staged(sequence, layer, h - first_head_[layer], tokens, chunks.count(c), *buffer);
        write_tile(*kernels_, claim.tile(tile), claim.layout(tile), *buffer);
    }
}

void Store::commit_prefill(int32_t id, const Selection* selection, size_t promised, const Wanted* given) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Sequence& sequence = sequence_locked(id);
    require(sequence.staged_tokens > 0, "sequence must be staged to be committed", id);
    for (const Head& head : sequence.heads) {
        require(head.num_tokens == 0, "sequence must be empty to commit staged tokens", head.num_tokens);
    }
    for (size_t layer = 0; layer < layouts_.size(); ++layer) check_staged(sequence, layer);
    if (selection) check_selection(*selection, [&](size_t) { return sequence.staged_tokens; });
    const Wanted wanted = wanted_of(sequence, given, selection ? selection->num_indices : 0);
    Precisions precisions = wanted.best();

    const size_t num_heads = sequence.heads.size();
    std::vector<Chunks> chunks(num_heads);
    run_parallel(num_heads, [&](size_t h) {
        const int64_t begin = selection ? selection->offsets[h] : 0;
        chunks[h].num_tokens = selection ? selection->offsets[h + 1] - begin : sequence.staged_tokens;
        if (selection) chunks[h].indices = selection->indices + begin;
        const int64_t num_target = num_target_tiles(chunks[h].num_tokens);
        std::function<void(std::vector<MovedToken>&)> group;
        if (groups(h, chunks[h].num_tokens)) {
            group = [&](std::vector<MovedToken>& tokens) {
                group_tiles(tokens, num_target, head_size(h), [&](const std::vector<MovedToken>& run, float* to) {
                    read_staged_keys(sequence, h, run, to);
                });
            };
        }
        chunks[h].sort(wanted.tiers ? wanted.tiers + begin : nullptr, num_target, group);
    });
    Claim claim(arena_);
    std::vector<size_t> first;  // [heads + 1]: number of the first tile of each in the claim
    for (size_t h = 0; h < num_heads; ++h) {
        first.push_back(claim.num_tiles());
        const int64_t num_target = num_target_tiles(chunks[h].num_tokens);
        for (int64_t c = 0; c < chunks[h].size(); ++c) {
            const CodecPair pair = c < num_target ? wanted.of_head(h)[chunks[h].tier(c)] : recent_;
            claim.add(layout_for(h, pair, chunks[h].must_list(c)));
        }
        // Empty tiles that were reserved before.
        for (const uint8_t* tile : sequence.heads[h].tiles) claim.remove_bytes(layout(tile).bytes);
    }
    first.push_back(claim.num_tiles());
    grant(claim, promised);
    run_parallel(num_heads, [&](size_t h) { commit_head(sequence, h, chunks[h], claim, first[h]); });
    std::vector<std::vector<uint8_t*>> tiles(num_heads);
    for (size_t h = 0; h < num_heads; ++h) {
        tiles[h].reserve(first[h + 1] - first[h]);
        for (size_t i = first[h]; i < first[h + 1]; ++i) tiles[h].push_back(claim.tile(i));
    }
    for (size_t h = 0; h < num_heads; ++h) {
        Head& head = sequence.heads[h];
        for (uint8_t* tile : head.tiles) drop_owner(tile);
        head.num_tokens = chunks[h].num_tokens;
        head.num_target = num_target_tiles(head.num_tokens);
        head.tiles.swap(tiles[h]);
    }
    claim.commit();
    sequence.precisions.swap(precisions);
    sequence.next_position = std::max(sequence.next_position, sequence.staged_tokens);
    sequence.staged_blocks.clear();
    sequence.staged_tokens = 0;
    tidy();
}

}  // namespace crush
