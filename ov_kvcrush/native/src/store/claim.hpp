// What an operation takes for its new tiles: all of it before anything changes, given back unless it is committed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/tile.hpp"
#include "store/arena.hpp"

namespace crush {

// Lists the tiles with `add`, is granted their bytes and slots by Store::grant, writes them, then takes them over in
// steps that cannot fail, and commits. A claim that ends without a commit leaves the arena as it was.
class Claim {
public:
    explicit Claim(Arena& arena) : arena_(arena) {}
    ~Claim();
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;

    // A tile to come; returns its number.
    size_t add(const TileLayout& layout);
    // Bytes beside tiles, and bytes that end with what the commit replaces.
    void add_bytes(size_t bytes) { add_ += bytes; }
    void remove_bytes(size_t bytes) { remove_ += bytes; }

    size_t added() const { return add_; }
    size_t removed() const { return remove_; }
    size_t num_tiles() const { return layouts_.size(); }
    const TileLayout& layout(size_t i) const { return *layouts_[i]; }
    uint8_t* tile(size_t i) const { return tiles_[i]; }  // granted
    void commit() noexcept { committed_ = true; }

private:
    friend class Store;
    Arena& arena_;
    std::vector<const TileLayout*> layouts_;
    std::vector<uint8_t*> tiles_;  // the first ones of layouts_, all once it is granted
    std::vector<size_t> sizes_;    // distinct ones of layouts_
    size_t add_ = 0, remove_ = 0;
    bool claimed_ = false, committed_ = false;
};

}  // namespace crush
