// Tokens that share a tile by their keys.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "store/precisions.hpp"

namespace crush {

using ReadKeys = std::function<void(const std::vector<MovedToken>&, float* to)>;  // to: [tokens, D]

// Puts the tokens of the first `num_tiles` tiles of 32 in the order of new ones, whose keys are alike: among tiles that
// stand together and are of one tier (that of their best token). Tiles with sinks stay as they are.
void group_tiles(std::vector<MovedToken>& tokens, int64_t num_tiles, size_t head_size, const ReadKeys& read);

}  // namespace crush
