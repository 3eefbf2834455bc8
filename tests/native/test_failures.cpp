// Every operation with its first, second, third, ... allocation failing: it leaves the store as it was. And the memory
// that slabs hold, whatever was stored before. See CMakeLists.txt.
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <utility>
#include <vector>

#include "check.hpp"
#include "store/store.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"  // it sees one half of what is replaced
#endif

namespace {

long allocations_left = -1;  // until one fails; below 0 = none does

void* allocate(std::size_t bytes, std::size_t alignment) {
    if (allocations_left == 0) throw std::bad_alloc();
    if (allocations_left > 0) --allocations_left;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    void* memory = alignment > alignof(std::max_align_t) ? std::aligned_alloc(alignment, bytes) : std::malloc(bytes);
    if (!memory) throw std::bad_alloc();
    return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes ? bytes : 1, 1); }
void* operator new[](std::size_t bytes) { return allocate(bytes ? bytes : 1, 1); }
void* operator new(std::size_t bytes, std::align_val_t a) { return allocate(bytes, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t bytes, std::align_val_t a) { return allocate(bytes, static_cast<std::size_t>(a)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

using namespace crush;

namespace {

void serial(size_t n, const std::function<void(size_t)>& task) {
    for (size_t i = 0; i < n; ++i) task(i);
}

// As a pool that takes memory for each task, and loses what it had handed out when there is none.
void greedy(size_t n, const std::function<void(size_t)>& task) {
    for (size_t i = 0; i < n; ++i) {
        const auto handed_out = std::make_unique<size_t>(i);
        task(*handed_out);
    }
}

constexpr size_t LAYERS = 2, HEADS = 2, WIDTH = 32;
constexpr int64_t PROMPT = 104;

StoreConfig config_of(size_t max_bytes, double recall = 0) {
    StoreConfig c;
    c.recall.fraction = recall;
    c.layers = {{4, HEADS, WIDTH, 0, 0.2f}, {4, HEADS, WIDTH, 0, 0.2f}};
    c.key = c.value = Codec::u8;
    c.max_bytes = max_bytes;
    return c;
}

// Keys and values of random tokens for a prompt of PROMPT tokens, in staging blocks.
struct Blocks {
    std::vector<float> numbers[2 * LAYERS];
    std::vector<int32_t> ids;

    explicit Blocks(Store& store) {
        std::mt19937 random(5);
        const size_t num_blocks = static_cast<size_t>(PROMPT + TILE - 1) / TILE;
        for (size_t i = 0; i < num_blocks; ++i) ids.push_back(static_cast<int32_t>(i));
        for (std::vector<float>& n : numbers) {
            n.resize(num_blocks * HEADS * TILE * WIDTH);
            for (float& x : n) x = static_cast<float>(random() % 2001) / 1000.f - 1.f;
        }
        for (size_t layer = 0; layer < LAYERS; ++layer) {
            store.set_staging(layer,
                              {reinterpret_cast<uint8_t*>(numbers[2 * layer].data()),
                               reinterpret_cast<uint8_t*>(numbers[2 * layer + 1].data()), num_blocks, Codec::f32});
        }
    }
};

// A store with a sequence to work on, one that shares its tiles and captured rows, one that is staged, and one that has
// room for rows.
struct Scene {
    Store store;
    Blocks blocks;
    int32_t id, twin, staged, open;
    std::vector<float> rows = std::vector<float>(64 * 4 * WIDTH, 0.5f);

    Scene(const ParallelFor& parallel, double recall) : store(config_of(4000000, recall), parallel), blocks(store) {
        id = store.create(4);
        store.attach_prefill(id, blocks.ids, PROMPT);
        store.commit_prefill(id);
        capture(id, 6);
        CHECK(store.reserve(id, 70));
        append(id, 70);
        twin = store.fork(id);
        staged = store.create(4);
        store.attach_prefill(staged, blocks.ids, PROMPT);
        open = store.create();
        CHECK(store.reserve(open, 40));
    }

    void capture(int32_t sequence, int64_t n) {
        const std::lock_guard<std::mutex> lock(store.mutex());
        for (size_t layer = 0; layer < LAYERS; ++layer)
            store.capture_locked(store.sequence_locked(sequence), layer, rows.data(), n, 7);
    }
    void append(int32_t sequence, int64_t n) {
        std::vector<float> kv(static_cast<size_t>(n) * HEADS * WIDTH, 0.25f);
        const int64_t first = PROMPT;
        for (size_t layer = 0; layer < LAYERS; ++layer) store.append(sequence, layer, kv.data(), kv.data(), n, first);
    }

    // All that can be seen of the store.
    std::vector<double> state() const {
        std::vector<double> seen{static_cast<double>(store.nbytes()), static_cast<double>(store.num_sequences())};
        for (const int32_t sequence : {id, twin, staged, open}) {
            seen.push_back(static_cast<double>(store.nbytes_of(sequence)));
            seen.push_back(static_cast<double>(store.free_slots(sequence)));
            for (const CodecPair& pair : store.precisions(sequence))
                seen.insert(seen.end(), {static_cast<double>(pair.key), static_cast<double>(pair.value)});
            for (size_t layer = 0; layer < LAYERS; ++layer) {
                for (size_t head = 0; head < HEADS; ++head) {
                    const HeadTokens tokens = store.read(sequence, layer, head);
                    seen.insert(seen.end(), tokens.k.begin(), tokens.k.end());
                    seen.insert(seen.end(), tokens.v.begin(), tokens.v.end());
                    seen.insert(seen.end(), tokens.positions.begin(), tokens.positions.end());
                }
                std::vector<float> q;
                std::vector<int32_t> positions;
                const std::lock_guard<std::mutex> lock(store.mutex());
                store.captured_locked(store.sequence_locked(sequence), layer, q, positions);
                seen.insert(seen.end(), q.begin(), q.end());
                seen.insert(seen.end(), positions.begin(), positions.end());
            }
        }
        seen.push_back(static_cast<double>(store.nbytes_of_all({id, twin, staged, open}).held));
        return seen;
    }
};

struct Operation {
    const char* name;
    bool may_fail;  // false: what it could not do for want of memory is left for later
    std::function<void(Scene&)> run;
};

std::vector<Operation> operations() {
    static const std::vector<int32_t> few = [] {
        std::vector<int32_t> indices;
        for (size_t h = 0; h < LAYERS * HEADS; ++h)
            for (int32_t t = 0; t < PROMPT; t += 1 + t % 3) indices.push_back(t);
        return indices;
    }();
    static const std::vector<int64_t> offsets = [] {
        std::vector<int64_t> o;
        for (size_t h = 0; h <= LAYERS * HEADS; ++h) o.push_back(static_cast<int64_t>(few.size() / 4 * h));
        return o;
    }();
    const Selection selection{offsets.data(), offsets.size(), few.data(), few.size()};
    static const std::vector<uint8_t> tiers = [] {
        std::vector<uint8_t> t;
        for (size_t i = 0; i < few.size(); ++i) t.push_back(i % 3 == 0);
        return t;
    }();
    static const Wanted wanted = [] {
        Wanted w;
        w.num_tiers = 2;
        for (size_t h = 0; h < LAYERS * HEADS; ++h) {
            w.precisions.push_back({Codec::u8, Codec::u4});
            w.precisions.push_back({Codec::u4, Codec::u2});
        }
        w.tiers = tiers.data();
        return w;
    }();
    static const Precisions precisions(LAYERS * HEADS, {Codec::u4, Codec::u4});
    static Dump dump;
    return {
        {"create with precisions", true, [](Scene& s) { s.store.create(0, &precisions); }},
        {"commit_prefill of tiers", true, [=](Scene& s) { s.store.commit_prefill(s.staged, &selection, 0, &wanted); }},
        {"compact to tiers", true, [=](Scene& s) { s.store.compact(s.id, selection, &wanted); }},
        {"create", true, [](Scene& s) { s.store.create(8); }},
        {"reserve", true, [](Scene& s) { CHECK(s.store.reserve(s.id, 100)); }},
        {"append", true, [](Scene& s) { s.store.append(s.open, 0, s.rows.data(), s.rows.data(), 30, 0); }},
        {"quantize_aged", false, [](Scene& s) { s.store.quantize_aged(s.id); }},
        {"commit_prefill", true, [](Scene& s) { s.store.commit_prefill(s.staged); }},
        {"commit_prefill of some", true, [=](Scene& s) { s.store.commit_prefill(s.staged, &selection); }},
        {"compact", true, [=](Scene& s) { s.store.compact(s.id, selection); }},
        {"fork", true, [](Scene& s) { s.store.fork(s.id); }},
        {"fork of some", true, [](Scene& s) { s.store.fork(s.id, 77); }},
        {"set_capture", true, [](Scene& s) { s.store.set_capture(s.id, 9); }},
        {"attach_prefill", true, [](Scene& s) { s.store.attach_prefill(s.staged, s.blocks.ids, 100); }},
        {"load", true,
         [](Scene& s) {
             const long left = std::exchange(allocations_left, -1);
             dump = s.store.dump(s.id);
             allocations_left = left;
             s.store.load(dump.heads, dump.tiles.data(), dump.tiles.size(), 3);
         }},
        {"capture", true,
         [](Scene& s) {
             const std::lock_guard<std::mutex> lock(s.store.mutex());
             s.store.capture_locked(s.store.sequence_locked(s.id), 0, s.rows.data(), 2, 300);
         }},
    };
}

void test_failing_allocations(const ParallelFor& parallel, const char* pool, double recall = 0) {
    for (const Operation& operation : operations()) {
        int failures = 0;
        for (long n = 0;; ++n) {
            Scene scene(parallel, recall);
            const std::vector<double> before = scene.state();
            bool failed = false;
            allocations_left = n;
            try {
                operation.run(scene);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
            const bool reached = allocations_left == 0 || failed;
            allocations_left = -1;
            failures += failed;
            CHECK(!failed || (operation.may_fail && scene.state() == before));
            CHECK(scene.store.nbytes() < 4000000);
            for (const int32_t id : {scene.id, scene.twin, scene.staged, scene.open}) scene.store.release(id);
            for (int32_t id = scene.open + 1; scene.store.num_sequences(); ++id) scene.store.release(id);
            CHECK(scene.store.nbytes() == 0);
            const int32_t next = scene.store.create();
            CHECK(scene.store.reserve(next, 1000));
            scene.store.release(next);
            if (!reached) break;
        }
        CHECK(operation.may_fail == (failures > 0));
        std::printf("failing allocations, %s, %s: ok, %d\n", pool, operation.name, failures);
    }
}

constexpr size_t SLAB = Arena::SLAB, MAX_SIZES = 4;

// Of a long sequence a few tokens stay, again and again: what slabs hold follows what is used.
void test_memory_follows_what_is_kept() {
    StoreConfig c = config_of(0);
    c.layers = {{8, 8, 64, 0, 0.1f}};
    Store store(c, serial);
    const int32_t id = store.create(), shared = store.create();
    const std::vector<float> kv(2048 * 8 * 64, 0.5f);
    for (const int32_t sequence : {id, shared}) {
        CHECK(store.reserve(sequence, 2048));
        store.append(sequence, 0, kv.data(), kv.data(), 2048, 0);
        store.quantize_aged(sequence);
    }
    const int32_t twin = store.fork(id);
    std::mt19937 random(1);
    for (const int32_t sequence : {id, twin, shared}) {
        std::vector<int64_t> offsets{0};
        std::vector<int32_t> kept;
        for (size_t h = 0; h < 8; ++h) {
            for (int32_t t = 0; t < 2048; ++t) {
                if (random() % 20 == 0) kept.push_back(t);
            }
            offsets.push_back(static_cast<int64_t>(kept.size()));
        }
        store.compact(sequence, {offsets.data(), offsets.size(), kept.data(), kept.size()});
        CHECK(store.reserved_bytes() <= 2 * store.nbytes() + MAX_SIZES * SLAB);
    }
    for (const int32_t sequence : {id, twin, shared}) {
        CHECK(store.read(sequence, 0, 3).k[0] > 0.49f);
        store.release(sequence);
        CHECK(store.reserved_bytes() <= 2 * store.nbytes() + MAX_SIZES * SLAB);
    }
    std::printf("memory follows what is kept: ok\n");
}

// Hundreds of sequences of mixed lengths, released in random order: slabs never hold more than the limit and a little.
void test_memory_stays_within_the_limit() {
    constexpr size_t LIMIT = size_t{6} << 20;
    StoreConfig c = config_of(LIMIT);
    c.layers = {{4, 4, 64, 0, 0.1f}, {4, 2, 128, 0, 0.1f}};
    Store store(c, serial);
    std::mt19937 random(2);
    std::map<int32_t, float> held;
    const std::vector<float> kv(600 * 4 * 64, 1.f);
    const auto check = [&](int32_t id, float value) {
        for (const size_t layer : {0, 1}) {
            const HeadTokens tokens = store.read(id, layer, 1);
            for (const float x : tokens.k) CHECK(std::abs(x - value) < 0.02f);
        }
    };
    int refused = 0;
    for (int i = 0; i < 400; ++i) {
        const int32_t id = store.create();
        const float value = static_cast<float>(i % 7) - 3;
        const int64_t n = 1 + static_cast<int64_t>(random() % (i % 5 ? 100 : 600));
        std::vector<float> rows(kv.begin(), kv.begin() + n * 256);
        for (float& x : rows) x *= value;
        while (!store.reserve(id, n)) {
            ++refused;
            CHECK(!held.empty());
            auto gone = held.begin();
            std::advance(gone, static_cast<long>(random() % held.size()));
            check(gone->first, gone->second);
            store.release(gone->first);
            held.erase(gone);
        }
        for (const size_t layer : {0, 1}) store.append(id, layer, rows.data(), rows.data(), n, 0);
        if (random() % 2) store.quantize_aged(id);
        held[id] = value;
        CHECK(store.nbytes() <= LIMIT);
        CHECK(store.reserved_bytes() <= LIMIT + LIMIT / 20 + 2 * MAX_SIZES * SLAB);
    }
    CHECK(refused > 0);
    for (const auto& [id, value] : held) {
        check(id, value);
        store.release(id);
    }
    std::printf("memory stays within the limit: ok\n");
}

// Forks share captured rows until one captures; all of it is counted, and never above the limit.
void test_captured_rows_are_counted() {
    Store store(config_of(300000), serial);
    const std::vector<float> q(40 * 4 * WIDTH, 0.5f);
    const size_t full = store.capture_bytes(40);
    CHECK(full == LAYERS * 40 * (4 * WIDTH * 4 + 4));
    const auto capture = [&](int32_t id, int64_t n) {
        const std::lock_guard<std::mutex> lock(store.mutex());
        for (size_t layer = 0; layer < LAYERS; ++layer)
            store.capture_locked(store.sequence_locked(id), layer, q.data(), n, 0);
    };
    const int32_t id = store.create(40);
    CHECK(store.nbytes() == 0 && store.capture_bytes(40, id) == full);
    capture(id, 40);
    CHECK(store.nbytes() == full && store.nbytes_of(id) == full && store.capture_bytes(40, id) == 0);
    std::vector<int32_t> forks{id};
    for (int i = 0; i < 20; ++i) forks.push_back(store.fork(id));
    CHECK(store.nbytes() == full && store.nbytes_of_all(forks).held == full && store.nbytes_of_all({id}).freed == 0);
    capture(forks[1], 1);
    CHECK(store.nbytes() == 2 * full && store.nbytes_of_all({forks[1]}).freed == full);
    bool refused = false;
    for (const int32_t fork : forks) {
        try {
            capture(fork, 1);
        } catch (const StoreFull&) {
            refused = true;
        }
        CHECK(store.nbytes() <= 300000);
    }
    CHECK(refused);
    for (const int32_t fork : forks) store.release(fork);
    CHECK(store.nbytes() == 0);
    std::printf("captured rows are counted: ok\n");
}

}  // namespace

int main() {
    test_failing_allocations(serial, "serial");
    test_failing_allocations(greedy, "greedy");
    test_failing_allocations(serial, "serial, with recall", 0.2);
    test_memory_follows_what_is_kept();
    test_memory_stays_within_the_limit();
    test_captured_rows_are_counted();
    return 0;
}
