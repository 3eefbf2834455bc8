// Taking back tokens that were appended last: those that a step ran and that turned out not to be the text's.
#include <algorithm>
#include <climits>
#include <vector>

#include "store/require.hpp"
#include "store/store.hpp"
#include "store/tokens.hpp"

namespace crush {
namespace {

// How many tokens of a head stay: all before the last ones at positions from `num_tokens` on. Only recent tiles are
// looked at, whose tokens are in the order of the text.
int64_t num_staying(const Head& head, int64_t num_tokens) {
    int64_t stay = head.num_tokens;
    while (stay > head.num_target * TILE) {
        const int64_t first = (stay - 1) / TILE * TILE;
        int32_t positions[TILE];
        read_positions(head.tiles[static_cast<size_t>(first / TILE)], positions);
        while (stay > first && positions[stay - first - 1] >= num_tokens) --stay;
        if (stay > first) break;
    }
    return stay;
}

// Whether the first `stay` tokens of a head are at positions below num_tokens.
bool all_below(const Head& head, int64_t stay, int64_t num_tokens) {
    for (int64_t i = 0; i < stay; i += TILE) {
        const uint8_t* tile = head.tiles[static_cast<size_t>(i / TILE)];
        if (header(tile).max_position < num_tokens) continue;
        int32_t positions[TILE];
        read_positions(tile, positions);
        const int64_t count = std::min<int64_t>(TILE, stay - i);
        if (*std::max_element(positions, positions + count) >= num_tokens) return false;
    }
    return true;
}

}  // namespace

void Store::crop(int32_t id, int64_t num_tokens) {
    require(num_tokens >= 0, "num_tokens must be at least 0", num_tokens);
    const std::lock_guard<std::mutex> lock(mutex_);
    Sequence& sequence = sequence_locked(id);
    require(sequence.staged_tokens == 0, "sequence must be committed before it is cropped", id);
    if (num_tokens >= sequence.next_position) return;
    std::vector<int64_t> stay;
    for (const Head& head : sequence.heads) {
        stay.push_back(num_staying(head, num_tokens));
        require(all_below(head, stay.back(), num_tokens),
                "num_tokens must be above the positions of the tiles that have left the recent window", num_tokens);
        for (int64_t i = stay.back() / TILE; i < (head.num_tokens + TILE - 1) / TILE; ++i) {
            if (i * TILE >= stay.back() || stay.back() < head.num_tokens) {
                require(header(head.tiles[static_cast<size_t>(i)]).refs.load() == 1,
                        "num_tokens must leave tiles that are shared", num_tokens);
            }
        }
    }
    for (const std::shared_ptr<Capture>& ring : sequence.captures) {
        require(!ring || ring->num_from(num_tokens) == 0 || ring.use_count() == 1,
                "num_tokens must leave captured queries that are shared", num_tokens);
    }
    const std::vector<float> zeros(MAX_HEAD_SIZE);
    for (size_t h = 0; h < stay.size(); ++h) {
        Head& head = sequence.heads[h];
        while (head.num_tokens > stay[h]) {
            const int64_t first = (head.num_tokens - 1) / TILE * TILE, begin = std::max(stay[h], first);
            uint8_t* tile = head.tiles[static_cast<size_t>(first / TILE)];
            // Kernels read whole tiles: codes of slots without a token are zero.
            for (int64_t slot = begin - first; slot < head.num_tokens - first; ++slot) {
                kernels_->append_token(tile, static_cast<int>(slot), zeros.data(), zeros.data());
            }
            drop_positions(tile, static_cast<int>(begin - first));
            head.num_tokens = begin;
        }
    }
    size_t freed = 0;
    for (Head& head : sequence.heads) {
        for (const auto filled = static_cast<size_t>((head.num_tokens + TILE - 1) / TILE); head.tiles.size() > filled;) {
            freed += drop_owner(head.tiles.back());
            head.tiles.pop_back();
        }
    }
    arena_.unclaim(freed);
    for (const std::shared_ptr<Capture>& ring : sequence.captures) {
        if (ring) ring->drop(ring->num_from(num_tokens));
    }
    sequence.next_position = num_tokens;
    tidy();
}

}  // namespace crush
