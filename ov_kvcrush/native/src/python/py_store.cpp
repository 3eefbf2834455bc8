#include "python/py_store.hpp"

#include <climits>
#include <cmath>

#include "op/threads.hpp"
#include "python/arguments.hpp"
#include "store/require.hpp"

namespace crush {
namespace {

using ReleaseGil = nanobind::gil_scoped_release;

// 0, a fraction below 1, or a number of tokens.
RecallConfig recall_of(double tokens) {
    RecallConfig recall;
    if (tokens > 0 && tokens < 1) {
        recall.fraction = tokens;
    } else {
        require(tokens == 0 || (tokens >= 64 && tokens <= INT_MAX && tokens == std::floor(tokens)),
                "recall_tokens must be 0, a fraction below 1 or a number of tokens of at least 64", tokens);
        recall.tokens = static_cast<int64_t>(tokens);
    }
    return recall;
}

StoreConfig make_config(const std::vector<LayerArgument>& layers, const std::string& key, const std::string& value,
                        const std::string& recent, int64_t recent_tokens, int64_t group_size, int64_t max_bytes,
                        const std::string& isa, double recall_tokens) {
    StoreConfig c;
    for (const LayerArgument& layer : layers) c.layers.push_back(layer_shape_of(layer));
    c.key = codec_of("key", key);
    c.value = codec_of("value", value);
    c.recent = codec_of("recent", recent, NUM_FLOAT_CODECS);
    c.recent_tokens = to_int("recent_tokens", recent_tokens);
    c.group_size = to_int("group_size", group_size);
    c.max_bytes = to_size("max_bytes", max_bytes);
    c.isa = isa;
    c.recall = recall_of(recall_tokens);
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

// Precisions [heads, 2], or [heads, tiers, 2] where there may be tiers.
Wanted wanted_of(const Store& store, const Input& array, bool with_tiers) {
    const auto num_heads = static_cast<int64_t>(store.num_heads());
    const auto* codecs = with_tiers ? data_of<uint8_t>(array, "precisions", {num_heads, ANY, 2})
                                    : data_of<uint8_t>(array, "precisions", {num_heads, 2});
    Wanted wanted;
    if (with_tiers) wanted.num_tiers = array.shape(1);
    for (size_t i = 0; i < store.num_heads() * wanted.num_tiers; ++i, codecs += 2) {
        wanted.precisions.push_back({static_cast<Codec>(codecs[0]), static_cast<Codec>(codecs[1])});
    }
    return wanted;
}

std::optional<Wanted> wanted_of(const Store& store, const std::optional<Input>& precisions,
                                const std::optional<Input>& tiers, const Selection* selection) {
    if (tiers && !(precisions && selection)) {
        throw std::invalid_argument("tiers must be given together with precisions and indices, got them alone");
    }
    if (!precisions) return std::nullopt;
    Wanted wanted = wanted_of(store, *precisions, tiers.has_value());
    if (tiers) wanted.tiers = data_of<uint8_t>(*tiers, "tiers", {static_cast<int64_t>(selection->num_indices)});
    return wanted;
}

template <class T>
const T* pointer(const std::optional<T>& value) {
    return value ? &*value : nullptr;
}

}  // namespace

// -- lifetime ---------------------------------------------------------------------------------------------------------

PyStore::PyStore(const std::vector<LayerArgument>& layers, const std::string& key, const std::string& value,
                 const std::string& recent, int64_t recent_tokens, int64_t group_size, int64_t max_bytes,
                 const std::string& isa, double recall_tokens)
    : store_(std::make_shared<Store>(
          make_config(layers, key, value, recent, recent_tokens, group_size, max_bytes, isa, recall_tokens),
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
    const auto wanted = wanted_of(*s, precisions, std::nullopt, nullptr);
    const ReleaseGil release;
    return s->create(capture_rows, wanted ? &wanted->precisions : nullptr);
}

void PyStore::set_precisions(int64_t seq, const Input& precisions) {
    const auto s = store();
    const Wanted wanted = wanted_of(*s, precisions, false);
    const ReleaseGil release;
    s->set_precisions(to_id(seq), wanted.precisions);
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

void PyStore::crop(int64_t seq, int64_t num_tokens) {
    const auto s = store();
    const ReleaseGil release;
    s->crop(to_id(seq), num_tokens);
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
                             int64_t promised, const std::optional<Input>& precisions,
                             const std::optional<Input>& tiers) {
    const auto s = store();
    const size_t kept = to_size("promised", promised);
    if (offsets.has_value() != indices.has_value()) {
        throw std::invalid_argument("offsets must be given together with indices, got one of them");
    }
    const auto selection = offsets ? std::optional<Selection>(selection_of(*offsets, *indices)) : std::nullopt;
    const auto wanted = wanted_of(*s, precisions, tiers, pointer(selection));
    const ReleaseGil release;
    s->commit_prefill(to_id(seq), pointer(selection), kept, pointer(wanted));
}

Output<int32_t> PyStore::compact(int64_t seq, const Input& offsets, const Input& indices,
                                 const std::optional<Input>& precisions, const std::optional<Input>& tiers) {
    const auto s = store();
    const Selection selection = selection_of(offsets, indices);
    const auto wanted = wanted_of(*s, precisions, tiers, &selection);
    std::vector<int32_t> order;
    {
        const ReleaseGil release;
        order = s->compact(to_id(seq), selection, pointer(wanted));
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
    const auto num_heads = static_cast<int64_t>(s->num_heads());
    const int num_axes = nanobind::hasattr(num_tokens, "ndim") ? nanobind::cast<int>(num_tokens.attr("ndim")) : 0;
    const bool with_tiers = precisions && precisions->ndim() == 3;
    std::optional<Wanted> wanted;
    if (precisions) wanted = wanted_of(*s, *precisions, with_tiers);
    if (num_axes == 0 && !with_tiers) {
        int64_t number;
        if (!nanobind::try_cast(num_tokens, number)) {
            throw nanobind::type_error("num_tokens must be an int or an array of int64");
        }
        return s->bytes_for(number, wanted ? &wanted->precisions : nullptr);
    }
    if (num_axes == 0) {
        throw std::invalid_argument("num_tokens must be an array where precisions have tiers, got a number");
    }
    const auto array = nanobind::cast<Input>(num_tokens);
    const auto* numbers =
        with_tiers ? data_of<int64_t>(array, "num_tokens", {num_heads, static_cast<int64_t>(wanted->num_tiers)})
                   : data_of<int64_t>(array, "num_tokens", {num_heads});
    return s->bytes_for(std::vector<int64_t>(numbers, numbers + array.size()), pointer(wanted));
}

}  // namespace crush
