// Kernels and codecs as Python sees them, without a store.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "python/arguments.hpp"
#include "python/py_arrays.hpp"

namespace crush {

bool can_prefill(const std::vector<LayerArgument>& layers, const std::string& staging, const std::string& isa);
size_t tile_bytes(const std::string& key, const std::string& value, int64_t head_size, int64_t group_size, bool listed,
                  bool with_mean);
std::pair<Output<float>, Output<float>> encode_decode(const std::string& key, const std::string& value,
                                                      int64_t group_size, const Input& k, const Input& v,
                                                      const std::string& isa);

}  // namespace crush
