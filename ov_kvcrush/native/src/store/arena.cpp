#include "store/arena.hpp"

#include <algorithm>
#include <new>

#include "kernels/tile.hpp"

#if defined(__unix__) && !defined(CRUSH_ARENA_MALLOC)
#include <sys/mman.h>
#endif

namespace crush {
namespace {

#if defined(CRUSH_ARENA_MALLOC)

// For sanitizers: every tile is an allocation of its own, so that reads beyond it are seen.

#elif defined(__unix__)

constexpr size_t SLAB = Arena::SLAB;

uint8_t* map_slab() {
    // Twice the size holds an aligned slab; the rest around it is unmapped.
    void* memory = mmap(nullptr, 2 * SLAB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<uint8_t*>(memory);
    const size_t before = (SLAB - reinterpret_cast<uintptr_t>(begin) % SLAB) % SLAB;
    if (before) munmap(begin, before);
    munmap(begin + before + SLAB, SLAB - before);
#ifdef MADV_HUGEPAGE
    madvise(begin + before, SLAB, MADV_HUGEPAGE);
#endif
    return begin + before;
}

void unmap_slab(uint8_t* slab) noexcept { munmap(slab, SLAB); }

#else

constexpr size_t SLAB = Arena::SLAB;
uint8_t* map_slab() { return static_cast<uint8_t*>(::operator new(SLAB, std::align_val_t{SLAB})); }
void unmap_slab(uint8_t* slab) noexcept { ::operator delete(slab, std::align_val_t{SLAB}); }

#endif

}  // namespace

bool Arena::claim(size_t add, size_t remove, size_t promised) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!fits_locked(add, remove, promised)) return false;
    used_ = used_ + add - remove;
    return true;
}

bool Arena::fits(size_t add, size_t remove, size_t promised) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return fits_locked(add, remove, promised);
}

bool Arena::fits_locked(size_t add, size_t remove, size_t promised) const {
    if (!max_bytes_ || add <= remove) return true;
    const size_t limit = promised < max_bytes_ ? max_bytes_ - promised : 0;
    return used_ <= limit && add - remove <= limit - used_;
}

void Arena::unclaim(size_t add, size_t remove) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ = used_ + remove - add;
}

size_t Arena::used() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_;
}

size_t Arena::reserved() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return reserved_;
}

bool Arena::is_loose() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t with_slabs = 0;
    for (const auto& [bytes, sizes] : classes_) with_slabs += sizes.num_slabs > 0;
    return reserved_ > 2 * in_slots_ + with_slabs * SLAB;
}

size_t Arena::num_sizes(const std::vector<size_t>& more) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t sum = more.size();
    for (const auto& [bytes, sizes] : classes_) {
        sum += sizes.num_tiles > 0 && std::find(more.begin(), more.end(), bytes) == more.end();
    }
    return sum;
}

#if defined(CRUSH_ARENA_MALLOC)

Arena::~Arena() = default;

uint8_t* Arena::allocate(size_t bytes, size_t max_reserved) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (reserved_ + bytes > max_reserved) return nullptr;
    auto* slot = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{ALIGNMENT}));
    reserved_ += bytes;
    in_slots_ += bytes;
    return slot;
}

void Arena::free(uint8_t* slot, size_t bytes) noexcept {
    ::operator delete(slot, std::align_val_t{ALIGNMENT});
    const std::lock_guard<std::mutex> lock(mutex_);
    reserved_ -= bytes;
    in_slots_ -= bytes;
}

void Arena::begin_move() noexcept {}
bool Arena::is_leaving(const uint8_t*) noexcept { return false; }
void Arena::end_move() noexcept {}

#else

// At the start of its own memory, which is aligned to its size: a tile finds its slab by its address.
struct alignas(ALIGNMENT) Arena::Slab {
    uint32_t capacity = 0;
    uint32_t used = 0;         // slots that hold a tile
    uint32_t fresh = 0;        // slots from here on were never used
    uint32_t level = 0;        // which list of SizeClass it is on
    uint8_t* freed = nullptr;  // list of slots that were given back; the link is in their first bytes
    Slab *next = nullptr, *previous = nullptr;

    static Slab* of(const uint8_t* slot) {
        return reinterpret_cast<Slab*>(reinterpret_cast<uintptr_t>(slot) & ~uintptr_t{SLAB - 1});
    }
    size_t filling() const { return used == capacity ? LEVELS : size_t{used} * LEVELS / capacity; }
};

namespace {

template <class Node>
void link(Node*& list, Node* node) {
    node->previous = nullptr;
    node->next = list;
    if (list) list->previous = node;
    list = node;
}

template <class Node>
void unlink(Node*& list, Node* node) {
    (node->previous ? node->previous->next : list) = node->next;
    if (node->next) node->next->previous = node->previous;
}

}  // namespace

Arena::~Arena() {
    for (auto& [bytes, sizes] : classes_) {
        for (Slab*& list : sizes.by_level) {
            while (list) free_slab(sizes, list);
        }
    }
}

void Arena::place(SizeClass& sizes, Slab* slab, size_t level) noexcept {
    if (slab->level == level) return;
    unlink(sizes.by_level[slab->level], slab);
    slab->level = static_cast<uint32_t>(level);
    link(sizes.by_level[level], slab);
}

void Arena::free_slab(SizeClass& sizes, Slab* slab) noexcept {
    unlink(sizes.by_level[slab->level], slab);
    unmap_slab(reinterpret_cast<uint8_t*>(slab));
    --sizes.num_slabs;
    reserved_ -= SLAB;
}

uint8_t* Arena::allocate(size_t bytes, size_t max_reserved) {
    const std::lock_guard<std::mutex> lock(mutex_);
    SizeClass& sizes = classes_[bytes];
    Slab* slab = nullptr;
    for (size_t level = LEVELS; level-- > 0 && !slab;) slab = sizes.by_level[level];
    if (!slab) {
        const auto capacity = static_cast<uint32_t>((SLAB - sizeof(Slab)) / bytes);
        if (capacity == 0) throw std::bad_alloc();
        if (reserved_ + SLAB > max_reserved) return nullptr;
        slab = new (map_slab()) Slab;
        slab->capacity = capacity;
        reserved_ += SLAB;
        link(sizes.by_level[0], slab);
        ++sizes.num_slabs;
        ++sizes.num_empty;
        ++num_empty_;
    }
    uint8_t* slot = slab->freed;
    if (slot) {
        slab->freed = *reinterpret_cast<uint8_t**>(slot);
    } else {
        slot = reinterpret_cast<uint8_t*>(slab) + sizeof(Slab) + bytes * slab->fresh++;
    }
    if (slab->used++ == 0) {
        --sizes.num_empty;
        --num_empty_;
    }
    ++sizes.num_tiles;
    in_slots_ += bytes;
    place(sizes, slab, slab->filling());
    return slot;
}

void Arena::free(uint8_t* slot, size_t bytes) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    SizeClass& sizes = classes_.find(bytes)->second;
    Slab* slab = Slab::of(slot);
    *reinterpret_cast<uint8_t**>(slot) = slab->freed;
    slab->freed = slot;
    --slab->used;
    --sizes.num_tiles;
    in_slots_ -= bytes;
    if (slab->level == LEAVING) {
        if (slab->used == 0) free_slab(sizes, slab);
        return;
    }
    place(sizes, slab, slab->filling());
    if (slab->used > 0) return;
    if (sizes.num_empty == 1 || num_empty_ == MAX_EMPTY) {
        free_slab(sizes, slab);
    } else {
        ++sizes.num_empty;
        ++num_empty_;
    }
}

void Arena::begin_move() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [bytes, sizes] : classes_) {
        size_t room = 0;
        for (size_t level = LEVELS + 1; level-- > 0;) {
            for (Slab *slab = sizes.by_level[level], *next; slab; slab = next) {
                next = slab->next;
                if (room < sizes.num_tiles) {
                    room += slab->capacity;
                    continue;
                }
                if (slab->used) {
                    place(sizes, slab, LEAVING);
                } else {
                    --sizes.num_empty;
                    --num_empty_;
                    free_slab(sizes, slab);
                }
            }
        }
    }
}

bool Arena::is_leaving(const uint8_t* slot) noexcept { return Slab::of(slot)->level == LEAVING; }

void Arena::end_move() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [bytes, sizes] : classes_) {
        while (Slab* slab = sizes.by_level[LEAVING]) place(sizes, slab, slab->filling());
    }
}

#endif

}  // namespace crush
