// Methods of PyStore over many rows: attention, scores and captured queries.
#include <algorithm>
#include <climits>

#include "kernels/attention.hpp"
#include "op/threads.hpp"
#include "python/arguments.hpp"
#include "python/py_store.hpp"
#include "store/require.hpp"

namespace crush {
namespace {

using ReleaseGil = nanobind::gil_scoped_release;

int64_t query_width(const LayerShape& shape) { return static_cast<int64_t>(shape.num_heads) * shape.head_size; }

// Checks that the rows of the spans are within num_rows, and that no row belongs to two of them.
void check_spans(const std::vector<PyStore::Span>& spans, int64_t num_rows) {
    std::vector<std::pair<int64_t, int64_t>> rows;
    for (const auto& [seq, begin, count, first_position] : spans) {
        require(count >= 1 && count <= num_rows, "num_rows must be in 1.." + std::to_string(num_rows), count);
        require(begin >= 0 && begin <= num_rows - count, "row_begin must be in 0.." + std::to_string(num_rows - count),
                begin);
        require(first_position >= 0 && first_position <= INT_MAX - count, "first_position must be at least 0",
                first_position);
        rows.emplace_back(begin, begin + count);
    }
    std::sort(rows.begin(), rows.end());
    for (size_t i = 1; i < rows.size(); ++i) {
        require(rows[i].first >= rows[i - 1].second, "spans must not overlap", rows[i].first);
    }
}

std::vector<RowSpan> row_spans(const Store& store, const std::vector<PyStore::Span>& spans) {
    std::vector<RowSpan> rows;
    for (const auto& [seq, begin, count, first_position] : spans)
        rows.push_back({&store.sequence_locked(to_id(seq)), static_cast<size_t>(begin), static_cast<size_t>(count),
                        static_cast<int32_t>(first_position)});
    return rows;
}

Reduce reduce_of(const std::string& name) {
    if (name == "mean") return Reduce::mean;
    if (name == "max") return Reduce::max;
    if (name == "sum_squares") return Reduce::sum_squares;
    throw std::invalid_argument("reduce must be one of mean, max, sum_squares, got " + name);
}

}  // namespace

Output<float> PyStore::attend(int64_t layer, const std::vector<Span>& spans, const Input& q) const {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const float* queries = data_of<float>(q, "q", {ANY, query_width(shape)});
    const size_t num_rows = q.shape(0);
    check_spans(spans, static_cast<int64_t>(num_rows));
    std::vector<float> out(num_rows * static_cast<size_t>(query_width(shape)), 0.f);
    {
        const ReleaseGil release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        s->attend_locked(static_cast<size_t>(layer), row_spans(*s, spans), queries, out.data(), num_threads());
    }
    return to_numpy(std::move(out), {num_rows, static_cast<size_t>(query_width(shape))});
}

Output<float> PyStore::prefill(int64_t layer, const std::vector<Span>& spans, const Input& q, const Input& k,
                               const Input& v) {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const float* queries = data_of<float>(q, "q", {ANY, query_width(shape)});
    const auto num_rows = static_cast<int64_t>(q.shape(0)), width = int64_t{shape.num_kv_heads} * shape.head_size;
    const float *keys = data_of<float>(k, "k", {num_rows, width}), *values = data_of<float>(v, "v", {num_rows, width});
    check_spans(spans, num_rows);
    std::vector<float> out(static_cast<size_t>(num_rows * query_width(shape)), 0.f);
    {
        const ReleaseGil release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        s->prefill_locked(static_cast<size_t>(layer), row_spans(*s, spans), queries, keys, values, out.data(),
                          num_threads());
    }
    return to_numpy(std::move(out), {static_cast<size_t>(num_rows), static_cast<size_t>(query_width(shape))});
}

std::vector<Output<int32_t>> PyStore::recalled(int64_t layer, const Span& span, const Input& q) const {
    const auto s = store();
    const float* queries = data_of<float>(q, "q", {ANY, query_width(layer_shape(*s, layer))});
    check_spans({span}, static_cast<int64_t>(q.shape(0)));
    std::vector<std::vector<int32_t>> tiles;
    {
        const ReleaseGil release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        tiles = s->recalled_locked(row_spans(*s, {span}).front(), static_cast<size_t>(layer), queries);
    }
    std::vector<Output<int32_t>> arrays;
    for (std::vector<int32_t>& of_head : tiles) {
        const size_t n = of_head.size();
        arrays.push_back(to_numpy(std::move(of_head), {n}));
    }
    return arrays;
}

Output<float> PyStore::means(int64_t seq, int64_t layer, int64_t head) const {
    const auto s = store();
    const auto width = static_cast<size_t>(layer_shape(*s, layer).head_size);
    const size_t h = to_size("head", head);
    std::vector<float> numbers;
    {
        const ReleaseGil release;
        numbers = s->means(to_id(seq), static_cast<size_t>(layer), h);
    }
    const size_t n = numbers.size() / width;
    return to_numpy(std::move(numbers), {n, width});
}

Output<float> PyStore::scores(int64_t seq, int64_t layer, const Input& q, const Input& positions,
                              const std::string& reduce) const {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const Reduce reduction = reduce_of(reduce);
    const auto* row_positions = data_of<int32_t>(positions, "positions", {ANY});
    const size_t num_rows = positions.shape(0);
    require(num_rows >= 1, "positions must hold at least one row", num_rows);
    const float* queries = data_of<float>(q, "q", {static_cast<int64_t>(num_rows), query_width(shape)});
    std::vector<float> out;
    {
        const ReleaseGil release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        const Sequence& sequence = s->sequence_locked(to_id(seq));
        s->scores_locked(sequence, static_cast<size_t>(layer), queries, row_positions, num_rows, reduction, out);
    }
    const size_t size = out.size();
    return to_numpy(std::move(out), {size});
}

void PyStore::set_capture(int64_t seq, int64_t capture_rows) {
    const auto s = store();
    const ReleaseGil release;
    s->set_capture(to_id(seq), capture_rows);
}

std::pair<Output<float>, Output<int32_t>> PyStore::captured(int64_t seq, int64_t layer) const {
    const auto s = store();
    const LayerShape& shape = layer_shape(*s, layer);
    const auto width = static_cast<size_t>(query_width(shape));
    std::vector<float> rows;
    std::vector<int32_t> positions;
    {
        const ReleaseGil release;
        const std::lock_guard<std::mutex> lock(s->mutex());
        s->captured_locked(s->sequence_locked(to_id(seq)), static_cast<size_t>(layer), rows, positions);
    }
    const size_t n = positions.size();
    return {to_numpy(std::move(rows), {n, width}), to_numpy(std::move(positions), {n})};
}

}  // namespace crush
