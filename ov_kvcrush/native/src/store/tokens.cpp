#include "store/tokens.hpp"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <new>

namespace crush {
namespace {

int32_t* listed_positions(uint8_t* tile) { return reinterpret_cast<int32_t*>(tile + layout(tile).positions); }

TileHeader& make_header(uint8_t* tile, const TileLayout& layout) {
    auto* h = new (tile) TileHeader{};
    h->refs.store(1, std::memory_order_relaxed);
    h->layout = &layout;
    h->min_position = INT32_MAX;
    h->max_position = -1;
    return *h;
}

}  // namespace

bool must_list(const int32_t* positions, int count) {
    int num_far = 0;
    for (int i = 1; i < count; ++i) {
        if (positions[i] <= positions[i - 1]) return true;
        if (positions[i] - positions[i - 1] > MAX_GAP) ++num_far;
    }
    return num_far > 1;
}

bool can_follow(const uint8_t* tile, int64_t position) {
    const TileHeader& h = header(tile);
    const int64_t gap = position - h.max_position;
    return gap > 0 && (gap <= MAX_GAP || h.gap_low[0] == 0);
}

void make_empty(uint8_t* tile, const TileLayout& layout) {
    std::memset(tile, 0, layout.bytes);
    make_header(tile, layout);
}

void drop_positions(uint8_t* tile, int count) {
    TileHeader& h = header(tile);
    int32_t positions[TILE];
    read_positions(tile, positions);
    if (h.layout->listed) std::fill(listed_positions(tile) + count, listed_positions(tile) + h.count, 0);
    for (int slot = count; slot < h.count; ++slot) {
        if (slot > 0 && h.gap_low[0] == slot) h.gap_low[0] = 0;
        if (slot > 0) h.gap_low[slot] = 0;
        h.gap_high &= ~(uint64_t{3} << 2 * slot);
    }
    h.count = count;
    h.min_position = count ? *std::min_element(positions, positions + count) : INT32_MAX;
    h.max_position = count ? *std::max_element(positions, positions + count) : -1;
}

void set_position(uint8_t* tile, int slot, int32_t position) {
    TileHeader& h = header(tile);
    if (h.layout->listed) {
        listed_positions(tile)[slot] = position;
    } else if (slot > 0) {
        assert(can_follow(tile, position));  // so they ascend: the smallest is the first, the largest the last
        auto gap = static_cast<uint32_t>(position - h.max_position);
        if (gap > MAX_GAP) {
            h.gap_low[0] = static_cast<uint8_t>(slot);
            gap = 0;
        }
        h.gap_low[slot] = static_cast<uint8_t>(gap & 255);
        h.gap_high = (h.gap_high & ~(uint64_t{3} << 2 * slot)) | uint64_t{gap >> 8} << 2 * slot;
    }
    h.min_position = std::min(h.min_position, position);
    h.max_position = std::max(h.max_position, position);
}

void write_tile(const Kernels& kernels, uint8_t* tile, const TileLayout& layout, const TokenBuffer& from) {
    TileHeader& h = make_header(tile, layout);
    h.count = from.count;
    if (layout.listed) std::fill_n(listed_positions(tile), TILE, 0);
    for (int i = 0; i < from.count; ++i) set_position(tile, i, from.positions[i]);
    const auto stride = static_cast<size_t>(layout.head_size);
    kernels.encode(tile, from.k, stride, from.v, stride, from.count);
    if (from.count == TILE) kernels.write_mean(tile);
}

void copy_tile(uint8_t* tile, const TileLayout& to, const uint8_t* source) {
    const TileHeader& from = header(source);
    TileHeader& h = make_header(tile, to);
    h.count = from.count;
    h.min_position = from.min_position;
    h.max_position = from.max_position;
    h.gap_high = from.gap_high;
    std::copy_n(from.gap_low, TILE, h.gap_low);
    // Positions come last, so the codes of both layouts lie at the same places.
    const size_t bytes = std::min(to.bytes, from.layout->bytes);
    std::memcpy(tile + sizeof(TileHeader), source + sizeof(TileHeader), bytes - sizeof(TileHeader));
    assert(to.listed || !from.layout->listed);
    if (!to.listed) return;
    std::fill_n(listed_positions(tile), TILE, 0);
    read_positions(source, listed_positions(tile));
}

void TokenReader::read(int64_t index, TokenBuffer& to) {
    const uint8_t* tile = tiles_[static_cast<size_t>(index / TILE)];
    if (index / TILE != decoded_) {
        kernels_.decode(tile, k_, v_);
        decoded_ = index / TILE;
    }
    const auto slot = static_cast<int>(index % TILE);
    const auto width = static_cast<size_t>(layout(tile).head_size);
    std::memcpy(to.k + to.count * width, k_ + slot * width, width * sizeof(float));
    std::memcpy(to.v + to.count * width, v_ + slot * width, width * sizeof(float));
    to.positions[to.count++] = positions_.read(index);
}

}  // namespace crush
