// Rows of fresh prompts that bypass PagedAttention: keys and values go to staging blocks, and attention reads them
// there; without a kernel for that, from tiles that are made of them for the step.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/half.hpp"
#include "store/require.hpp"
#include "store/store.hpp"

namespace crush {
namespace {

// [count, D] rows, `stride` numbers apart, as float numbers of the codec: the nearest, half to even.
void write_rows(const float* from, size_t stride, size_t count, size_t size, Codec codec, uint8_t* to) {
    auto* out = reinterpret_cast<uint16_t*>(to);
    for (size_t i = 0; i < count; ++i, from += stride, to += size * bytes_per_number(codec), out += size) {
        if (codec == Codec::f32) std::memcpy(to, from, size * sizeof(float));
        if (codec == Codec::bf16)
            for (size_t c = 0; c < size; ++c) out[c] = bf16_of_float(from[c]);
        if (codec == Codec::f16)
            for (size_t c = 0; c < size; ++c) out[c] = half_of_float(from[c], Rounding::nearest);
    }
}

bool has_prefill(const Kernels& kernels, const LayerShape& shape, Codec staging) {
    return kernels.prefill && staging == Codec::bf16 && shape.head_size % 32 == 0 && shape.scale > 0 &&
           shape.num_heads / shape.num_kv_heads <= PREFILL_MAX_COLUMNS;
}

bool any_capped(const std::vector<LayerShape>& layers) {
    return std::any_of(layers.begin(), layers.end(), [](const LayerShape& shape) { return shape.soft_cap > 0; });
}

// The rows of one KV head that are computed together.
struct Task {
    const RowSpan* span;
    uint8_t *const *keys, *const *values;  // blocks of the head
    size_t head, first, count;
};

}  // namespace

bool can_prefill(const Kernels& kernels, const std::vector<LayerShape>& layers, Codec staging) {
    return any_capped(layers) || std::all_of(layers.begin(), layers.end(), [&](const LayerShape& shape) {
               return has_prefill(kernels, shape, staging);
           });
}

void Store::prefill_locked(size_t layer, const std::vector<RowSpan>& spans, const float* q, const float* k,
                           const float* v, float* out, int num_threads) const {
    const LayerShape& shape = config_.layers[layer];
    const Staging& staging = layouts_[layer].staging;
    const bool has_kernel = has_prefill(*kernels_, shape, staging.codec);
    if (!has_kernel && !any_capped(config_.layers))
        throw std::invalid_argument("prompts must go through PagedAttention with kernels " +
                                    std::string(kernels_->isa));
    const auto num_kv_heads = static_cast<size_t>(shape.num_kv_heads), size = static_cast<size_t>(shape.head_size);
    const size_t group = static_cast<size_t>(shape.num_heads) / num_kv_heads, kv_width = num_kv_heads * size;
    const size_t row_bytes = size * bytes_per_number(staging.codec), block_bytes = TILE * row_bytes;
    const size_t most_rows = std::max<size_t>(PREFILL_MAX_COLUMNS / group, 1);

    std::vector<std::vector<uint8_t*>> blocks;  // for each span: keys of each head, then values of each head
    std::vector<Task> tasks;
    for (const RowSpan& span : spans) {
        check_staged(*span.sequence, layer);
        const int64_t end = int64_t{span.first_position} + static_cast<int64_t>(span.num_rows);
        require(end <= span.sequence->staged_tokens,
                "rows must end within the " + std::to_string(span.sequence->staged_tokens) + " staged tokens", end);
        const size_t num_blocks = static_cast<size_t>(end + TILE - 1) / TILE;
        blocks.emplace_back(2 * num_kv_heads * num_blocks);
        uint8_t** at = blocks.back().data();
        for (uint8_t* data : {staging.keys, staging.values})
            for (size_t head = 0; head < num_kv_heads; ++head)
                for (size_t i = 0; i < num_blocks; ++i)
                    *at++ = data +
                            (static_cast<size_t>(span.sequence->staged_blocks[i]) * num_kv_heads + head) * block_bytes;
        for (size_t head = 0; head < num_kv_heads; ++head) {
            uint8_t* const* keys = blocks.back().data() + head * num_blocks;
            for (size_t first = 0; first < span.num_rows; first += most_rows)
                tasks.push_back({&span, keys, keys + num_kv_heads * num_blocks, head, first,
                                 std::min(most_rows, span.num_rows - first)});
        }
    }

    run_parallel(tasks.size(), [&](size_t i) {
        const Task& task = tasks[i];
        for (size_t row = task.first, end = task.first + task.count; row < end;) {
            const size_t token = static_cast<size_t>(task.span->first_position) + row, slot = token % TILE;
            const size_t count = std::min<size_t>(TILE - slot, end - row);
            const size_t from = (task.span->row_begin + row) * kv_width + task.head * size;
            const size_t to = slot * row_bytes;
            write_rows(k + from, kv_width, count, size, staging.codec, task.keys[token / TILE] + to);
            write_rows(v + from, kv_width, count, size, staging.codec, task.values[token / TILE] + to);
            row += count;
        }
    });

    if (!has_kernel) return attend_staged(layer, spans, q, out, num_threads);
    // Longest tasks first: the last rows see the most tokens.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
        return a.span->first_position + static_cast<int64_t>(a.first) >
               b.span->first_position + static_cast<int64_t>(b.first);
    });
    std::atomic<size_t> next{0};
    run_parallel(std::min(static_cast<size_t>(std::max(num_threads, 1)), tasks.size()), [&](size_t) {
        const std::unique_ptr<float[]> scratch(
            new float[prefill_scratch(shape.head_size, static_cast<int>(most_rows * group))]);
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) {
            const Task& task = tasks[i];
            const size_t row = task.span->row_begin + task.first;
            Prefill a{};
            a.keys = task.keys;
            a.values = task.values;
            a.num_tokens = static_cast<size_t>(task.span->first_position) + task.span->num_rows;
            a.head_size = shape.head_size;
            a.group = static_cast<int>(group);
            a.num_rows = static_cast<int>(task.count);
            a.stride = static_cast<size_t>(shape.num_heads) * size;
            a.q = q + row * a.stride + task.head * group * size;
            a.first_position = task.span->first_position + static_cast<int32_t>(task.first);
            a.window = shape.window;
            a.scale = shape.scale;
            a.soft_cap = shape.soft_cap;
            a.slopes = shape.slopes.empty() ? nullptr : shape.slopes.data() + task.head * group;
            a.sinks = shape.sinks.empty() ? nullptr : shape.sinks.data() + task.head * group;
            a.scratch = scratch.get();
            a.out = out + row * a.stride + task.head * group * size;
            kernels_->prefill(a);
        }
    });
}

void Store::attend_staged(size_t layer, const std::vector<RowSpan>& spans, const float* q, float* out,
                          int num_threads) const {
    const LayerShape& shape = config_.layers[layer];
    for (const RowSpan& span : spans) {
        const int64_t first_seen = shape.window > 0 ? int64_t{span.first_position} - shape.window + 1 : 0;
        const size_t first_tile = static_cast<size_t>(std::max<int64_t>(first_seen, 0)) / TILE;
        std::vector<uint8_t> storage;
        std::vector<const uint8_t*> pointers;
        const std::vector<HeadView> views =
            staged_views_locked(*span.sequence, layer, layouts_[layer].staged, first_tile,
                                static_cast<size_t>(span.first_position) + span.num_rows, storage, pointers);
        attend(*kernels_, shape, {{views.data(), span.row_begin, span.num_rows, span.first_position}}, q, out,
               num_threads, parallel_);
    }
}

}  // namespace crush
