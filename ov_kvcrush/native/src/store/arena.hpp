// Memory of the tiles: slots of a few sizes in slabs of 2 MiB, with exact accounting and a hard limit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace crush {

// Bytes and slots go separate ways: who needs many slots claims all their bytes first, so that the limit refuses before
// anything has changed. Every function is safe to call from any thread.
class Arena {
public:
    explicit Arena(size_t max_bytes) : max_bytes_(max_bytes) {}  // 0 = no limit
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Account for `add` bytes more and `remove` bytes less; false, without a change, if more than max_bytes - keep_free
    // would be in use.
    bool claim(size_t add, size_t remove = 0, size_t keep_free = 0);
    // Undo a claim, or give back the bytes of tiles that are gone.
    void unclaim(size_t add, size_t remove = 0);

    // A slot for a tile whose bytes are claimed: 64-byte aligned, contents undefined. Throws std::bad_alloc.
    uint8_t* take(size_t bytes);
    // Give a slot back; the claim stays. A slab without any tile returns to the operating system; one per size is kept.
    void put(uint8_t* slot, size_t bytes) noexcept;

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
