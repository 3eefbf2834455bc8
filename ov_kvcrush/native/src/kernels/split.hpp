// How work is cut into parts, which threads take as they come.
//
// Cost model: a thread that is awake takes a part in a fraction of a microsecond, so parts of equal size, more of them
// than threads, end within one part of each other. Each part of a decoding head has a state to be merged and each
// begins with a cold tile, so none reads less than some tens of microseconds' worth. No split depends on the number of
// threads: results are the same bits on 2 and on 64.
#pragma once

#include <algorithm>
#include <cstddef>

namespace crush {

// Items [0, items) in consecutive parts that differ by at most one item.
struct Split {
    size_t items, parts;  // parts > 0

    size_t begin(size_t part) const { return items * part / parts; }
    size_t size(size_t part) const { return begin(part + 1) - begin(part); }
};

// As few parts as there can be of at most `most` items, and at least one.
inline Split split_by_size(size_t items, size_t most) {
    return {items, std::max<size_t>((items + most - 1) / most, 1)};
}

constexpr size_t PART_TILES = 32, MAX_PARTS = 32;  // a decoding head is cut into up to 32 parts, by some 32 tiles

// The tiles that query rows of a head walk through. units: blocks of query rows that the head has in this step; many of
// them are parts enough.
inline Split split_tiles(size_t tiles, size_t units) {
    if (units >= 8) return {tiles, 1};
    return {tiles, std::min(split_by_size(tiles, PART_TILES).parts, MAX_PARTS)};
}

}  // namespace crush
