// The store as Python sees it: arguments are checked, and the GIL is released while it works.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "python/arguments.hpp"
#include "python/py_arrays.hpp"
#include "store/store.hpp"

namespace crush {

class PyStore {
public:
    using Span = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // sequence, row_begin, num_rows, first_position

    PyStore(const std::vector<LayerArgument>& layers, const std::string& key, const std::string& value,
            const std::string& recent, int64_t recent_tokens, int64_t group_size, int64_t max_bytes,
            const std::string& isa, double recall_tokens);
    ~PyStore();
    PyStore(const PyStore&) = delete;
    PyStore& operator=(const PyStore&) = delete;

    int32_t id() const;
    std::string isa() const;
    size_t nbytes() const;
    size_t reserved_bytes() const;
    size_t max_bytes() const;
    size_t num_sequences() const;
    void close();

    int32_t create(int64_t capture_rows, const std::optional<Input>& precisions);
    void set_precisions(int64_t seq, const Input& precisions);
    Output<uint8_t> precisions(int64_t seq) const;
    void release(int64_t seq);
    int32_t fork(int64_t seq, std::optional<int64_t> num_tokens);
    void crop(int64_t seq, int64_t num_tokens);
    bool reserve(int64_t seq, int64_t num_tokens, int64_t promised);
    int64_t free_slots(int64_t seq) const;
    void quantize_aged(int64_t seq);
    void set_staging(int64_t layer, const Writable& keys, const Writable& values, int64_t num_blocks,
                     const std::string& precision);
    void attach_prefill(int64_t seq, const Input& blocks, int64_t num_tokens);
    void commit_prefill(int64_t seq, const std::optional<Input>& offsets, const std::optional<Input>& indices,
                        int64_t promised, const std::optional<Input>& precisions, const std::optional<Input>& tiers);
    Output<int32_t> compact(int64_t seq, const Input& offsets, const Input& indices,
                            const std::optional<Input>& precisions, const std::optional<Input>& tiers);
    void append(int64_t seq, int64_t layer, const Input& k, const Input& v, int64_t first_position);
    std::pair<Output<int64_t>, Output<uint8_t>> dump(int64_t seq) const;
    int32_t load(const Input& heads, const Input& tiles, int64_t capture_rows, int64_t promised);
    Output<float> attend(int64_t layer, const std::vector<Span>& spans, const Input& q) const;
    Output<float> prefill(int64_t layer, const std::vector<Span>& spans, const Input& q, const Input& k,
                          const Input& v);
    std::vector<Output<int32_t>> recalled(int64_t layer, const Span&, const Input& q) const;
    Output<float> means(int64_t seq, int64_t layer, int64_t head) const;
    Output<float> scores(int64_t seq, int64_t layer, const Input& q, const Input& positions,
                         const std::string& reduce) const;
    void set_capture(int64_t seq, int64_t capture_rows);
    std::pair<Output<float>, Output<int32_t>> captured(int64_t seq, int64_t layer) const;
    int64_t num_tokens(int64_t seq, int64_t layer, int64_t head) const;
    Output<int32_t> positions(int64_t seq, int64_t layer, int64_t head) const;
    std::pair<Output<float>, Output<float>> read(int64_t seq, int64_t layer, int64_t head) const;
    size_t nbytes_of(int64_t seq) const;
    size_t capture_bytes(int64_t rows, std::optional<int64_t> seq) const;
    size_t nbytes_of_all(const std::vector<int64_t>& ids) const;
    size_t nbytes_freed_by(const std::vector<int64_t>& ids) const;
    size_t bytes_for(const nanobind::object& num_tokens, const std::optional<Input>& precisions) const;

private:
    std::shared_ptr<Store> store() const;  // throws std::invalid_argument once closed
    const LayerShape& layer_shape(const Store&, int64_t layer) const;

    std::shared_ptr<Store> store_;  // changes only under the GIL
    int32_t id_ = 0;
    std::vector<std::pair<Writable, Writable>> staging_;  // [layers]: keeps the arrays alive
};

}  // namespace crush
