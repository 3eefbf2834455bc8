// How work is cut into parts: every item once, parts that are alike, and 1 to 64 threads that end together.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "check.hpp"
#include "kernels/split.hpp"

using namespace crush;

namespace {

void covers_every_item_once(const Split& split) {
    size_t next = 0, least = split.items, most = 0;
    for (size_t p = 0; p < split.parts; ++p) {
        CHECK(split.begin(p) == next);
        next += split.size(p);
        least = std::min(least, split.size(p));
        most = std::max(most, split.size(p));
    }
    CHECK(next == split.items);
    CHECK(most - least <= 1);
}

// Each thread takes the next part when it has ended its last; a part takes as long as it has items. When each ends.
std::vector<size_t> ends(const std::vector<size_t>& parts, size_t threads) {
    std::vector<size_t> at(threads, 0);
    for (const size_t items : parts) *std::min_element(at.begin(), at.end()) += items;
    return at;
}

}  // namespace

int main() {
    for (size_t items = 0; items < 3000; items += items < 200 ? 1 : 17)
        for (const size_t parts : {1, 2, 3, 7, 32, 33, 64, 100}) covers_every_item_once({items, parts});

    for (size_t items = 0; items < 300; ++items)
        for (size_t most = 1; most < 40; ++most) {
            const Split split = split_by_size(items, most);
            covers_every_item_once(split);
            for (size_t p = 0; p < split.parts; ++p) CHECK(split.size(p) <= most);
            CHECK(split.parts == 1 || (split.parts - 1) * most < items);  // one part less would not do
        }

    // Tiles of heads that decode: up to a million tokens, and steps of more rows.
    for (size_t tiles = 0; tiles <= 32768; tiles += tiles < 2100 ? 1 : 1023)
        for (const size_t units : {1, 2, 7, 8, 100}) {
            const Split split = split_tiles(tiles, units);
            covers_every_item_once(split);
            CHECK(split.parts >= 1 && split.parts <= MAX_PARTS);
            for (size_t p = 0; split.parts > 1 && p < split.parts; ++p) CHECK(2 * split.size(p) >= PART_TILES);
            CHECK(units < 8 ? split.parts == MAX_PARTS || split.size(0) <= PART_TILES : split.parts == 1);
        }

    // A layer of 2 to 8 KV heads on 2 to 64 threads: nobody works for longer than the last part after another has ended.
    for (const size_t heads : {2, 3, 8})
        for (const size_t tiles : {1, 100, 512, 1025, 4096}) {
            const Split split = split_tiles(tiles, 1);
            std::vector<size_t> parts;
            for (size_t h = 0; h < heads; ++h)
                for (size_t p = 0; p < split.parts; ++p) parts.push_back(split.size(p));
            for (size_t threads = 1; threads <= 64; threads = threads < 8 ? threads + 1 : threads * 2) {
                const std::vector<size_t> at = ends(parts, threads);
                const auto [first, last] = std::minmax_element(at.begin(), at.end());
                CHECK(*last - *first <= *std::max_element(parts.begin(), parts.end()));
            }
        }

    // 64 threads at once.
    const Split split = split_by_size(5000, 7);
    std::vector<std::atomic<int>> taken(split.items);
    std::atomic<size_t> next{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 64; ++t)
        threads.emplace_back([&] {
            for (size_t p; (p = next.fetch_add(1)) < split.parts;)
                for (size_t i = split.begin(p); i < split.begin(p + 1); ++i) ++taken[i];
        });
    for (std::thread& thread : threads) thread.join();
    for (const std::atomic<int>& times : taken) CHECK(times == 1);
    return 0;
}
