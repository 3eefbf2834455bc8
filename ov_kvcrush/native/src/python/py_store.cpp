#include "python/py_store.hpp"

#include <climits>

#include "op/threads.hpp"
#include "python/arguments.hpp"
#include "store/require.hpp"

namespace crush {
namespace {

using ReleaseGil = nanobind::gil_scoped_release;

StoreConfig make_config(const std::vector<LayerArgument>& layers, const std::string& key, const std::string& value,
                        const std::string& recent, int64_t recent_tokens, int64_t group_size, int64_t max_bytes,
                        const std::string& isa) {
    StoreConfig c;
    for (const LayerArgument& layer : layers) c.layers.push_back(layer_shape_of(layer));
    c.key = codec_of("key", key);
    c.value = codec_of("value", value);
    c.recent = codec_of("recent", recent, NUM_FLOAT_CODECS);
    c.recent_tokens = to_int("recent_tokens", recent_tokens);
    c.group_size = to_int("group_size", group_size);
    c.max_bytes = to_size("max_bytes", max_bytes);
    c.isa = isa;
    return c;
}

Selection selection_of(const Input& offsets, const Input& indices) {
    Selection s{};
    s.offsets = data_of<int64_t>(offsets, "offsets", {ANY});
    s.num_offsets = offsets.shape(0);
    s.indices = data_of<int32_t>(indices, "indices", {ANY});
    s.num_indices = indices.shape(0);
    return s;
}

Precisions precisions_of(const Store& store, const Input& array) {
    const auto num_heads = static_cast<int64_t>(store.num_heads());
    const auto* codecs = data_of<uint8_t>(array, "precisions", {num_heads, 2});
    Precisions pairs;
    for (int64_t h = 0; h < num_heads; ++h, codecs += 2) {
        pairs.push_back({static_cast<Codec>(codecs[0]), static_cast<Codec>(codecs[1])});
    }
    return pairs;
}

std::optional<Precisions> precisions_of(const Store& store, const std::optional<Input>& array) {
    return array ? std::optional<Precisions>(precisions_of(store, *array)) : std::nullopt;
}

const Precisions* pointer(const std::optional<Precisions>& precisions) { return precisions ? &*precisions : nullptr; }

}  // namespace

// -- lifetime ---------------------------------------------------------------------------------------------------------

PyStore::PyStore(const std::vector<LayerArgument>& layers, const std::string& key, const std::string& value,
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
    // Other threads that still use the store must not read arrays that may be gone. We hold the GIL here; that cannot
    // deadlock, as no holder of the store's lock waits for the GIL.
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
    const ReleaseGil release;
    return s->nbytes();
}

size_t PyStore::num_sequences() const {
    const auto s = store();
    const ReleaseGil release;
    return s->num_sequences();
}

// -- sequences --------------------------------------------------------------------------------------------------------

int32_t PyStore::create(int64_t capture_rows, const std::optional<Input>& precisions) {
    const auto s = store();
    const auto pairs = precisions_of(*s, precisions);
    const ReleaseGil release;
    return s->create(capture_rows, pointer(pairs));
}

void PyStore::set_precisions(int64_t seq, const Input& precisions) {
    const auto s = store();
    const Precisions pairs = precisions_of(*s, precisions);
    const ReleaseGil release;
    s->set_precisions(to_id(seq), pairs);
}

Output<uint8_t> PyStore::precisions(int64_t seq) const {
    const auto s = store();
    Precisions pairs;
    {
        const ReleaseGil release;
        pairs = s->precisions(to_id(seq));
    }
    std::vector<uint8_t> codecs;
    for (const CodecPair& pair : pairs) {
        codecs.insert(codecs.end(), {static_cast<uint8_t>(pair.key), static_cast<uint8_t>(pair.value)});
    }
    return to_numpy(std::move(codecs), {s->num_heads(), 2});
}

void PyStore::release(int64_t seq) {
    const auto s = store();
    const ReleaseGil release;
    s->release(to_id(seq));
}

int32_t PyStore::fork(int64_t seq, std::optional<int64_t> num_tokens) {
    const auto s = store();
    const ReleaseGil release;
    return s->fork(to_id(seq), num_tokens);
}

bool PyStore::reserve(int64_t seq, int64_t num_tokens, int64_t promised) {
    const auto s = store();
    const size_t kept = to_size("promised", promised);
    const ReleaseGil release;
    return s->reserve(to_id(seq), num_tokens, kept);
}

int64_t PyStore::free_slots(int64_t seq) const {
    const auto s = store();
    const ReleaseGil release;
    return s->free_slots(to_id(seq));
}

void PyStore::quantize_aged(int64_t seq) {
    const auto s = store();
    const ReleaseGil release;
    s->quantize_aged(to_id(seq));
}

void PyStore::set_staging(int64_t layer, const Writable& keys, const Writable& values, int64_t num_blocks,
                          const std::string& precision) {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    Staging staging;
    staging.codec = codec_of("precision", precision, NUM_FLOAT_CODECS);
    staging.num_blocks = to_size("num_blocks", num_blocks);
    require(num_blocks <= INT_MAX, "num_blocks must be below 2147483648", num_blocks);
    const int64_t bytes = num_blocks * shape.num_kv_heads * TILE * shape.head_size * code_bits(staging.codec) / 8;
    staging.keys = data_of<uint8_t>(keys, "keys", {bytes});
    staging.values = data_of<uint8_t>(values, "values", {bytes});
    // Holding the GIL, so that the arrays kept are those that the store was given last.
    s->set_staging(static_cast<size_t>(layer), staging);
    staging_[static_cast<size_t>(layer)] = {keys, values};
}

void PyStore::attach_prefill(int64_t seq, const Input& blocks, int64_t num_tokens) {
    const auto s = store();
    const auto* data = data_of<int32_t>(blocks, "blocks", {ANY});
    std::vector<int32_t> ids(data, data + blocks.shape(0));
    const ReleaseGil release;
    s->attach_prefill(to_id(seq), std::move(ids), num_tokens);
}

void PyStore::commit_prefill(int64_t seq, const std::optional<Input>& offsets, const std::optional<Input>& indices,
                             int64_t promised, const std::optional<Input>& precisions) {
    const auto s = store();
    const size_t kept = to_size("promised", promised);
    const auto pairs = precisions_of(*s, precisions);
    if (offsets.has_value() != indices.has_value()) {
        throw std::invalid_argument("offsets must be given together with indices, got one of them");
    }
    if (!offsets) {
        const ReleaseGil release;
        s->commit_prefill(to_id(seq), nullptr, kept, pointer(pairs));
        return;
    }
    const Selection selection = selection_of(*offsets, *indices);
    const ReleaseGil release;
    s->commit_prefill(to_id(seq), &selection, kept, pointer(pairs));
}

Output<int32_t> PyStore::compact(int64_t seq, const Input& offsets, const Input& indices,
                                 const std::optional<Input>& precisions) {
    const auto s = store();
    const auto pairs = precisions_of(*s, precisions);
    const Selection selection = selection_of(offsets, indices);
    std::vector<int32_t> order;
    {
        const ReleaseGil release;
        order = s->compact(to_id(seq), selection, pointer(pairs));
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
    const ReleaseGil release;
    s->append(to_id(seq), static_cast<size_t>(layer), keys, values, rows, first_position);
}

std::pair<Output<int64_t>, Output<uint8_t>> PyStore::dump(int64_t seq) const {
    const auto s = store();
    Dump dump;
    std::vector<int64_t> heads;
    {
        const ReleaseGil release;
        dump = s->dump(to_id(seq));
        for (const DumpedHead& h : dump.heads) {
            heads.insert(heads.end(), {h.num_tokens, h.num_target, h.bytes, h.next_position, h.key, h.value});
        }
    }
    const size_t num_heads = dump.heads.size(), num_bytes = dump.tiles.size();
    return {to_numpy(std::move(heads), {num_heads, 6}), to_numpy(std::move(dump.tiles), {num_bytes})};
}

int32_t PyStore::load(const Input& heads, const Input& tiles, int64_t capture_rows, int64_t promised) {
    const auto s = store();
    const size_t kept = to_size("promised", promised);
    const auto* numbers = data_of<int64_t>(heads, "heads", {ANY, 6});
    const auto* bytes = data_of<uint8_t>(tiles, "tiles", {ANY});
    const size_t num_bytes = tiles.shape(0);
    std::vector<DumpedHead> rows;
    for (size_t h = 0; h < heads.shape(0); ++h, numbers += 6) {
        rows.push_back({numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]});
    }
    const ReleaseGil release;
    return s->load(rows, bytes, num_bytes, capture_rows, kept);
}

// -- contents ----------------------------------------------------------------------------------------------------

int64_t PyStore::num_tokens(int64_t seq, int64_t layer, int64_t head) const {
    const auto s = store();
    const size_t l = to_size("layer", layer), h = to_size("head", head);
    const ReleaseGil release;
    return s->num_tokens(to_id(seq), l, h);
}

Output<int32_t> PyStore::positions(int64_t seq, int64_t layer, int64_t head) const {
    const auto s = store();
    const size_t l = to_size("layer", layer), h = to_size("head", head);
    std::vector<int32_t> positions;
    {
        const ReleaseGil release;
        positions = s->positions(to_id(seq), l, h);
    }
    const size_t n = positions.size();
    return to_numpy(std::move(positions), {n});
}

std::pair<Output<float>, Output<float>> PyStore::read(int64_t seq, int64_t layer, int64_t head) const {
    const auto s = store();
    const auto width = static_cast<size_t>(layer_shape(*s, layer).head_size);
    const size_t h = to_size("head", head);
    HeadTokens tokens;
    {
        const ReleaseGil release;
        tokens = s->read(to_id(seq), static_cast<size_t>(layer), h);
    }
    const size_t n = tokens.positions.size();
    return {to_numpy(std::move(tokens.k), {n, width}), to_numpy(std::move(tokens.v), {n, width})};
}

size_t PyStore::nbytes_of(int64_t seq) const {
    const auto s = store();
    const ReleaseGil release;
    return s->nbytes_of(to_id(seq));
}

size_t PyStore::capture_bytes(int64_t rows, std::optional<int64_t> seq) const {
    const auto s = store();
    const ReleaseGil release;
    return s->capture_bytes(rows, seq ? std::optional<int32_t>(to_id(*seq)) : std::nullopt);
}

namespace {

std::vector<int32_t> to_ids(const std::vector<int64_t>& sequences) {
    std::vector<int32_t> ids;
    for (const int64_t seq : sequences) ids.push_back(to_id(seq));
    return ids;
}

}  // namespace

size_t PyStore::nbytes_of_all(const std::vector<int64_t>& ids) const {
    const auto s = store();
    const ReleaseGil release;
    return s->nbytes_of_all(to_ids(ids)).held;
}

size_t PyStore::nbytes_freed_by(const std::vector<int64_t>& ids) const {
    const auto s = store();
    const ReleaseGil release;
    return s->nbytes_of_all(to_ids(ids)).freed;
}

size_t PyStore::bytes_for(const nanobind::object& num_tokens, const std::optional<Input>& precisions) const {
    const auto s = store();
    const auto pairs = precisions_of(*s, precisions);
    int64_t number;
    // An array with one number would be taken for it.
    if (!nanobind::hasattr(num_tokens, "ndim") || nanobind::cast<int>(num_tokens.attr("ndim")) == 0) {
        if (!nanobind::try_cast(num_tokens, number)) {
            throw nanobind::type_error("num_tokens must be an int or an array of int64 (KV heads of all layers,)");
        }
        return s->bytes_for(number, pointer(pairs));
    }
    const auto array = nanobind::cast<Input>(num_tokens);
    const auto num_heads = static_cast<int64_t>(s->num_heads());
    const auto* numbers = data_of<int64_t>(array, "num_tokens", {num_heads});
    return s->bytes_for(std::vector<int64_t>(numbers, numbers + num_heads), pointer(pairs));
}

}  // namespace crush
