#include "python/py_store.hpp"

#include <algorithm>
#include <array>
#include <climits>
#include <numeric>

#include "kernels/attention.hpp"
#include "op/threads.hpp"
#include "store/require.hpp"
#include "store/tokens.hpp"

namespace nb = nanobind;

namespace crush {
namespace {

using Release = nb::gil_scoped_release;

constexpr std::array<const char*, 6> CODEC_NAMES{"f32", "bf16", "f16", "u8", "u4", "u2"};  // by Codec

Codec codec_of(const char* field, const std::string& name, size_t num_allowed = CODEC_NAMES.size()) {
    std::string allowed;
    for (size_t i = 0; i < num_allowed; ++i) {
        if (name == CODEC_NAMES[i]) return static_cast<Codec>(i);
        allowed += (i ? ", " : "") + std::string(CODEC_NAMES[i]);
    }
    throw std::invalid_argument(std::string(field) + " must be one of " + allowed + ", got " + name);
}

constexpr size_t NUM_FLOAT_CODECS = 3;

int narrow(const char* field, int64_t number) {
    require(number >= INT_MIN && number <= INT_MAX, std::string(field) + " must be a 32-bit number", number);
    return static_cast<int>(number);
}

size_t size_of(const char* field, int64_t number) {
    require(number >= 0, std::string(field) + " must be at least 0", number);
    return static_cast<size_t>(number);
}

// No sequence has a negative id.
int32_t id_of(int64_t seq) { return seq >= 0 && seq <= INT32_MAX ? static_cast<int32_t>(seq) : -1; }

LayerShape shape_of(const PyStore::Layer& layer) {
    const auto& [num_heads, num_kv_heads, head_size, window, scale] = layer;
    return {narrow("num_heads", num_heads), narrow("num_kv_heads", num_kv_heads), narrow("head_size", head_size),
            narrow("window", window), static_cast<float>(scale)};
}

StoreConfig make_config(const std::vector<PyStore::Layer>& layers, const std::string& key, const std::string& value,
                        const std::string& recent, int64_t recent_tokens, int64_t group_size, int64_t max_bytes,
                        const std::string& isa) {
    StoreConfig c;
    for (const PyStore::Layer& layer : layers) c.layers.push_back(shape_of(layer));
    c.key = codec_of("key", key);
    c.value = codec_of("value", value);
    c.recent = codec_of("recent", recent, NUM_FLOAT_CODECS);
    c.recent_tokens = narrow("recent_tokens", recent_tokens);
    c.group_size = narrow("group_size", group_size);
    c.max_bytes = size_of("max_bytes", max_bytes);
    c.isa = isa;
    return c;
}

int64_t query_width(const LayerShape& shape) { return static_cast<int64_t>(shape.num_heads) * shape.head_size; }

Selection selection_of(const Input& offsets, const Input& indices) {
    Selection s{};
    s.offsets = data_of<int64_t>(offsets, "offsets", {ANY});
    s.num_offsets = offsets.shape(0);
    s.indices = data_of<int32_t>(indices, "indices", {ANY});
    s.num_indices = indices.shape(0);
    return s;
}

// Rows of the spans are within num_rows, and no row belongs to two of them: they are written in parallel.
void check_spans(const std::vector<PyStore::Span>& spans, int64_t num_rows) {
    std::vector<std::pair<int64_t, int64_t>> rows;
    for (const auto& [seq, begin, count, first_position] : spans) {
        require(count >= 1 && count <= num_rows, "num_rows must be in 1.." + std::to_string(num_rows), count);
        require(begin >= 0 && begin <= num_rows - count, "row_begin must be in 0.." + std::to_string(num_rows - count),
                begin);
        require(first_position >= 0 && first_position <= INT_MAX - count, "first_position must be at least 0",
                first_position);
        rows.emplace_back(begin, begin + count);
    }
    std::sort(rows.begin(), rows.end());
    for (size_t i = 1; i < rows.size(); ++i) {
        require(rows[i].first >= rows[i - 1].second, "spans must not overlap", rows[i].first);
    }
}

Reduce reduce_of(const std::string& name) {
    if (name == "mean") return Reduce::mean;
    if (name == "max") return Reduce::max;
    if (name == "sum_squares") return Reduce::sum_squares;
    throw std::invalid_argument("reduce must be one of mean, max, sum_squares, got " + name);
}

}  // namespace

// -- life -------------------------------------------------------------------------------------------------------------

PyStore::PyStore(const std::vector<Layer>& layers, const std::string& key, const std::string& value,
                 const std::string& recent, int64_t recent_tokens, int64_t group_size, int64_t max_bytes,
                 const std::string& isa)
    : store_(std::make_shared<Store>(make_config(layers, key, value, recent, recent_tokens, group_size, max_bytes, isa),
                                     parallel_for())),
      id_(StoreRegistry::add(store_)),
      staging_(layers.size()) {}

PyStore::~PyStore() { close(); }

void PyStore::close() {
    if (!store_) return;
    StoreRegistry::remove(id_);
    // Whoever still works on the store must not look at arrays that may be gone. The interpreter is held: nobody who
    // has the store's lock waits for it.
    for (size_t layer = 0; layer < staging_.size(); ++layer) store_->set_staging(layer, {});
    store_.reset();
    staging_.clear();
}

std::shared_ptr<Store> PyStore::store() const {
    if (!store_) throw std::invalid_argument("store must be open, got one that was closed");
    return store_;
}

const LayerShape& PyStore::layer_shape(const Store& store, int64_t layer) const {
    const std::vector<LayerShape>& layers = store.config().layers;
    require(layer >= 0 && static_cast<size_t>(layer) < layers.size(),
            "layer must be in 0.." + std::to_string(layers.size() - 1), layer);
    return layers[static_cast<size_t>(layer)];
}

int32_t PyStore::id() const {
    store();
    return id_;
}
std::string PyStore::isa() const { return store()->kernels().isa; }
size_t PyStore::max_bytes() const { return store()->config().max_bytes; }
size_t PyStore::reserved_bytes() const { return store()->reserved_bytes(); }

size_t PyStore::nbytes() const {
    const auto s = store();
    const Release release;
    return s->nbytes();
}

size_t PyStore::num_sequences() const {
    const auto s = store();
    const Release release;
    return s->num_sequences();
}

// -- sequences --------------------------------------------------------------------------------------------------------

int32_t PyStore::create(int64_t capture_rows) {
    const auto s = store();
    const Release release;
    return s->create(capture_rows);
}

void PyStore::release(int64_t seq) {
    const auto s = store();
    const Release release;
    s->release(id_of(seq));
}

int32_t PyStore::fork(int64_t seq, std::optional<int64_t> num_tokens) {
    const auto s = store();
    const Release release;
    return s->fork(id_of(seq), num_tokens);
}

bool PyStore::reserve(int64_t seq, int64_t num_tokens, int64_t keep_free) {
    const auto s = store();
    const size_t free = size_of("keep_free", keep_free);
    const Release release;
    return s->reserve(id_of(seq), num_tokens, free);
}

int64_t PyStore::free_slots(int64_t seq) const {
    const auto s = store();
    const Release release;
    return s->free_slots(id_of(seq));
}

void PyStore::quantize_aged(int64_t seq) {
    const auto s = store();
    const Release release;
    s->quantize_aged(id_of(seq));
}

void PyStore::set_staging(int64_t layer, const Writable& keys, const Writable& values, int64_t num_blocks,
                          const std::string& precision) {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    Staging staging;
    staging.codec = codec_of("precision", precision, NUM_FLOAT_CODECS);
    staging.num_blocks = size_of("num_blocks", num_blocks);
    require(num_blocks <= INT_MAX, "num_blocks must be below 2147483648", num_blocks);
    const int64_t bytes = num_blocks * shape.num_kv_heads * TILE * shape.head_size * code_bits(staging.codec) / 8;
    staging.keys = data_of<uint8_t>(keys, "keys", {bytes});
    staging.values = data_of<uint8_t>(values, "values", {bytes});
    // With the interpreter held, so that the arrays kept are those that the store was given last.
    s->set_staging(static_cast<size_t>(layer), staging);
    staging_[static_cast<size_t>(layer)] = {keys, values};
}

void PyStore::attach_prefill(int64_t seq, const Input& blocks, int64_t num_tokens) {
    const auto s = store();
    const auto* data = data_of<int32_t>(blocks, "blocks", {ANY});
    std::vector<int32_t> ids(data, data + blocks.shape(0));
    const Release release;
    s->attach_prefill(id_of(seq), std::move(ids), num_tokens);
}

void PyStore::commit_prefill(int64_t seq, const std::optional<Input>& offsets, const std::optional<Input>& indices,
                             int64_t keep_free) {
    const auto s = store();
    const size_t free = size_of("keep_free", keep_free);
    if (offsets.has_value() != indices.has_value()) {
        throw std::invalid_argument("offsets must be given together with indices, got one of them");
    }
    if (!offsets) {
        const Release release;
        s->commit_prefill(id_of(seq), nullptr, free);
        return;
    }
    const Selection selection = selection_of(*offsets, *indices);
    const Release release;
    s->commit_prefill(id_of(seq), &selection, free);
}

Output<int32_t> PyStore::compact(int64_t seq, const Input& offsets, const Input& indices) {
    const auto s = store();
    const Selection selection = selection_of(offsets, indices);
    std::vector<int32_t> order;
    {
        const Release release;
        order = s->compact(id_of(seq), selection);
    }
    const size_t size = order.size();
    return to_numpy(std::move(order), {size});
}

void PyStore::append(int64_t seq, int64_t layer, const Input& k, const Input& v, int64_t first_position) {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const int64_t width = static_cast<int64_t>(shape.num_kv_heads) * shape.head_size;
    const float* keys = data_of<float>(k, "k", {ANY, width});
    const auto rows = static_cast<int64_t>(k.shape(0));
    const float* values = data_of<float>(v, "v", {rows, width});
    const Release release;
    s->append(id_of(seq), static_cast<size_t>(layer), keys, values, rows, first_position);
}

std::pair<Output<int64_t>, Output<uint8_t>> PyStore::dump(int64_t seq) const {
    const auto s = store();
    Dump dump;
    std::vector<int64_t> heads;
    {
        const Release release;
        dump = s->dump(id_of(seq));
        for (const DumpedHead& h : dump.heads) {
            heads.insert(heads.end(), {h.num_tokens, h.num_target, h.bytes, h.next_position});
        }
    }
    const size_t num_heads = dump.heads.size(), num_bytes = dump.tiles.size();
    return {to_numpy(std::move(heads), {num_heads, 4}), to_numpy(std::move(dump.tiles), {num_bytes})};
}

int32_t PyStore::load(const Input& heads, const Input& tiles, int64_t capture_rows, int64_t keep_free) {
    const auto s = store();
    const size_t free = size_of("keep_free", keep_free);
    const auto* numbers = data_of<int64_t>(heads, "heads", {ANY, 4});
    const auto* bytes = data_of<uint8_t>(tiles, "tiles", {ANY});
    const size_t num_bytes = tiles.shape(0);
    std::vector<DumpedHead> rows;
    for (size_t h = 0; h < heads.shape(0); ++h, numbers += 4) {
        rows.push_back({numbers[0], numbers[1], numbers[2], numbers[3]});
    }
    const Release release;
    return s->load(rows, bytes, num_bytes, capture_rows, free);
}

// -- attention --------------------------------------------------------------------------------------------------------

Output<float> PyStore::attend(int64_t layer, const std::vector<Span>& spans, const Input& q) const {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const float* queries = data_of<float>(q, "q", {ANY, query_width(shape)});
    const size_t num_rows = q.shape(0);
    check_spans(spans, static_cast<int64_t>(num_rows));
    std::vector<float> out(num_rows * static_cast<size_t>(query_width(shape)), 0.f);
    {
        const Release release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        std::vector<std::vector<HeadView>> views;
        std::vector<AttendSpan> located;
        for (const auto& [seq, begin, count, first_position] : spans) {
            views.push_back(s->views_locked(s->sequence_locked(id_of(seq)), static_cast<size_t>(layer)));
            located.push_back({views.back().data(), static_cast<size_t>(begin), static_cast<size_t>(count),
                               static_cast<int32_t>(first_position)});
        }
        crush::attend(s->kernels(), shape, located, queries, out.data(), num_threads(), parallel_for());
    }
    return to_numpy(std::move(out), {num_rows, static_cast<size_t>(query_width(shape))});
}

Output<float> PyStore::prefill(int64_t layer, const std::vector<Span>& spans, const Input& q, const Input& k,
                               const Input& v) {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const float* queries = data_of<float>(q, "q", {ANY, query_width(shape)});
    const auto num_rows = static_cast<int64_t>(q.shape(0)), width = int64_t{shape.num_kv_heads} * shape.head_size;
    const float *keys = data_of<float>(k, "k", {num_rows, width}), *values = data_of<float>(v, "v", {num_rows, width});
    check_spans(spans, num_rows);
    std::vector<float> out(static_cast<size_t>(num_rows * query_width(shape)), 0.f);
    {
        const Release release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        std::vector<PrefillSpan> located;
        for (const auto& [seq, begin, count, first_position] : spans)
            located.push_back({&s->sequence_locked(id_of(seq)), static_cast<size_t>(begin), static_cast<size_t>(count),
                               static_cast<int32_t>(first_position)});
        s->prefill_locked(static_cast<size_t>(layer), located, queries, keys, values, out.data(), num_threads());
    }
    return to_numpy(std::move(out), {static_cast<size_t>(num_rows), static_cast<size_t>(query_width(shape))});
}

Output<float> PyStore::scores(int64_t seq, int64_t layer, const Input& q, const Input& positions,
                              const std::string& reduce) const {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const Reduce how = reduce_of(reduce);
    const auto* row_positions = data_of<int32_t>(positions, "positions", {ANY});
    const size_t num_rows = positions.shape(0);
    require(num_rows >= 1, "positions must hold at least one row", num_rows);
    const float* queries = data_of<float>(q, "q", {static_cast<int64_t>(num_rows), query_width(shape)});
    std::vector<float> out;
    {
        const Release release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        const Sequence& sequence = s->sequence_locked(id_of(seq));
        s->scores_locked(sequence, static_cast<size_t>(layer), queries, row_positions, num_rows, how, out);
    }
    const size_t size = out.size();
    return to_numpy(std::move(out), {size});
}

void PyStore::set_capture(int64_t seq, int64_t capture_rows) {
    const auto s = store();
    const Release release;
    s->set_capture(id_of(seq), capture_rows);
}

std::pair<Output<float>, Output<int32_t>> PyStore::captured(int64_t seq, int64_t layer) const {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const auto width = static_cast<size_t>(query_width(shape));
    std::vector<float> rows;
    std::vector<int32_t> positions;
    {
        const Release release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        s->captured_locked(s->sequence_locked(id_of(seq)), static_cast<size_t>(layer), rows, positions);
    }
    const size_t n = positions.size();
    return {to_numpy(std::move(rows), {n, width}), to_numpy(std::move(positions), {n})};
}

// -- what is in it ----------------------------------------------------------------------------------------------------

int64_t PyStore::num_tokens(int64_t seq, int64_t layer, int64_t head) const {
    const auto s = store();
    const size_t l = size_of("layer", layer), h = size_of("head", head);
    const Release release;
    return s->num_tokens(id_of(seq), l, h);
}

Output<int32_t> PyStore::positions(int64_t seq, int64_t layer, int64_t head) const {
    const auto s = store();
    const size_t l = size_of("layer", layer), h = size_of("head", head);
    std::vector<int32_t> positions;
    {
        const Release release;
        positions = s->positions(id_of(seq), l, h);
    }
    const size_t n = positions.size();
    return to_numpy(std::move(positions), {n});
}

std::pair<Output<float>, Output<float>> PyStore::read(int64_t seq, int64_t layer, int64_t head) const {
    const auto s = store();
    const auto width = static_cast<size_t>(layer_shape(*s, layer).head_size);
    const size_t h = size_of("head", head);
    HeadTokens tokens;
    {
        const Release release;
        tokens = s->read(id_of(seq), static_cast<size_t>(layer), h);
    }
    const size_t n = tokens.positions.size();
    return {to_numpy(std::move(tokens.k), {n, width}), to_numpy(std::move(tokens.v), {n, width})};
}

size_t PyStore::nbytes_of(int64_t seq) const {
    const auto s = store();
    const Release release;
    return s->nbytes_of(id_of(seq));
}

size_t PyStore::bytes_for(int64_t num_tokens) const { return store()->bytes_for(num_tokens); }

// -- codecs -----------------------------------------------------------------------------------------------------------

size_t tile_bytes(const std::string& key, const std::string& value, int64_t head_size, int64_t group_size,
                  bool listed) {
    return make_layout(codec_of("key", key), codec_of("value", value), narrow("head_size", head_size),
                       narrow("group_size", group_size), listed)
        .bytes;
}

bool can_prefill(const std::vector<PyStore::Layer>& layers, const std::string& staging, const std::string& isa) {
    const Codec codec = codec_of("staging", staging, NUM_FLOAT_CODECS);
    const Kernels& chosen = kernels(isa);
    return std::all_of(layers.begin(), layers.end(), [&](const PyStore::Layer& layer) {
        const LayerShape shape = shape_of(layer);
        require(shape.num_kv_heads >= 1 && shape.num_heads % shape.num_kv_heads == 0,
                "num_heads must be a multiple of num_kv_heads", shape.num_heads);
        return can_prefill(chosen, shape, codec);
    });
}

std::pair<Output<float>, Output<float>> encode_decode(const std::string& key, const std::string& value,
                                                      int64_t group_size, const Input& k, const Input& v,
                                                      const std::string& isa) {
    const float* keys = data_of<float>(k, "k", {ANY, ANY});
    const auto n = static_cast<int64_t>(k.shape(0)), width = static_cast<int64_t>(k.shape(1));
    const float* values = data_of<float>(v, "v", {n, width});
    require(n >= 1 && n <= TILE, "k must have 1..32 rows", n);
    const TileLayout layout = make_layout(codec_of("key", key), codec_of("value", value), narrow("head_size", width),
                                          narrow("group_size", group_size), false);
    const Kernels& kernels = crush::kernels(isa);
    const auto size = static_cast<size_t>(n * width);

    const auto buffer = std::make_unique<TokenBuffer>();
    std::copy(keys, keys + size, buffer->k);
    std::copy(values, values + size, buffer->v);
    std::iota(buffer->positions, buffer->positions + TILE, 0);
    buffer->count = static_cast<int>(n);
    std::vector<uint8_t> memory(layout.bytes + ALIGNMENT);
    uint8_t* tile = memory.data() + (ALIGNMENT - reinterpret_cast<uintptr_t>(memory.data()) % ALIGNMENT) % ALIGNMENT;
    write_tile(kernels, tile, layout, *buffer);
    std::vector<float> back_k(static_cast<size_t>(TILE * width)), back_v(back_k.size());
    kernels.decode(tile, back_k.data(), back_v.data());
    back_k.resize(size);
    back_v.resize(size);
    const auto rows = static_cast<size_t>(n), columns = static_cast<size_t>(width);
    return {to_numpy(std::move(back_k), {rows, columns}), to_numpy(std::move(back_v), {rows, columns})};
}

}  // namespace crush
