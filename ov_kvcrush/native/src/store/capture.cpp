// Captured queries: rings of the last rows of a sequence, counted as tiles are, and shared by forks until one captures.
#include <algorithm>
#include <cstring>
#include <string>

#include "store/require.hpp"
#include "store/store.hpp"

namespace crush {
namespace {

constexpr int64_t MAX_CAPTURE_ROWS = 65536;

size_t width_of(const LayerShape& shape) {
    return static_cast<size_t>(shape.num_heads) * static_cast<size_t>(shape.head_size);
}

}  // namespace

void check_capture_rows(int64_t rows) {
    require(rows >= 0 && rows <= MAX_CAPTURE_ROWS, "capture_rows must be in 0..65536", rows);
}

size_t Store::row_bytes(size_t layer) const {
    return width_of(config_.layers[layer]) * sizeof(float) + sizeof(int32_t);
}

size_t Store::ring_bytes(const Capture* ring, size_t layer) const {
    return ring ? ring->position.size() * row_bytes(layer) : 0;
}

size_t Store::capture_bytes(int64_t rows, std::optional<int32_t> id) const {
    require(rows >= 0, "rows must be at least 0", rows);
    rows = std::min(rows, MAX_CAPTURE_ROWS);
    const std::lock_guard<std::mutex> lock(mutex_);
    const Sequence* sequence = id ? &sequence_locked(*id) : nullptr;
    size_t bytes = 0;
    for (size_t layer = 0; layer < layouts_.size(); ++layer) {
        size_t own = 0;
        if (sequence && !sequence->captures.empty() && sequence->captures[layer].use_count() == 1) {
            own = ring_bytes(sequence->captures[layer].get(), layer);
        }
        const size_t all = static_cast<size_t>(rows) * row_bytes(layer);
        bytes += all - std::min(all, own);
    }
    return bytes;
}

// For layers [begin, end): rings with room for num_rows more rows, where those of the sequence are shared or too small.
Store::Rings Store::larger_rings(const Sequence& sequence, size_t begin, size_t end, int64_t num_rows) const {
    Rings rings;
    const int64_t capacity = sequence.capture_rows;
    if (capacity == 0) return rings;
    rings.made.resize(end - begin);
    for (size_t layer = begin; layer < end; ++layer) {
        const std::shared_ptr<Capture>& old = sequence.captures[layer];
        const bool shared = old.use_count() > 1;
        const auto room = old ? static_cast<int64_t>(old->position.size()) : 0;
        // A long window of a short text is short.
        const int64_t needed = std::min(capacity, (old ? old->seen : 0) + num_rows);
        if (room >= needed && !shared) continue;
        // A staged prompt needs no more than its own rows; other texts grow on and on.
        const int64_t larger = sequence.staged_tokens ? sequence.staged_tokens : 2 * room;
        const auto rows = static_cast<size_t>(room >= needed ? room : std::min(capacity, std::max(needed, larger)));
        auto ring = std::make_shared<Capture>();
        ring->q.resize(rows * width_of(config_.layers[layer]));
        ring->position.resize(rows);
        if (old) {
            std::copy(old->q.begin(), old->q.end(), ring->q.begin());
            std::copy(old->position.begin(), old->position.end(), ring->position.begin());
            ring->seen = old->seen;
            ring->first = old->first;
        }
        rings.add += ring_bytes(ring.get(), layer);
        if (old && !shared) rings.remove += ring_bytes(old.get(), layer);
        rings.made[layer - begin] = std::move(ring);
    }
    return rings;
}

void Store::take_rings(Sequence& sequence, size_t begin, Rings& rings) noexcept {
    for (size_t i = 0; i < rings.made.size(); ++i) {
        if (rings.made[i]) sequence.captures[begin + i] = std::move(rings.made[i]);
    }
    captured_bytes_ = captured_bytes_ + rings.add - rings.remove;
}

size_t Store::drop_rings(Sequence& sequence) noexcept {
    size_t bytes = 0;
    for (size_t layer = 0; layer < sequence.captures.size(); ++layer) {
        if (sequence.captures[layer].use_count() == 1) bytes += ring_bytes(sequence.captures[layer].get(), layer);
        sequence.captures[layer].reset();
    }
    captured_bytes_ -= bytes;
    return bytes;
}

void Store::set_capture(int32_t id, int64_t rows) {
    check_capture_rows(rows);
    const std::lock_guard<std::mutex> lock(mutex_);
    Sequence& sequence = sequence_locked(id);
    if (rows == sequence.capture_rows) return;
    std::vector<std::shared_ptr<Capture>> none(rows ? layouts_.size() : 0);
    arena_.unclaim(drop_rings(sequence));
    sequence.captures.swap(none);
    sequence.capture_rows = rows;
}

void Store::capture_locked(Sequence& sequence, size_t layer, const float* q, int64_t n, int32_t first_position) {
    const int64_t capacity = sequence.capture_rows;
    if (capacity == 0 || n == 0) return;
    Rings larger = larger_rings(sequence, layer, layer + 1, n);
    if (larger.add) {
        Claim claim(arena_);
        claim.add_bytes(larger.add);
        claim.remove_bytes(larger.remove);
        grant(claim);
        take_rings(sequence, layer, larger);
        claim.commit();
    }
    const size_t width = width_of(config_.layers[layer]);
    Capture& ring = *sequence.captures[layer];
    for (int64_t i = std::max<int64_t>(0, n - capacity); i < n; ++i) {
        const auto slot = static_cast<size_t>((ring.seen + i) % capacity);
        std::memcpy(&ring.q[slot * width], q + static_cast<size_t>(i) * width, width * sizeof(float));
        ring.position[slot] = first_position + static_cast<int32_t>(i);
    }
    ring.seen += n;
}

void Store::captured_locked(const Sequence& sequence, size_t layer, std::vector<float>& rows,
                            std::vector<int32_t>& positions) const {
    const int64_t capacity = sequence.capture_rows;
    if (capacity == 0 || !sequence.captures[layer]) return;
    const Capture& ring = *sequence.captures[layer];
    const size_t width = width_of(config_.layers[layer]);
    for (int64_t i = ring.oldest(); i < ring.seen; ++i) {
        const auto slot = static_cast<size_t>(i % capacity);
        const auto row = ring.q.begin() + static_cast<std::ptrdiff_t>(slot * width);
        rows.insert(rows.end(), row, row + static_cast<std::ptrdiff_t>(width));
        positions.push_back(ring.position[slot]);
    }
}

}  // namespace crush
