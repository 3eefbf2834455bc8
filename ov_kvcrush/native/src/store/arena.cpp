#include "store/arena.hpp"

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

constexpr size_t SLAB = size_t{2} << 20;  // also the size of a huge page

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

constexpr size_t SLAB = size_t{2} << 20;
uint8_t* map_slab() { return static_cast<uint8_t*>(::operator new(SLAB, std::align_val_t{SLAB})); }
void unmap_slab(uint8_t* slab) noexcept { ::operator delete(slab, std::align_val_t{SLAB}); }

#endif

}  // namespace

bool Arena::claim(size_t add, size_t remove, size_t promised) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (max_bytes_ && add > remove) {
        const size_t limit = promised < max_bytes_ ? max_bytes_ - promised : 0;
        const size_t more = add - remove;
        if (used_ > limit || more > limit - used_) return false;
    }
    used_ = used_ + add - remove;
    return true;
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

#if defined(CRUSH_ARENA_MALLOC)

Arena::~Arena() = default;

uint8_t* Arena::allocate(size_t bytes) {
    auto* slot = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{ALIGNMENT}));
    const std::lock_guard<std::mutex> lock(mutex_);
    reserved_ += bytes;
    return slot;
}

void Arena::free(uint8_t* slot, size_t bytes) noexcept {
    ::operator delete(slot, std::align_val_t{ALIGNMENT});
    const std::lock_guard<std::mutex> lock(mutex_);
    reserved_ -= bytes;
}

#else

// At the start of its own memory, which is aligned to its size: a tile finds its slab by its address.
struct alignas(ALIGNMENT) Arena::Slab {
    uint32_t used = 0;                          // slots that hold a tile
    uint32_t fresh = 0;                         // slots from here on were never used
    uint8_t* freed = nullptr;                   // list of slots that were given back; the link is in their first bytes
    Slab *next = nullptr, *previous = nullptr;  // in SizeClass::all
    Slab *next_with_room = nullptr, *previous_with_room = nullptr;  // in SizeClass::with_room

    static uint32_t capacity(size_t bytes) { return static_cast<uint32_t>((SLAB - sizeof(Slab)) / bytes); }
    static Slab* of(uint8_t* slot) {
        return reinterpret_cast<Slab*>(reinterpret_cast<uintptr_t>(slot) & ~uintptr_t{SLAB - 1});
    }
};

Arena::~Arena() {
    for (auto& [bytes, sizes] : classes_) {
        while (sizes.all) free_slab(sizes, sizes.all);
    }
}

namespace {

template <class Node>
void link(Node*& list, Node* node, Node* Node::* next, Node* Node::* previous) {
    node->*previous = nullptr;
    node->*next = list;
    if (list) list->*previous = node;
    list = node;
}

template <class Node>
void unlink(Node*& list, Node* node, Node* Node::* next, Node* Node::* previous) {
    (node->*previous ? node->*previous->*next : list) = node->*next;
    if (node->*next) node->*next->*previous = node->*previous;
}

}  // namespace

Arena::Slab* Arena::new_slab(SizeClass& sizes, size_t bytes) {
    if (Slab::capacity(bytes) == 0) throw std::bad_alloc();
    Slab* slab = new (map_slab()) Slab;
    reserved_ += SLAB;
    link(sizes.all, slab, &Slab::next, &Slab::previous);
    link(sizes.with_room, slab, &Slab::next_with_room, &Slab::previous_with_room);
    ++sizes.num_empty;
    return slab;
}

void Arena::free_slab(SizeClass& sizes, Slab* slab) noexcept {
    unlink(sizes.all, slab, &Slab::next, &Slab::previous);
    unmap_slab(reinterpret_cast<uint8_t*>(slab));
    reserved_ -= SLAB;
}

uint8_t* Arena::allocate(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    SizeClass& sizes = classes_[bytes];
    Slab* slab = sizes.with_room ? sizes.with_room : new_slab(sizes, bytes);
    uint8_t* slot = slab->freed;
    if (slot) {
        slab->freed = *reinterpret_cast<uint8_t**>(slot);
    } else {
        slot = reinterpret_cast<uint8_t*>(slab) + sizeof(Slab) + bytes * slab->fresh++;
    }
    if (slab->used++ == 0) --sizes.num_empty;
    if (slab->used == Slab::capacity(bytes)) {
        unlink(sizes.with_room, slab, &Slab::next_with_room, &Slab::previous_with_room);
    }
    return slot;
}

void Arena::free(uint8_t* slot, size_t bytes) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    SizeClass& sizes = classes_.find(bytes)->second;
    Slab* slab = Slab::of(slot);
    *reinterpret_cast<uint8_t**>(slot) = slab->freed;
    slab->freed = slot;
    if (slab->used-- == Slab::capacity(bytes)) {
        link(sizes.with_room, slab, &Slab::next_with_room, &Slab::previous_with_room);
    }
    if (slab->used == 0 && ++sizes.num_empty > 1) {
        --sizes.num_empty;
        unlink(sizes.with_room, slab, &Slab::next_with_room, &Slab::previous_with_room);
        free_slab(sizes, slab);
    }
}

#endif

}  // namespace crush
