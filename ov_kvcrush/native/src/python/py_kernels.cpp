#include "python/py_kernels.hpp"

#include <algorithm>
#include <memory>
#include <numeric>

#include "store/require.hpp"
#include "store/store.hpp"
#include "store/tokens.hpp"

namespace crush {

size_t tile_bytes(const std::string& key, const std::string& value, int64_t head_size, int64_t group_size, bool listed,
                  bool with_mean) {
    return make_layout(codec_of("key", key), codec_of("value", value), to_int("head_size", head_size),
                       to_int("group_size", group_size), listed, with_mean)
        .bytes;
}

bool can_prefill(const std::vector<LayerArgument>& layers, const std::string& staging, const std::string& isa) {
    const Codec codec = codec_of("staging", staging, NUM_FLOAT_CODECS);
    const Kernels& chosen = kernels(isa);
    std::vector<LayerShape> shapes;
    for (const LayerArgument& layer : layers) {
        shapes.push_back(layer_shape_of(layer));
        const LayerShape& shape = shapes.back();
        require(shape.num_kv_heads >= 1 && shape.num_heads % shape.num_kv_heads == 0,
                "num_heads must be a multiple of num_kv_heads", shape.num_heads);
    }
    return can_prefill(chosen, shapes, codec);
}

std::pair<Output<float>, Output<float>> encode_decode(const std::string& key, const std::string& value,
                                                      int64_t group_size, const Input& k, const Input& v,
                                                      const std::string& isa) {
    const float* keys = data_of<float>(k, "k", {ANY, ANY});
    const auto n = static_cast<int64_t>(k.shape(0)), width = static_cast<int64_t>(k.shape(1));
    const float* values = data_of<float>(v, "v", {n, width});
    require(n >= 1 && n <= TILE, "k must have 1..32 rows", n);
    const TileLayout layout = make_layout(codec_of("key", key), codec_of("value", value), to_int("head_size", width),
                                          to_int("group_size", group_size), false);
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
