// Balanced clusters of keys: which tokens share a tile, so that its mean key says what they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace crush {

// The order in which `count` tokens, a multiple of 32, fill tiles of 32: keys [count, size] are halved across their
// principal direction until 32 are left, which are in ascending order then. Every half is whole tiles. Equal numbers
// give an equal order on every CPU; NaN is as good as 0.
std::vector<int32_t> cluster(const float* keys, size_t count, size_t size);

}  // namespace crush
