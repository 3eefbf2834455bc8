#include "store/store.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <numeric>

#include "store/require.hpp"
#include "store/tokens.hpp"

namespace crush {
namespace {

void check_layer(const LayerShape& l) {
    require(l.num_kv_heads >= 1, "num_kv_heads must be at least 1", l.num_kv_heads);
    require(l.num_heads >= 1 && l.num_heads % l.num_kv_heads == 0,
            "num_heads must be a multiple of " + std::to_string(l.num_kv_heads) + " KV heads", l.num_heads);
    require(l.head_size >= 16 && l.head_size <= MAX_HEAD_SIZE && l.head_size % 16 == 0,
            "head_size must be a multiple of 16 in 16..256", l.head_size);
    require(l.window >= 0, "window must be at least 0", l.window);
    require(std::isfinite(l.scale), "scale must be finite", l.scale);
    require(l.soft_cap == 0 || (l.soft_cap >= 1e-6f && std::isfinite(l.soft_cap)),
            "soft_cap must be 0, or finite and at least 1e-6", l.soft_cap);
    for (const auto& [name, numbers] : {std::pair{"slopes", &l.slopes}, std::pair{"sinks", &l.sinks}}) {
        require(numbers->empty() || numbers->size() == static_cast<size_t>(l.num_heads),
                std::string(name) + " must be none, or one for each of " + std::to_string(l.num_heads) + " heads",
                numbers->size());
        for (const float x : *numbers) require(std::isfinite(x), std::string(name) + " must be finite", x);
    }
}

}  // namespace

Store::Store(StoreConfig config, ParallelFor parallel)
    : config_(std::move(config)),
      kernels_(&crush::kernels(config_.isa)),
      parallel_(std::move(parallel)),
      arena_(config_.max_bytes) {
    const StoreConfig& c = config_;
    require(!c.layers.empty(), "layers must hold at least one layer", 0);
    require(!is_quantised(c.recent), "recent must be f32, bf16 or f16", code_bits(c.recent));
    require(c.recent_tokens >= 0, "recent_tokens must be at least 0", c.recent_tokens);
    require(c.recall.tokens == 0 || c.recall.tokens >= 64, "recall_tokens must be at least 64", c.recall.tokens);
    require(c.recall.fraction >= 0 && c.recall.fraction < 1,
            "recall_tokens must be a number of tokens, or a fraction below 1", c.recall.fraction);
    require(c.group_size >= 16 && c.group_size % 16 == 0, "group_size must be a multiple of 16", c.group_size);
    first_head_.push_back(0);
    for (const LayerShape& shape : c.layers) {
        check_layer(shape);
        const int group = std::gcd(c.group_size, shape.head_size);
        Layouts l{};
        for (int key = 0; key < NUM_CODECS; ++key) {
            for (const bool listed : {false, true}) {
                l.plain_u2[key][listed] = make_layout(static_cast<Codec>(key), Codec::u2, shape.head_size, group,
                                                      listed, c.recall.is_on(), false);
            }
            for (int value = 0; value < NUM_CODECS; ++value) {
                for (const bool listed : {false, true}) {
                    l.of[key][value][listed] = make_layout(static_cast<Codec>(key), static_cast<Codec>(value),
                                                           shape.head_size, group, listed, c.recall.is_on());
                }
            }
        }
        layer_of_.insert(layer_of_.end(), static_cast<size_t>(shape.num_kv_heads), layouts_.size());
        first_head_.push_back(layer_of_.size());
        layouts_.push_back(l);
    }
    recent_ = {c.recent, c.recent};
    default_precisions_.assign(num_heads(), {c.key, c.value});
}

Store::~Store() = default;  // the arena frees whole slabs

void Store::run_parallel(size_t n, const std::function<void(size_t)>& task) const {
    std::mutex mutex;
    std::exception_ptr first;
    parallel_(n, [&](size_t i) {
        try {
            task(i);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!first) first = std::current_exception();
        }
    });
    if (first) std::rethrow_exception(first);
}

// -- sequences --------------------------------------------------------------------------------------------------------

Sequence& Store::sequence_locked(int32_t id) {
    return const_cast<Sequence&>(static_cast<const Store*>(this)->sequence_locked(id));
}

const Sequence& Store::sequence_locked(int32_t id) const {
    const auto found = sequences_.find(id);
    require(found != sequences_.end(), "sequence must be one that was created and not released", id);
    return *found->second;
}

std::unique_ptr<Sequence> Store::new_sequence(int64_t capture_rows) const {
    check_capture_rows(capture_rows);
    auto sequence = std::make_unique<Sequence>();
    sequence->heads.resize(num_heads());
    sequence->precisions = default_precisions_;
    sequence->capture_rows = capture_rows;
    if (capture_rows) sequence->captures.resize(layouts_.size());
    return sequence;
}

int32_t Store::create(int64_t capture_rows, const Precisions* precisions) {
    auto sequence = new_sequence(capture_rows);
    if (precisions) {
        check_precisions(*precisions, num_heads());
        sequence->precisions = *precisions;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    sequences_.emplace(last_id_ + 1, std::move(sequence));
    return ++last_id_;
}

void Store::set_precisions(int32_t id, const Precisions& precisions) {
    check_precisions(precisions, num_heads());
    const std::lock_guard<std::mutex> lock(mutex_);
    sequence_locked(id).precisions = precisions;
}

Wanted Store::wanted_of(const Sequence& sequence, const Wanted* wanted, size_t num_tokens) const {
    if (!wanted) return {sequence.precisions};
    check_wanted(*wanted, num_heads(), num_tokens);
    return *wanted;
}

Precisions Store::precisions(int32_t id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return sequence_locked(id).precisions;
}

void Store::release(int32_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    release_locked(id);
}

void Store::release_locked(int32_t id) {
    Sequence& sequence = sequence_locked(id);
    size_t freed = drop_rings(sequence);
    for (const Head& head : sequence.heads) {
        for (uint8_t* tile : head.tiles) freed += drop_owner(tile);
    }
    arena_.unclaim(freed);
    sequences_.erase(id);
    tidy();
}

size_t Store::drop_owner(uint8_t* tile) noexcept {
    if (header(tile).refs.fetch_sub(1) != 1) return 0;
    const size_t bytes = layout(tile).bytes;
    arena_.free(tile, bytes);
    return bytes;
}

// -- contents ----------------------------------------------------------------------------------------------------

size_t Store::nbytes() const { return arena_.used(); }  // waits for no kernel, which holds mutex_ while it runs

size_t Store::nbytes_of(int32_t id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Sequence& sequence = sequence_locked(id);
    size_t bytes = 0;
    for (const Head& head : sequence.heads) {
        for (const uint8_t* tile : head.tiles) bytes += layout(tile).bytes;
    }
    for (size_t layer = 0; layer < sequence.captures.size(); ++layer) {
        bytes += ring_bytes(sequence.captures[layer].get(), layer);
    }
    return bytes;
}

Store::Bytes Store::nbytes_of_all(std::vector<int32_t> ids) const {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    struct Part {  // a tile or a ring of a sequence
        const void* what;
        size_t bytes, owners;
    };
    std::vector<Part> parts;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const int32_t id : ids) {
        const Sequence& sequence = sequence_locked(id);
        for (const Head& head : sequence.heads) {
            for (const uint8_t* tile : head.tiles)
                parts.push_back({tile, layout(tile).bytes, header(tile).refs.load()});
        }
        for (size_t layer = 0; layer < sequence.captures.size(); ++layer) {
            const std::shared_ptr<Capture>& ring = sequence.captures[layer];
            if (ring)
                parts.push_back({ring.get(), ring_bytes(ring.get(), layer), static_cast<size_t>(ring.use_count())});
        }
    }
    const auto before = [](const Part& a, const Part& b) { return std::less<const void*>()(a.what, b.what); };
    std::sort(parts.begin(), parts.end(), before);
    Bytes bytes{0, 0};
    for (auto i = parts.begin(); i != parts.end();) {
        const auto next = std::upper_bound(i, parts.end(), *i, before);
        bytes.held += i->bytes;
        if (i->owners == static_cast<size_t>(next - i)) bytes.freed += i->bytes;
        i = next;
    }
    return bytes;
}

size_t Store::reserved_bytes() const { return arena_.reserved(); }

size_t Store::num_sequences() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return sequences_.size();
}

int64_t Store::num_target_tiles(int64_t num_tokens) const {
    return std::max<int64_t>(0, num_tokens - config_.recent_tokens) / TILE;
}

size_t Store::bytes_for(int64_t num_tokens, const Precisions* precisions) const {
    const Wanted wanted{precisions ? *precisions : default_precisions_};
    return bytes_for(std::vector<int64_t>(num_heads(), num_tokens), &wanted);
}

size_t Store::bytes_for(const std::vector<int64_t>& num_tokens, const Wanted* given) const {
    const Wanted wanted = given ? *given : Wanted{default_precisions_};
    check_wanted(wanted, num_heads(), 0);
    require(num_tokens.size() == num_heads() * wanted.num_tiers,
            "num_tokens must have a number for each tier of the " + std::to_string(num_heads()) +
                " KV heads of all layers",
            num_tokens.size());
    size_t bytes = 0;
    const int64_t* of_tier = num_tokens.data();
    for (size_t h = 0; h < num_heads(); ++h, of_tier += wanted.num_tiers) {
        int64_t sum = 0;
        for (size_t t = 0; t < wanted.num_tiers; ++t) {
            require(of_tier[t] >= 0 && of_tier[t] <= INT32_MAX - sum, "num_tokens must be at least 0 and fit 31 bits",
                    of_tier[t]);
            sum += of_tier[t];
        }
        const int64_t num_recent = sum - num_target_tiles(sum) * TILE;
        bytes += static_cast<size_t>((num_recent + TILE - 1) / TILE) * layout_for(h, recent_, false).bytes;
        // Tiles of tokens that are grouped may all have to list their positions.
        const bool listed = groups(h, sum);
        // Tokens of the tiers up to here, less the recent ones, which are taken from the first tiers.
        int64_t seen = 0, begin = 0;
        for (size_t t = 0; t < wanted.num_tiers; ++t) {
            seen += of_tier[t];
            const int64_t end = std::max<int64_t>(0, seen - num_recent);
            bytes +=
                static_cast<size_t>(num_tier_tiles(begin, end)) * layout_for(h, wanted.of_head(h)[t], listed).bytes;
            begin = end;
        }
    }
    return bytes;
}

const TileLayout& Store::layout_for(size_t head, CodecPair pair, bool listed) const {
    return layouts_[layer_of_[head]].of[static_cast<size_t>(pair.key)][static_cast<size_t>(pair.value)][listed];
}

size_t Store::check_head(size_t layer, size_t head) const {
    require(layer < layouts_.size(), "layer must be below " + std::to_string(layouts_.size()), layer);
    const size_t num_heads = first_head_[layer + 1] - first_head_[layer];
    require(head < num_heads, "head must be below " + std::to_string(num_heads), head);
    return first_head_[layer] + head;
}

int64_t Store::num_tokens(int32_t id, size_t layer, size_t head) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return sequence_locked(id).heads[check_head(layer, head)].num_tokens;
}

std::vector<int32_t> Store::positions(int32_t id, size_t layer, size_t head) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Head& h = sequence_locked(id).heads[check_head(layer, head)];
    std::vector<int32_t> positions(static_cast<size_t>(h.num_tokens));
    for (size_t i = 0; i < positions.size(); i += TILE) read_positions(h.tiles[i / TILE], &positions[i]);
    return positions;
}

HeadTokens Store::read(int32_t id, size_t layer, size_t head) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Head& h = sequence_locked(id).heads[check_head(layer, head)];
    const auto width = static_cast<size_t>(config_.layers[layer].head_size);
    HeadTokens tokens;
    tokens.k.reserve(static_cast<size_t>(h.num_tokens) * width);
    tokens.v.reserve(static_cast<size_t>(h.num_tokens) * width);
    const auto reader = std::make_unique<TokenReader>(*kernels_, h.tiles);
    const auto buffer = std::make_unique<TokenBuffer>();
    for (int64_t i = 0; i < h.num_tokens; ++i) {
        buffer->count = 0;
        reader->read(i, *buffer);
        tokens.k.insert(tokens.k.end(), buffer->k, buffer->k + width);
        tokens.v.insert(tokens.v.end(), buffer->v, buffer->v + width);
        tokens.positions.push_back(buffer->positions[0]);
    }
    return tokens;
}

std::vector<HeadView> Store::views_locked(const Sequence& sequence, size_t layer) const {
    std::vector<HeadView> views;
    for (size_t h = first_head_[layer]; h < first_head_[layer + 1]; ++h) {
        const Head& head = sequence.heads[h];
        views.push_back({head.tiles.data(), static_cast<size_t>((head.num_tokens + TILE - 1) / TILE)});
    }
    return views;
}

}  // namespace crush
