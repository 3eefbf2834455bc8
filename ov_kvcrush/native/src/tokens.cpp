#include "tokens.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace crush {
namespace {

int32_t* stored_positions(uint8_t* tile) { return reinterpret_cast<int32_t*>(tile + layout(tile).positions); }

TileHeader& make_header(uint8_t* tile, const TileLayout& layout) {
    auto* h = new (tile) TileHeader{};
    h->refs.store(1, std::memory_order_relaxed);
    h->layout = &layout;
    h->min_position = INT32_MAX;
    h->max_position = -1;
    return *h;
}

}  // namespace

bool consecutive(const int32_t* positions, int count) {
    for (int i = 1; i < count; ++i) {
        if (positions[i] != positions[0] + i) return false;
    }
    return true;
}

void make_empty(uint8_t* tile, const TileLayout& layout) {
    std::memset(tile, 0, layout.bytes);
    make_header(tile, layout);
}

void set_position(uint8_t* tile, int slot, int32_t position) {
    TileHeader& h = header(tile);
    if (h.layout->scattered) {
        stored_positions(tile)[slot] = position;
    } else if (slot == 0) {
        h.base_position = position;
    }
    h.min_position = std::min(h.min_position, position);
    h.max_position = std::max(h.max_position, position);
}

void write_tile(const Kernels& kernels, uint8_t* tile, const TileLayout& layout, const TokenBuffer& from) {
    TileHeader& h = make_header(tile, layout);
    h.count = from.count;
    if (layout.scattered) std::fill_n(stored_positions(tile), TILE, 0);
    for (int i = 0; i < from.count; ++i) set_position(tile, i, from.positions[i]);
    const auto stride = static_cast<size_t>(layout.head_size);
    kernels.encode(tile, from.k, stride, from.v, stride, from.count);
}

void copy_tile(uint8_t* tile, const TileLayout& to, const uint8_t* source) {
    const TileHeader& from = header(source);
    TileHeader& h = make_header(tile, to);
    h.count = from.count;
    h.base_position = from.base_position;
    h.min_position = from.min_position;
    h.max_position = from.max_position;
    // Positions come last, so the codes of both layouts lie at the same places.
    const size_t bytes = std::min(to.bytes, from.layout->bytes);
    std::memcpy(tile + sizeof(TileHeader), source + sizeof(TileHeader), bytes - sizeof(TileHeader));
    if (!to.scattered) return;
    for (int i = 0; i < TILE; ++i) stored_positions(tile)[i] = i < from.count ? position(source, i) : 0;
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
    to.positions[to.count++] = position(tile, slot);
}

}  // namespace crush
