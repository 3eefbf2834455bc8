// Memory of the tiles: slots of a few sizes in slabs of 2 MiB, with exact accounting and a hard limit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace crush {

// Bytes are claimed apart from slots: who needs many slots claims all their bytes first, so that the limit refuses
// before anything has changed. Every function is safe to call from any thread.
class Arena {
public:
    explicit Arena(size_t max_bytes) : max_bytes_(max_bytes) {}  // 0 = no limit
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Adds `add` bytes and removes `remove` bytes of those in use; false, without a change, if that would exceed
    // max_bytes - promised.
    bool claim(size_t add, size_t remove = 0, size_t promised = 0);
    // Undoes a claim, or unclaims the bytes of tiles that were freed.
    void unclaim(size_t add, size_t remove = 0);

    // A slot for a tile whose bytes are claimed: 64-byte aligned, contents undefined. Throws std::bad_alloc.
    uint8_t* allocate(size_t bytes);
    // Frees a slot; its claim stays. A slab without tiles returns to the operating system, but for one of each size.
    void free(uint8_t* slot, size_t bytes) noexcept;

    size_t used() const;      // claimed bytes
    size_t reserved() const;  // of the operating system's memory
    size_t max_bytes() const { return max_bytes_; }

private:
    struct Slab;
    struct SizeClass {
        Slab* with_room = nullptr;  // slabs that have a free slot
        Slab* all = nullptr;
        size_t num_empty = 0;
    };
    Slab* new_slab(SizeClass& sizes, size_t bytes);
    void free_slab(SizeClass& sizes, Slab* slab) noexcept;

    const size_t max_bytes_;
    mutable std::mutex mutex_;
    size_t used_ = 0, reserved_ = 0;
    std::map<size_t, SizeClass> classes_;  // by bytes of a tile
};

}  // namespace crush
