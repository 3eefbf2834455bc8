// Arguments from Python: conversions that throw std::invalid_argument "<field> must be <rule>, got <value>".
#pragma once

#include <array>
#include <climits>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <variant>
#include <vector>

#include "kernels/attention.hpp"
#include "store/require.hpp"

namespace crush {

using PlainLayer = std::tuple<int64_t, int64_t, int64_t, int64_t, double>;  // H, K, D, window, scale
// And soft_cap, slopes, sinks
using LayerArgument = std::variant<PlainLayer, std::tuple<int64_t, int64_t, int64_t, int64_t, double, double,
                                                          std::vector<double>, std::vector<double>>>;

inline constexpr std::array<const char*, 6> CODEC_NAMES{"f32", "bf16", "f16", "u8", "u4", "u2"};  // by Codec
constexpr size_t NUM_FLOAT_CODECS = 3;                                                            // the first ones

inline Codec codec_of(const char* field, const std::string& name, size_t num_allowed = CODEC_NAMES.size()) {
    std::string allowed;
    for (size_t i = 0; i < num_allowed; ++i) {
        if (name == CODEC_NAMES[i]) return static_cast<Codec>(i);
        allowed += (i ? ", " : "") + std::string(CODEC_NAMES[i]);
    }
    throw std::invalid_argument(std::string(field) + " must be one of " + allowed + ", got " + name);
}

inline int to_int(const char* field, int64_t number) {
    require(number >= INT_MIN && number <= INT_MAX, std::string(field) + " must be a 32-bit number", number);
    return static_cast<int>(number);
}

inline size_t to_size(const char* field, int64_t number) {
    require(number >= 0, std::string(field) + " must be at least 0", number);
    return static_cast<size_t>(number);
}

// No sequence has a negative id.
inline int32_t to_id(int64_t seq) { return seq >= 0 && seq <= INT32_MAX ? static_cast<int32_t>(seq) : -1; }

inline LayerShape layer_shape_of(const LayerArgument& layer) {
    LayerShape shape{};
    std::visit(
        [&](const auto& of) {
            shape.num_heads = to_int("num_heads", std::get<0>(of));
            shape.num_kv_heads = to_int("num_kv_heads", std::get<1>(of));
            shape.head_size = to_int("head_size", std::get<2>(of));
            shape.window = to_int("window", std::get<3>(of));
            shape.scale = static_cast<float>(std::get<4>(of));
            if constexpr (!std::is_same_v<std::decay_t<decltype(of)>, PlainLayer>) {
                shape.soft_cap = static_cast<float>(std::get<5>(of));
                shape.slopes.assign(std::get<6>(of).begin(), std::get<6>(of).end());
                shape.sinks.assign(std::get<7>(of).begin(), std::get<7>(of).end());
            }
        },
        layer);
    return shape;
}

}  // namespace crush
