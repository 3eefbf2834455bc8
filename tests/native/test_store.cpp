// Random traffic on stores against lists in memory: same tokens, exact bytes, a limit that is never passed. See
// CMakeLists.txt.
#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "store/store.hpp"

using namespace crush;

namespace {

template <class Error, class Function>
void check_throws(Function function) {
    bool thrown = false;
    try {
        function();
    } catch (const Error&) {
        thrown = true;
    }
    CHECK(thrown);
}

void parallel(size_t n, const std::function<void(size_t)>& task) {
    std::atomic<size_t> next{0};
    const auto work = [&] {
        for (size_t i = next++; i < n; i = next++) task(i);
    };
    std::thread other(work);
    work();
    other.join();
}

// One number of a token: its key and value are functions of who it is, so that any of them can be found out again.
float number(uint32_t token, size_t channel, bool value) {
    uint32_t x = token * 2654435761u + static_cast<uint32_t>(channel) * 40503u + (value ? 977u : 0u);
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    return static_cast<float>(x % 2001u) / 1000.f - 1.f;
}

struct Token {
    uint32_t id;
    int32_t position;
};

struct Model {  // of a sequence
    std::vector<std::vector<Token>> heads;
    int32_t next_position = 0;
};

struct Setting {
    const char* name;
    Codec key, value, recent;
    int recent_tokens;
    size_t max_bytes;
    float tolerance;  // of numbers in -1..1 after some rewrites; 0 = exact
    const char* isa;
    bool mixed = false;  // sequences have precisions of their own, and tiers
    int64_t recall = 0;  // tokens that a step reads
};

class Traffic {
public:
    Traffic(const Setting& setting, unsigned seed)
        : setting_(setting), random_(seed), store_(config(setting), parallel) {
        for (const LayerShape& shape : store_.config().layers) {
            for (int h = 0; h < shape.num_kv_heads; ++h) head_sizes_.push_back(static_cast<size_t>(shape.head_size));
        }
        make_staging();
    }

    void run(int steps) {
        for (int i = 0; i < steps; ++i) {
            step();
            if (i % 16 == 0) check_structure();
        }
        check_structure();
        while (!models_.empty()) release(models_.begin()->first);
        CHECK(store_.nbytes() == 0);
        CHECK(store_.num_sequences() == 0);
        CHECK(store_.reserved_bytes() <= 8 * (size_t{2} << 20));  // a slab for each size of tile
    }

private:
    static StoreConfig config(const Setting& s) {
        StoreConfig c;
        c.layers = {{4, 2, 32, 0, 0.2f}, {3, 1, 48, 16, 0.1f}};
        c.key = s.key;
        c.value = s.value;
        c.recent = s.recent;
        c.recent_tokens = s.recent_tokens;
        c.group_size = 32;
        c.max_bytes = s.max_bytes;
        c.isa = s.isa;
        c.recall.tokens = s.recall;
        return c;
    }

    int pick(int below) { return static_cast<int>(random_() % static_cast<unsigned>(below)); }

    // -- staging: block b, slot t holds the token with id b * 32 + t, in every head

    void make_staging() {
        for (size_t layer = 0; layer < 2; ++layer) {
            const LayerShape& shape = store_.config().layers[layer];
            const auto width = static_cast<size_t>(shape.head_size);
            std::vector<float> k, v;
            for (uint32_t block = 0; block < NUM_BLOCKS; ++block) {
                for (int h = 0; h < shape.num_kv_heads; ++h) {
                    for (uint32_t t = 0; t < TILE; ++t) {
                        for (size_t c = 0; c < width; ++c) {
                            k.push_back(number(block * TILE + t, c, false));
                            v.push_back(number(block * TILE + t, c, true));
                        }
                    }
                }
            }
            staging_.push_back(std::move(k));
            staging_.push_back(std::move(v));
            Staging staging;
            staging.keys = reinterpret_cast<uint8_t*>(staging_[2 * layer].data());
            staging.values = reinterpret_cast<uint8_t*>(staging_[2 * layer + 1].data());
            staging.num_blocks = NUM_BLOCKS;
            staging.codec = Codec::f32;
            store_.set_staging(layer, staging);
        }
    }

    // -- precisions

    // Each tier has a random pair of codecs with no more bits than the one before.
    Wanted wanted(size_t num_tiers) {
        Wanted w;
        w.num_tiers = num_tiers;
        for (size_t i = 0; i < head_sizes_.size() * num_tiers; ++i) {
            const CodecPair above = i % num_tiers ? w.precisions.back() : CodecPair{Codec::f32, Codec::f32};
            w.precisions.push_back({lower(static_cast<Codec>(pick(NUM_CODECS)), above.key),
                                    lower(static_cast<Codec>(pick(NUM_CODECS)), above.value)});
        }
        return w;
    }

    Wanted wanted_of_some_tiers(size_t num_tokens) {
        Wanted w = wanted(1 + static_cast<size_t>(pick(4)));
        if (pick(3) == 0) return wanted(1);
        tiers_.clear();
        for (size_t i = 0; i < num_tokens; ++i) {
            const bool same = i > 0 && pick(40);
            tiers_.push_back(same ? tiers_.back() : static_cast<uint8_t>(pick(static_cast<int>(w.num_tiers))));
        }
        if (num_tokens) w.tiers = tiers_.data();
        if (!w.tiers) w = wanted(1);
        return w;
    }

    void check_precisions_of(int32_t id, const Wanted& w) {
        const Precisions best = w.best();
        CHECK(store_.precisions(id) == best);
    }

    // -- steps

    void step() {
        const int what = pick(100);
        if (models_.empty() || (what < 8 && models_.size() < 8)) {
            const Wanted own = wanted(1);
            const int32_t id = store_.create(what % 2, setting_.mixed ? &own.precisions : nullptr);
            models_[id].heads.resize(head_sizes_.size());
            if (pick(3)) commit_prefill(id);
            return;
        }
        auto it = models_.begin();
        std::advance(it, pick(static_cast<int>(models_.size())));
        const int32_t id = it->first;
        if (what < 14) return release(id);
        if (what < 18) return fork(id);
        if (what < 22) return reload(id);
        if (what < 34) return compact(id);
        if (setting_.mixed && what < 37) return store_.set_precisions(id, wanted(1).precisions);
        if (what < 46) return quantize_aged(id);
        if (what < 50) return bad_calls(id);
        append(id);
        if (pick(4) == 0 && models_.count(id)) check_tokens(id);
        if (pick(4) == 0 && models_.count(id)) check_recall(id);
    }

    void quantize_aged(int32_t id) {
        store_.quantize_aged(id);
        if (!setting_.recall) return;
        for (size_t h = 0, first = 2; h < models_[id].heads.size(); ++h) {
            // The same tokens, maybe in other tiles. A position may be there more than once: then by what is stored.
            std::vector<Token>& tokens = models_[id].heads[h];
            const HeadTokens stored = store_.read(id, h >= first, h >= first ? h - first : h);
            const size_t width = head_sizes_[h];
            CHECK(stored.positions.size() == tokens.size());
            std::vector<Token> sorted;
            std::vector<bool> taken(tokens.size());
            for (size_t i = 0; i < tokens.size(); ++i) {
                for (size_t j = 0; j <= tokens.size(); ++j) {
                    CHECK(j < tokens.size());
                    if (taken[j] || tokens[j].position != stored.positions[i]) continue;
                    if (!near(stored.k[i * width], number(tokens[j].id, 0, false))) continue;
                    taken[j] = true;
                    sorted.push_back(tokens[j]);
                    break;
                }
            }
            tokens = std::move(sorted);
        }
        check_tokens(id);
    }

    void release(int32_t id) {
        store_.release(id);
        models_.erase(id);
        check_throws<std::invalid_argument>([&] { store_.release(id); });
    }

    void commit_prefill(int32_t id) {
        std::vector<int32_t> blocks;
        for (int i = 1 + pick(setting_.recall ? 10 : 4); i > 0; --i) blocks.push_back(pick(NUM_BLOCKS));
        const int n = static_cast<int>(blocks.size()) * TILE - pick(TILE);
        store_.attach_prefill(id, blocks, n);
        check_staged_views(id, blocks, n);
        std::vector<std::vector<int32_t>> kept(head_sizes_.size());
        const bool all = pick(3) == 0;
        for (auto& head : kept) {
            const int share = all ? 100 : pick(101);
            for (int t = 0; t < n; ++t) {
                if (pick(100) < share) head.push_back(t);
            }
        }
        const std::vector<int64_t> offsets = offsets_of(kept);
        const std::vector<int32_t> indices = joined(kept);
        const Selection selection{offsets.data(), offsets.size(), indices.data(), indices.size()};
        const size_t promised = pick(4) ? 0 : static_cast<size_t>(pick(60000));
        const bool mixed = setting_.mixed;
        const Wanted own = mixed ? wanted_of_some_tiers(indices.size()) : Wanted{};
        const Precisions before = store_.precisions(id);
        try {
            const bool whole = all && !mixed && pick(2);
            store_.commit_prefill(id, whole ? nullptr : &selection, promised, mixed ? &own : nullptr);
        } catch (const StoreFull&) {
            CHECK(setting_.max_bytes > 0);
            CHECK(store_.precisions(id) == before);
            store_.attach_prefill(id, {}, 0);
            return;
        }
        CHECK(!setting_.max_bytes || store_.nbytes() + promised <= setting_.max_bytes);
        Model& model = models_[id];
        model.next_position = n;
        for (size_t h = 0; h < kept.size(); ++h) {
            if (own.tiers || setting_.recall) order_by_position(id, h, kept[h]);
            for (const int32_t t : kept[h]) {
                model.heads[h].push_back(
                    {static_cast<uint32_t>(blocks[static_cast<size_t>(t / TILE)] * TILE + t % TILE), t});
            }
        }
        if (mixed) check_precisions_of(id, own);
        if (all && !own.tiers) {
            // Tiles whose tokens are grouped may list their positions.
            const size_t most = store_.bytes_for(n, mixed ? &own.precisions : nullptr), held = store_.nbytes_of(id);
            CHECK(setting_.recall ? held <= most : held == most);
        }
        check_tokens(id);
    }

    // Puts the kept tokens of a head, known by their positions, into the order that the store has them in.
    void order_by_position(int32_t id, size_t h, std::vector<int32_t>& kept) {
        const auto first = static_cast<size_t>(store_.config().layers[0].num_kv_heads);
        std::vector<int32_t> places = store_.positions(id, h >= first, h >= first ? h - first : h);
        std::vector<int32_t> sorted = places;
        std::sort(sorted.begin(), sorted.end());
        CHECK(sorted == kept);
        kept = std::move(places);
    }

    void append(int32_t id) {
        Model& model = models_[id];
        const int n = pick(3) ? 1 + pick(3) : 1 + pick(80);
        if (store_.free_slots(id) < n) {
            const size_t before = store_.nbytes(), promised = pick(4) ? 0 : static_cast<size_t>(pick(60000));
            if (!store_.reserve(id, n, promised)) {
                CHECK(setting_.max_bytes > 0);
                CHECK(store_.nbytes() == before);
                return;
            }
            CHECK(!setting_.max_bytes || store_.nbytes() == before || store_.nbytes() + promised <= setting_.max_bytes);
        }
        CHECK(store_.free_slots(id) >= n);
        const size_t before = store_.nbytes();
        int32_t position = model.next_position;
        const bool jump = pick(10) == 0;
        if (jump) position += 1 + pick(pick(2) ? 50 : 3 * MAX_GAP);
        try {
            for (size_t layer = 0, head = 0; layer < 2; ++layer) append_layer(id, model, layer, head, n, position);
        } catch (const StoreFull&) {
            CHECK(jump && setting_.max_bytes > 0);
            // A layer may have taken its rows before another one failed: nobody can go on with this sequence.
            release(id);
            return;
        }
        CHECK(jump || store_.nbytes() == before);
        model.next_position = position + n;
    }

    void append_layer(int32_t id, Model& model, size_t layer, size_t& head, int n, int32_t position) {
        const LayerShape& shape = store_.config().layers[layer];
        const auto num_heads = static_cast<size_t>(shape.num_kv_heads), width = static_cast<size_t>(shape.head_size);
        std::vector<float> k, v;
        for (int t = 0; t < n; ++t) {
            const uint32_t token = 100000u + next_token_ + static_cast<uint32_t>(t);
            for (size_t h = 0; h < num_heads; ++h) {
                for (size_t c = 0; c < width; ++c) {
                    k.push_back(number(token, c, false));
                    v.push_back(number(token, c, true));
                }
            }
        }
        store_.append(id, layer, k.data(), v.data(), n, position);
        for (size_t h = 0; h < num_heads; ++h, ++head) {
            for (int t = 0; t < n; ++t)
                model.heads[head].push_back({100000u + next_token_ + static_cast<uint32_t>(t), position + t});
        }
        next_token_ += static_cast<uint32_t>(n);
    }

    void fork(int32_t id) {
        if (models_.size() >= 8) return;
        const Model& model = models_[id];
        size_t shortest = SIZE_MAX;
        bool whole = true;
        for (const auto& head : model.heads) {
            shortest = std::min(shortest, head.size());
            std::vector<int32_t> positions;
            for (const Token& token : head) positions.push_back(token.position);
            if (setting_.recall) std::sort(positions.begin(), positions.end());
            for (size_t i = 0; i < head.size(); ++i) whole = whole && positions[i] == static_cast<int32_t>(i);
        }
        if (pick(2)) {
            const size_t before = store_.nbytes();
            models_[store_.fork(id)] = Model(model);
            CHECK(store_.nbytes() == before);
            return;
        }
        const int length = pick(static_cast<int>(shortest) + 1);
        if (!whole) return check_throws<std::invalid_argument>([&] { store_.fork(id, length); });
        check_throws<std::invalid_argument>([&] { store_.fork(id, static_cast<int64_t>(shortest) + 1); });
        try {
            Model twin;
            twin.next_position = length;
            const int32_t made = store_.fork(id, length);
            for (size_t h = 0; h < model.heads.size(); ++h) {
                std::vector<int32_t> places(static_cast<size_t>(length));
                std::iota(places.begin(), places.end(), 0);
                order_by_position(made, h, places);
                std::map<int32_t, Token> by_position;
                for (const Token& token : model.heads[h]) by_position[token.position] = token;
                twin.heads.emplace_back();
                for (const int32_t place : places) twin.heads.back().push_back(by_position.at(place));
            }
            models_[made] = std::move(twin);
            check_tokens(made);
        } catch (const StoreFull&) {
            CHECK(setting_.max_bytes > 0);
        }
    }

    // What is loaded takes the place of what was dumped.
    void reload(int32_t id) {
        const Dump dump = store_.dump(id);
        load_damaged(dump);
        try {
            const int32_t made = store_.load(dump.heads, dump.tiles.data(), dump.tiles.size(), pick(2));
            models_[made] = Model(models_[id]);
            check_tokens(made);
            CHECK(store_.dump(made).tiles == dump.tiles);
            CHECK(store_.nbytes_of(made) <= store_.nbytes_of(id) && dump.tiles.size() <= store_.nbytes_of(made));
            release(id);
        } catch (const StoreFull&) {
            CHECK(setting_.max_bytes > 0);
        }
    }

    void load_damaged(Dump dump) {
        const size_t before = store_.nbytes();
        std::vector<uint8_t>& tiles = dump.tiles;
        for (int i = 1 + pick(3); i > 0; --i) {
            DumpedHead& head = dump.heads[static_cast<size_t>(pick(static_cast<int>(dump.heads.size())))];
            const int64_t numbers[] = {-1, 0, 1, 31, 33, INT_MAX, INT64_MAX, pick(300)};
            int64_t* const columns[] = {&head.num_tokens,    &head.num_target, &head.bytes,
                                        &head.next_position, &head.key,        &head.value};
            if (pick(2)) *columns[pick(6)] = numbers[pick(8)];
            if (!tiles.empty()) {
                const int begin = pick(static_cast<int>(tiles.size()));
                tiles[static_cast<size_t>(pick(2) ? begin : std::min(begin, 40))] = static_cast<uint8_t>(pick(256));
            }
            if (pick(8) == 0) {
                tiles.resize(tiles.size() - std::min<size_t>(tiles.size(), static_cast<size_t>(pick(100))));
                head.bytes = std::clamp<int64_t>(head.bytes, 0, 1 << 20) + pick(100) - 50;
            }
        }
        const std::vector<uint8_t> exact(tiles);  // reads behind it are seen
        int32_t made = 0;
        try {
            made = store_.load(dump.heads, exact.data(), exact.size());
        } catch (const std::invalid_argument&) {
        } catch (const StoreFull&) {
            CHECK(setting_.max_bytes > 0);
        }
        if (made) {
            for (size_t layer = 0; layer < 2; ++layer) store_.read(made, layer, 0);
            store_.quantize_aged(made);
            store_.release(made);
        }
        CHECK(store_.nbytes() == before);
    }

    void compact(int32_t id) {
        Model& model = models_[id];
        std::vector<std::vector<int32_t>> kept(model.heads.size());
        for (size_t h = 0; h < kept.size(); ++h) {
            const bool by_tile = pick(2) != 0;
            const int share = pick(2) ? 100 : pick(101);
            bool stays = true;
            for (int t = 0; t < static_cast<int>(model.heads[h].size()); ++t) {
                if (!by_tile || t % TILE == 0) stays = pick(100) < share || (by_tile && pick(2));
                if (stays) kept[h].push_back(t);
            }
        }
        const std::vector<int64_t> offsets = offsets_of(kept);
        const std::vector<int32_t> indices = joined(kept);
        const size_t before = store_.nbytes();
        std::vector<int32_t> order;
        const bool given = setting_.mixed && pick(4);
        const Wanted own = given ? wanted_of_some_tiers(indices.size()) : Wanted{store_.precisions(id)};
        const Precisions precisions = store_.precisions(id);
        try {
            order = store_.compact(id, {offsets.data(), offsets.size(), indices.data(), indices.size()},
                                   given ? &own : nullptr);
        } catch (const StoreFull&) {
            CHECK(setting_.max_bytes > 0);
            CHECK(store_.nbytes() == before && store_.precisions(id) == precisions);
            return;
        }
        check_precisions_of(id, own);
        CHECK(order.size() == indices.size());
        for (size_t h = 0; h < kept.size(); ++h) {
            const std::vector<int32_t> of_head(order.begin() + offsets[h], order.begin() + offsets[h + 1]);
            std::vector<int32_t> sorted = of_head;
            std::sort(sorted.begin(), sorted.end());
            CHECK(sorted == kept[h]);
            std::vector<Token> tokens;
            for (const int32_t i : of_head) tokens.push_back(model.heads[h][static_cast<size_t>(i)]);
            model.heads[h] = std::move(tokens);
        }
        check_tokens(id);
    }

    void bad_calls(int32_t id) {
        const Model& model = models_[id];
        const size_t before = store_.nbytes(), num_heads = model.heads.size();
        std::vector<int64_t> offsets(num_heads + 1, 0);
        const int32_t beyond = static_cast<int32_t>(model.heads[0].size());
        const std::vector<int32_t> indices{beyond, 0};
        offsets.back() = 1;
        const auto compact = [&](size_t num_offsets, size_t num_indices) {
            check_throws<std::invalid_argument>(
                [&] { store_.compact(id, {offsets.data(), num_offsets, indices.data(), num_indices}); });
        };
        compact(num_heads, 1);
        compact(num_heads + 1, 2);
        offsets.assign(num_heads + 1, 1);
        offsets[0] = 0;
        compact(num_heads + 1, 1);  // an index that is not there
        if (model.heads[0].size() >= 2) {
            const std::vector<int32_t> twice{1, 1};
            offsets.assign(num_heads + 1, 2);
            offsets[0] = 0;
            check_throws<std::invalid_argument>(
                [&] { store_.compact(id, {offsets.data(), num_heads + 1, twice.data(), 2}); });
        }
        offsets[1] = -1;
        compact(num_heads + 1, 1);
        offsets[1] = INT64_MAX;
        compact(num_heads + 1, 1);
        check_throws<std::invalid_argument>([&] { store_.commit_prefill(id); });
        check_throws<std::invalid_argument>([&] { store_.set_precisions(id, {{Codec::u8, Codec::u8}}); });
        check_throws<std::invalid_argument>(
            [&] { store_.set_precisions(id, Precisions(num_heads, {Codec::u8, static_cast<Codec>(6)})); });
        check_throws<std::invalid_argument>([&] { store_.bytes_for(std::vector<int64_t>(num_heads + 1, 3)); });
        check_throws<std::invalid_argument>(
            [&] { store_.attach_prefill(id, {0, static_cast<int32_t>(NUM_BLOCKS)}, 64); });
        check_throws<std::invalid_argument>([&] { store_.attach_prefill(id, {0}, 33); });
        check_throws<std::invalid_argument>([&] { store_.reserve(id, -1); });
        check_throws<std::invalid_argument>([&] { store_.num_tokens(id, 2, 0); });
        check_throws<std::invalid_argument>([&] { store_.read(id, 1, 1); });
        check_throws<std::invalid_argument>([&] { store_.fork(id + 1000000); });
        const std::vector<float> rows(48 * 4096);
        check_throws<std::logic_error>([&] { store_.append(id, 1, rows.data(), rows.data(), 4096, 0); });
        CHECK(store_.nbytes() == before);
    }

    // -- checks

    static std::vector<int64_t> offsets_of(const std::vector<std::vector<int32_t>>& kept) {
        std::vector<int64_t> offsets{0};
        for (const auto& head : kept) offsets.push_back(offsets.back() + static_cast<int64_t>(head.size()));
        return offsets;
    }
    static std::vector<int32_t> joined(const std::vector<std::vector<int32_t>>& kept) {
        std::vector<int32_t> all;
        for (const auto& head : kept) all.insert(all.end(), head.begin(), head.end());
        return all;
    }

    bool near(float got, float expected) const { return std::fabs(got - expected) <= setting_.tolerance; }

    void check_tokens(int32_t id) {
        const Model& model = models_[id];
        for (size_t layer = 0, h = 0; layer < 2; ++layer) {
            for (int k = 0; k < store_.config().layers[layer].num_kv_heads; ++k, ++h) {
                const HeadTokens tokens = store_.read(id, layer, static_cast<size_t>(k));
                const auto& expected = model.heads[h];
                CHECK(tokens.positions.size() == expected.size());
                CHECK(tokens.positions == store_.positions(id, layer, static_cast<size_t>(k)));
                for (size_t t = 0; t < expected.size(); ++t) {
                    CHECK(tokens.positions[t] == expected[t].position);
                    for (size_t c = 0; c < head_sizes_[h]; ++c) {
                        CHECK(near(tokens.k[t * head_sizes_[h] + c], number(expected[t].id, c, false)));
                        CHECK(near(tokens.v[t * head_sizes_[h] + c], number(expected[t].id, c, true)));
                    }
                }
            }
        }
    }

    // Steps of a few rows read tiles that are there, and give numbers.
    void check_recall(int32_t id) {
        const std::lock_guard<std::mutex> lock(store_.mutex());
        const Sequence& sequence = store_.sequence_locked(id);
        for (size_t layer = 0, first = 0; layer < 2; ++layer) {
            const LayerShape& shape = store_.config().layers[layer];
            const RowSpan span{&sequence, 1, static_cast<size_t>(1 + pick(RECALL_ROWS + 1)),
                               static_cast<int32_t>(sequence.next_position)};
            const size_t width = static_cast<size_t>(shape.num_heads * shape.head_size), rows = 1 + span.num_rows;
            std::vector<float> q(rows * width), out(rows * width, 7.f);
            for (float& x : q) x = static_cast<float>(pick(2001)) / 100.f - 10.f;
            const auto chosen = store_.recalled_locked(span, layer, q.data());
            for (size_t h = 0; h < chosen.size(); ++h) {
                const auto num_tiles = (sequence.heads[first + h].num_tokens + TILE - 1) / TILE;
                CHECK(std::is_sorted(chosen[h].begin(), chosen[h].end(), std::less_equal<int32_t>()));
                if (chosen[h].empty()) continue;
                CHECK(chosen[h].front() >= 0 && chosen[h].back() < num_tiles);
                CHECK(static_cast<int64_t>(chosen[h].size()) < num_tiles);
            }
            store_.attend_locked(layer, {span}, q.data(), out.data(), 2);
            for (size_t i = width; i < out.size(); ++i) CHECK(std::isfinite(out[i]));
            first += chosen.size();
        }
    }

    void check_staged_views(int32_t id, const std::vector<int32_t>& blocks, int n) {
        const std::lock_guard<std::mutex> lock(store_.mutex());
        for (size_t layer = 0; layer < 2; ++layer) {
            std::vector<uint8_t> storage;
            std::vector<const uint8_t*> pointers;
            const Sequence& staged = store_.sequence_locked(id);
            const int width = store_.config().layers[layer].head_size;
            const TileLayout layout = make_layout(Codec::f32, Codec::f32, width, width, false);
            const auto num_tokens = static_cast<size_t>(staged.staged_tokens);
            const auto views = store_.staged_views_locked(staged, layer, layout, 0, num_tokens, storage, pointers);
            CHECK(views.size() == static_cast<size_t>(store_.config().layers[layer].num_kv_heads));
            for (const HeadView& view : views) {
                CHECK(view.num_tiles == blocks.size());
                for (size_t i = 0; i < view.num_tiles; ++i) {
                    const TileHeader& h = header(view.tiles[i]);
                    CHECK(h.count == std::min(TILE, n - static_cast<int>(i) * TILE));
                    const auto* codes = reinterpret_cast<const float*>(view.tiles[i] + h.layout->key_codes);
                    for (int c = 0; c < h.layout->head_size; ++c) {
                        for (int t = 0; t < TILE; ++t) {
                            const float x =
                                number(static_cast<uint32_t>(blocks[i] * TILE + t), static_cast<size_t>(c), false);
                            CHECK(codes[c * TILE + t] == (t < h.count ? x : 0.f));
                        }
                    }
                }
            }
        }
    }

    // The invariants of Head and Arena, over all sequences.
    void check_structure() {
        const size_t nbytes = store_.nbytes();
        CHECK(!setting_.max_bytes || nbytes <= setting_.max_bytes);
        std::map<const uint8_t*, uint32_t> owners;
        rings_seen_.clear();
        const std::lock_guard<std::mutex> lock(store_.mutex());
        for (const auto& [id, model] : models_) {
            const Sequence& sequence = store_.sequence_locked(id);
            CHECK(sequence.next_position >= model.next_position);
            for (size_t h = 0; h < sequence.heads.size(); ++h) {
                const Head& head = sequence.heads[h];
                CHECK(head.num_tokens == static_cast<int64_t>(model.heads[h].size()));
                CHECK(head.num_target * TILE <= head.num_tokens);
                for (size_t i = 0; i < head.tiles.size(); ++i) {
                    ++owners[head.tiles[i]];
                    check_tile(head, static_cast<int64_t>(i));
                }
            }
        }
        size_t bytes = 0;
        for (const auto& [tile, count] : owners) {
            CHECK(header(tile).refs.load() == count);
            bytes += layout(tile).bytes;
        }
        CHECK(store_.reserved_bytes() >= bytes);
        for (const auto& [id, model] : models_) bytes += capture_bytes(store_.sequence_locked(id));
        CHECK(bytes == nbytes);
    }

    // Of the rings that check_structure has not seen in another sequence.
    size_t capture_bytes(const Sequence& sequence) {
        size_t bytes = 0;
        for (size_t layer = 0; layer < sequence.captures.size(); ++layer) {
            const std::shared_ptr<Capture>& ring = sequence.captures[layer];
            if (!ring || !rings_seen_.insert(ring.get()).second) continue;
            const LayerShape& shape = store_.config().layers[layer];
            bytes += ring->position.size() * static_cast<size_t>(shape.num_heads * shape.head_size + 1) * 4;
        }
        return bytes;
    }

    void check_tile(const Head& head, int64_t i) const {
        const uint8_t* tile = head.tiles[static_cast<size_t>(i)];
        const TileHeader& h = header(tile);
        const bool target = i < head.num_target;
        if (!setting_.mixed || !target) {
            CHECK(h.layout->key == (target ? setting_.key : setting_.recent));
            CHECK(h.layout->value == (target ? setting_.value : setting_.recent));
        }
        CHECK(h.count == std::clamp<int64_t>(head.num_tokens - i * TILE, 0, TILE));
        int32_t least = INT32_MAX, most = -1;
        int num_far = 0;
        int32_t positions[TILE];
        read_positions(tile, positions);
        for (int t = 0; t < h.count; ++t) {
            least = std::min(least, positions[t]);
            most = std::max(most, positions[t]);
            if (t == 0 || h.layout->listed) continue;
            CHECK(positions[t] > positions[t - 1]);
            num_far += positions[t] - positions[t - 1] > MAX_GAP;
        }
        CHECK(num_far <= 1);
        CHECK(least == h.min_position && most == h.max_position);
    }

    static constexpr uint32_t NUM_BLOCKS = 16;
    const Setting setting_;
    std::mt19937 random_;
    Store store_;
    std::vector<size_t> head_sizes_;  // of each head of all layers
    std::vector<std::vector<float>> staging_;
    std::map<int32_t, Model> models_;
    std::vector<uint8_t> tiers_;  // of the tokens of an operation
    uint32_t next_token_ = 0;
    std::set<const Capture*> rings_seen_;  // by check_structure
};

void test_traffic(int steps) {
    const Setting settings[] = {
        {"f32, no limit", Codec::f32, Codec::f32, Codec::f32, 32, 0, 0.f, ""},
        {"u8 beside f32", Codec::u8, Codec::u8, Codec::f32, 40, 0, 0.06f, ""},
        {"u8 beside f32, scalar", Codec::u8, Codec::u8, Codec::f32, 0, 0, 0.06f, "scalar"},
        {"u8 beside bf16, limited", Codec::u8, Codec::u8, Codec::bf16, 32, 150000, 0.06f, ""},
        {"bf16 whole, limited", Codec::bf16, Codec::bf16, Codec::bf16, 1, 200000, 0.005f, ""},
        {"f32 behind f16: tiles grow when they settle, limited", Codec::f32, Codec::f32, Codec::f16, 32, 200000, 0.005f,
         ""},
        {"u4 and u2, limited", Codec::u4, Codec::u2, Codec::f16, 64, 100000, 4.f, ""},
        {"u8 with recall", Codec::u8, Codec::u8, Codec::bf16, 32, 0, 0.06f, "", false, 64},
        {"recall, scalar, limited", Codec::bf16, Codec::u8, Codec::bf16, 0, 200000, 0.06f, "scalar", false, 64},
        {"mixed with recall, limited", Codec::u8, Codec::u4, Codec::f16, 40, 200000, 4.f, "", true, 96},
        {"mixed beside bf16", Codec::u8, Codec::u4, Codec::bf16, 32, 0, 4.f, "", true},
        {"mixed beside f32, limited", Codec::u8, Codec::u4, Codec::f32, 1, 200000, 4.f, "", true},
        {"mixed, scalar, limited", Codec::u8, Codec::u4, Codec::f16, 40, 150000, 4.f, "scalar", true},
    };
    for (const Setting& setting : settings) {
        for (unsigned seed = 0; seed < 3; ++seed) Traffic(setting, seed).run(steps);
        std::printf("traffic, %s: ok\n", setting.name);
    }
}

// Slots do not overlap, the limit holds, and memory goes back to the system but for a slab per size.
void test_arena(int steps) {
    constexpr size_t SLAB = size_t{2} << 20, SIZES[] = {1152, 8256, 65728};
    Arena arena(64 * SLAB);
    const auto work = [&](unsigned seed) {
        std::mt19937 random(seed);
        std::vector<std::pair<uint8_t*, size_t>> slots;
        const auto put = [&](size_t i) {
            const auto [slot, bytes] = slots[i];
            const auto mark = static_cast<uint8_t>(reinterpret_cast<uintptr_t>(slot) >> 6);
            for (size_t b = 0; b < bytes; b += 32) CHECK(slot[b] == mark);
            arena.free(slot, bytes);
            arena.unclaim(bytes);
            slots[i] = slots.back();
            slots.pop_back();
        };
        for (int i = 0; i < steps; ++i) {
            const bool grow = i / 500 % 2 == 0;  // up and down, so that slabs become empty
            if (grow == (random() % 4 != 0) || slots.empty()) {
                const size_t bytes = SIZES[random() % 3];
                if (!arena.claim(bytes)) continue;
                uint8_t* slot = arena.allocate(bytes);
                CHECK(reinterpret_cast<uintptr_t>(slot) % ALIGNMENT == 0);
                std::memset(slot, static_cast<int>(reinterpret_cast<uintptr_t>(slot) >> 6 & 255), bytes);
                slots.emplace_back(slot, bytes);
            } else {
                put(random() % slots.size());
            }
            CHECK(arena.used() <= arena.max_bytes());
        }
        while (!slots.empty()) put(slots.size() - 1);
    };
    work(0);
    CHECK(arena.used() == 0 && arena.reserved() <= std::size(SIZES) * SLAB);
    std::vector<std::thread> threads;
    for (unsigned seed = 1; seed < 4; ++seed) threads.emplace_back(work, seed);
    for (std::thread& thread : threads) thread.join();
    CHECK(arena.used() == 0 && arena.reserved() <= std::size(SIZES) * SLAB);

    Arena small(1000);
    CHECK(small.claim(1000) && !small.claim(1) && small.claim(10, 10) && small.claim(0, 0, 5000));
    small.unclaim(400);
    CHECK(!small.claim(400, 0, 1) && !small.claim(SIZE_MAX) && small.claim(399, 0, 1) && small.used() == 999);
    std::printf("arena: ok\n");
}

// Captured queries come back oldest first, as many as the ring holds.
void test_capture() {
    StoreConfig config;
    config.layers = {{2, 1, 16, 0, 1.f}};
    Store store(config, parallel);
    const int32_t id = store.create(5);
    const std::lock_guard<std::mutex> lock(store.mutex());
    Sequence& sequence = store.sequence_locked(id);
    int32_t next = 0;
    for (const int64_t n : {2, 1, 9, 0, 3, 1}) {
        std::vector<float> q;
        for (int64_t i = 0; i < n; ++i) q.insert(q.end(), 32, static_cast<float>(next + i));
        store.capture_locked(sequence, 0, q.data(), n, next);
        next += static_cast<int32_t>(n);
        std::vector<float> rows;
        std::vector<int32_t> positions;
        store.captured_locked(sequence, 0, rows, positions);
        CHECK(static_cast<int32_t>(positions.size()) == std::min(next, 5));
        for (size_t i = 0; i < positions.size(); ++i) {
            CHECK(positions[i] == next - static_cast<int32_t>(positions.size() - i));
            CHECK(rows[i * 32] == static_cast<float>(positions[i]) && rows[i * 32 + 31] == rows[i * 32]);
        }
    }
    std::printf("capture: ok\n");
}

// Threads on stores of their own, and on sequences of their own in one store.
void test_threads(int steps) {
    std::vector<std::thread> threads;
    for (unsigned seed = 0; seed < 3; ++seed) {
        threads.emplace_back(
            [=] { Traffic({"", Codec::u8, Codec::u8, Codec::bf16, 32, 150000, 0.06f, ""}, 100 + seed).run(steps); });
    }
    StoreConfig config;
    config.layers = {{2, 2, 32, 0, 1.f}, {2, 2, 32, 0, 1.f}};
    config.max_bytes = 400000;
    Store store(config, parallel);
    const int32_t document = store.create();
    std::vector<float> rows(100 * 64);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = number(static_cast<uint32_t>(i), 0, false);
    CHECK(store.reserve(document, 100));
    for (size_t layer = 0; layer < 2; ++layer) store.append(document, layer, rows.data(), rows.data(), 100, 0);
    for (int t = 0; t < 3; ++t) {
        threads.emplace_back([&] {
            for (int i = 0; i < steps / 4; ++i) {
                const int32_t twin = store.fork(document);
                if (store.reserve(twin, 30)) {
                    for (size_t layer = 0; layer < 2; ++layer)
                        store.append(twin, layer, rows.data(), rows.data(), 30, 100);
                    store.quantize_aged(twin);
                    CHECK(store.read(twin, 1, 1).positions.size() == 130);
                    const Dump dump = store.dump(twin);
                    try {
                        store.release(store.load(dump.heads, dump.tiles.data(), dump.tiles.size()));
                    } catch (const StoreFull&) {
                    }
                }
                CHECK(store.nbytes() <= 400000);
                store.release(twin);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    store.release(document);
    CHECK(store.nbytes() == 0);
    std::printf("threads: ok\n");
}

}  // namespace

// Argument: steps of each random run.
int main(int argc, char** argv) {
    const int steps = argc > 1 ? std::atoi(argv[1]) : 400;
    test_arena(10 * steps);
    test_capture();
    test_traffic(steps);
    test_threads(steps);
    return 0;
}
