// Sampling as Python sees it: all rows of a step in one call.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "python/py_arrays.hpp"

namespace crush {

using DrawArgument = std::tuple<double, int64_t, double, double, uint64_t, int64_t>;  // as DrawParams
using DrawResult = std::tuple<int64_t, double, std::vector<std::pair<int64_t, double>>>;

// masks: for each row the bits of its tokens, int32 (words,), or an empty array where all may be drawn; or no masks at all.
std::vector<DrawResult> draw_rows(const std::vector<Input>& rows, const std::vector<DrawArgument>& params,
                                  const std::string& isa, const std::vector<Input>& masks);

}  // namespace crush
