// Memory of the tiles: slots of a few sizes in slabs of 2 MiB, with exact accounting and a hard limit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace crush {

// Bytes are claimed apart from slots: who needs many slots claims all their bytes first, so that the limit refuses
// before anything has changed. Every function is safe to call from any thread.
class Arena {
public:
    static constexpr size_t SLAB = size_t{2} << 20;  // also the size of a huge page

    explicit Arena(size_t max_bytes) : max_bytes_(max_bytes) {}  // 0 = no limit
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Adds `add` bytes and removes `remove` bytes of those in use; false, without a change, if that would exceed
    // max_bytes - promised.
    bool claim(size_t add, size_t remove = 0, size_t promised = 0);
    // Undoes a claim, or unclaims the bytes of tiles that were freed.
    void unclaim(size_t add, size_t remove = 0);

    // Whether a claim would succeed.
    bool fits(size_t add, size_t remove = 0, size_t promised = 0) const;

    // A slot for a tile whose bytes are claimed, in the fullest slab that has room: 64-byte aligned, contents
    // undefined. Null if reserved() would exceed max_reserved. Throws std::bad_alloc.
    uint8_t* allocate(size_t bytes, size_t max_reserved = SIZE_MAX);
    // Frees a slot; its claim stays. A slab without tiles returns to the operating system, but for one of each size and
    // MAX_EMPTY in all.
    void free(uint8_t* slot, size_t bytes) noexcept;

    // To move tiles out of nearly empty slabs. Between the two calls no other thread uses the arena: as few slabs as
    // can hold all tiles take new ones, the others give none away, and return to the system with their last tile.
    void begin_move() noexcept;
    static bool is_leaving(const uint8_t* slot) noexcept;
    void end_move() noexcept;

    size_t used() const;      // claimed bytes
    size_t reserved() const;  // of the operating system's memory
    // Whether so much is reserved for so few tiles that moving them pays: more than twice their bytes and a slab for
    // each size that has slabs.
    bool is_loose() const;
    // Sizes of the tiles that are there, and of those to come in `more` (distinct ones).
    size_t num_sizes(const std::vector<size_t>& more) const;
    size_t max_bytes() const { return max_bytes_; }

private:
    struct Slab;
    // Lists of slabs: LEVELS by how much of them is filled, then the full ones, then those that are to be left.
    static constexpr size_t LEVELS = 16, LEAVING = LEVELS + 1;
    static constexpr size_t MAX_EMPTY = 8;
    struct SizeClass {
        Slab* by_level[LEVELS + 2] = {};
        size_t num_empty = 0;  // slabs, leaving ones left out
        size_t num_tiles = 0;
        size_t num_slabs = 0;
    };
    bool fits_locked(size_t add, size_t remove, size_t promised) const;
    void free_slab(SizeClass& sizes, Slab* slab) noexcept;
    static void place(SizeClass& sizes, Slab* slab, size_t level) noexcept;

    const size_t max_bytes_;
    mutable std::mutex mutex_;
    size_t used_ = 0, reserved_ = 0, in_slots_ = 0;
    size_t num_empty_ = 0;                 // slabs of all sizes
    std::map<size_t, SizeClass> classes_;  // by bytes of a tile
};

}  // namespace crush
