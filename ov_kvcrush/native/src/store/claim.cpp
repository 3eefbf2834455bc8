// Bytes and slots for operations; tiles that move out of nearly empty slabs.
#include "store/claim.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "store/store.hpp"

namespace crush {

Claim::~Claim() {
    if (committed_) return;
    for (size_t i = 0; i < tiles_.size(); ++i) arena_.free(tiles_[i], layouts_[i]->bytes);
    if (claimed_) arena_.unclaim(add_, remove_);
}

size_t Claim::add(const TileLayout& layout) {
    if (std::find(sizes_.begin(), sizes_.end(), layout.bytes) == sizes_.end()) sizes_.push_back(layout.bytes);
    layouts_.push_back(&layout);
    add_ += layout.bytes;
    return layouts_.size() - 1;
}

// What slabs may take beside `removed` bytes of tiles that are there until the operation ends, which makes tiles of
// sizes `more`. Tiles packed as closely as they can be are always within it: what a slab leaves over is below 4 %.
size_t Store::max_reserved(size_t removed, const std::vector<size_t>& more) const {
    const size_t limit = config_.max_bytes;
    if (limit == 0) return SIZE_MAX;
    const size_t tiles = limit - std::min(limit, captured_bytes_) + removed;
    return tiles + tiles / 20 + arena_.num_sizes(more) * Arena::SLAB;
}

bool Store::try_grant(Claim& claim, size_t promised) {
    claim.tiles_.reserve(claim.layouts_.size());
    if (!arena_.claim(claim.add_, claim.remove_, promised)) return false;
    claim.claimed_ = true;
    const size_t most = max_reserved(claim.remove_, claim.sizes_);
    bool moved = false;
    for (const TileLayout* layout : claim.layouts_) {
        uint8_t* tile = arena_.allocate(layout->bytes, most);
        if (!tile && !moved) {
            move_tiles();
            moved = true;
            tile = arena_.allocate(layout->bytes, most);
        }
        if (!tile) return false;
        claim.tiles_.push_back(tile);
    }
    return true;
}

void Store::grant(Claim& claim, size_t promised) {
    if (try_grant(claim, promised)) return;
    throw StoreFull("max_bytes must leave room for " +
                    std::to_string(claim.add_ - std::min(claim.add_, claim.remove_)) + " bytes, got " +
                    std::to_string(config_.max_bytes) + " with " +
                    std::to_string(arena_.used() - (claim.claimed_ ? claim.add_ - claim.remove_ : 0)) + " in use and " +
                    std::to_string(promised) + " promised");
}

void Store::tidy() noexcept {
    if (arena_.is_loose() || arena_.reserved() > max_reserved(0, {})) move_tiles();
}

// A tile that moved leaves in its old slot where it went, for its other owners, and the old slot that was left before.
void Store::move_tiles() noexcept {
    struct Forward {
        uint8_t *to, *before;
    };
    const auto forward = [](uint8_t* tile) { return reinterpret_cast<Forward*>(tile + sizeof(TileHeader)); };
    uint8_t* last = nullptr;
    arena_.begin_move();
    for (auto& entry : sequences_) {
        for (Head& head : entry.second->heads) {
            for (uint8_t*& tile : head.tiles) {
                if (!Arena::is_leaving(tile)) continue;
                if (header(tile).layout) {
                    const size_t bytes = layout(tile).bytes;
                    uint8_t* to = arena_.allocate(bytes, 0);
                    if (!to) continue;
                    std::memcpy(to, tile, bytes);
                    header(tile).layout = nullptr;
                    *forward(tile) = {to, last};
                    last = tile;
                }
                tile = forward(tile)->to;
            }
        }
    }
    while (last) {
        const Forward gone = *forward(last);
        arena_.free(last, layout(gone.to).bytes);
        last = gone.before;
    }
    arena_.end_move();
}

}  // namespace crush
