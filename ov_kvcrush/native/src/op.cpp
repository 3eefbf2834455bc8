#include "op.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <string>
#include <vector>

#include "plan.hpp"
#include "store.hpp"
#include "threads.hpp"

namespace crush {
namespace {

void require(bool holds, const std::string& rule, size_t got) {
    if (!holds) throw std::invalid_argument(rule + ", got " + std::to_string(got));
}

float widen(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

uint16_t narrow(float value) {  // round to nearest even; the plugin's own conversion does the same
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // a NaN stays one
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Rows [from, from + n) of a tensor [rows, width] of float32 or bfloat16, as float32; `storage` holds them if they must
// be converted.
const float* float_rows(const ov::Tensor& tensor, size_t from, size_t n, size_t width, std::vector<float>& storage) {
    if (tensor.get_element_type() == ov::element::f32) return tensor.data<const float>() + from * width;
    const uint16_t* source = static_cast<const uint16_t*>(tensor.data()) + from * width;
    storage.resize(n * width);
    for (size_t i = 0; i < n * width; ++i) storage[i] = widen(source[i]);
    return storage.data();
}

// One layer of one step.
class LayerStep {
public:
    LayerStep(Store& store, size_t layer, const ov::TensorVector& inputs, ov::TensorVector& outputs)
        : store_(store), layer_(layer), shape_(store.config().layers[layer]), inputs_(inputs), outputs_(outputs) {
        const ov::Shape& q = inputs[0].get_shape();
        const size_t width = static_cast<size_t>(shape_.num_heads) * shape_.head_size;
        const size_t kv_width = static_cast<size_t>(shape_.num_kv_heads) * shape_.head_size;
        require(q.size() == 2 && q[1] == width, "q must have " + std::to_string(width) + " columns", q.back());
        for (size_t i : {1, 2}) {
            const ov::Shape& kv = inputs[i].get_shape();
            require(kv.size() == 2 && kv[1] == kv_width,
                    "keys and values must have " + std::to_string(kv_width) + " columns", kv.back());
            require(kv[0] == q[0], "keys and values must have as many rows as q", kv[0]);
        }
        width_ = width;
        kv_width_ = kv_width;
        plan_ = Plan::parse(inputs[5].data<const int32_t>(), inputs[5].get_size(), q[0]);
    }

    void run() {
        outputs_[0].set_shape(inputs_[0].get_shape());
        copy_prompt_rows();
        const std::lock_guard<std::mutex> lock(store_.mutex());
        if (plan_.num_rows > plan_.num_prompt_rows) stored_rows();
        capture_staged_rows();
    }

private:
    void copy_prompt_rows() {
        if (!plan_.num_prompt_rows) return;
        const ov::Shape& shape = inputs_[3].get_shape();
        require(shape.size() == 2 && shape[1] == width_ && shape[0] >= plan_.num_prompt_rows,
                "PagedAttention must give a row for each of " + std::to_string(plan_.num_prompt_rows) + " prompt rows",
                shape[0]);
        const size_t row_bytes = width_ * inputs_[0].get_element_type().size();
        const size_t rows = plan_.num_prompt_rows, at_once = 32;
        const uint8_t* from = static_cast<const uint8_t*>(inputs_[3].data());
        uint8_t* to = static_cast<uint8_t*>(outputs_[0].data());
        parallel_for()((rows + at_once - 1) / at_once, [&](size_t i) {
            const size_t begin = i * at_once, end = std::min(rows, begin + at_once);
            std::memcpy(to + begin * row_bytes, from + begin * row_bytes, (end - begin) * row_bytes);
        });
    }

    // All rows behind the prompt rows: append, attend, capture, score.
    void stored_rows() {
        const size_t first = plan_.num_prompt_rows, n = plan_.num_rows - first;
        std::vector<float> storage[3], result;
        const float* q = float_rows(inputs_[0], first, n, width_, storage[0]);
        const float* k = float_rows(inputs_[1], first, n, kv_width_, storage[1]);
        const float* v = float_rows(inputs_[2], first, n, kv_width_, storage[2]);
        std::vector<std::vector<HeadView>> views;
        std::vector<AttendSpan> spans;
        for (const PlanEntry& e : plan_.entries) {
            if (e.kind != PlanEntry::stored) continue;
            Sequence& sequence = store_.sequence_locked(e.sequence);
            const size_t row = static_cast<size_t>(e.row_begin) - first;
            store_.append_locked(sequence, layer_, k + row * kv_width_, v + row * kv_width_, e.num_rows,
                                 e.first_position);
            views.push_back(store_.views_locked(sequence, layer_));
            spans.push_back({views.back().data(), row, static_cast<size_t>(e.num_rows), e.first_position});
            if (sequence.capture_rows) {
                store_.capture_locked(sequence, layer_, q + row * width_, e.num_rows, e.first_position);
            }
        }
        const bool wide = outputs_[0].get_element_type() == ov::element::f32;
        if (!wide) result.resize(n * width_);
        float* out = wide ? outputs_[0].data<float>() + first * width_ : result.data();
        attend(store_.kernels(), shape_, spans, q, out, num_threads(), parallel_for());
        if (!wide) {
            uint16_t* narrowed = static_cast<uint16_t*>(outputs_[0].data()) + first * width_;
            for (size_t i = 0; i < n * width_; ++i) narrowed[i] = narrow(out[i]);
        }
    }

    // Of fresh prompts only the queries are wanted.
    void capture_staged_rows() {
        for (const PlanEntry& e : plan_.entries) {
            if (e.kind != PlanEntry::staged) continue;
            Sequence& sequence = store_.sequence_locked(e.sequence);
            if (!sequence.capture_rows) continue;
            std::vector<float> storage;
            const float* q = float_rows(inputs_[0], static_cast<size_t>(e.row_begin), static_cast<size_t>(e.num_rows),
                                        width_, storage);
            store_.capture_locked(sequence, layer_, q, e.num_rows, e.first_position);
        }
    }

    Store& store_;
    const size_t layer_;
    const LayerShape shape_;
    const ov::TensorVector& inputs_;
    ov::TensorVector& outputs_;
    size_t width_ = 0, kv_width_ = 0;
    Plan plan_;
};

// Scores of one layer of one step, for all entries that ask.
class LayerScores {
public:
    LayerScores(Store& store, size_t layer) : store_(store), layer_(layer), shape_(store.config().layers[layer]) {}

    void append(const PlanEntry& e) {
        const Sequence& sequence = store_.sequence_locked(e.sequence);
        require(sequence.capture_rows > 0, "a sequence whose scores are wanted must capture queries", 0);
        std::vector<uint8_t> storage;
        std::vector<const uint8_t*> pointers;
        const std::vector<HeadView> views = e.kind == PlanEntry::stored
                                                ? store_.views_locked(sequence, layer_)
                                                : store_.staged_views_locked(sequence, layer_, storage, pointers);
        size_t tokens = 0;
        for (const HeadView& view : views) {
            for (size_t i = 0; i < view.num_tiles; ++i) tokens += static_cast<size_t>(header(view.tiles[i]).count);
        }
        std::vector<float> window;
        std::vector<int32_t> positions;
        read_capture(sequence, window, positions);
        const size_t begin = scores.size();
        scores.resize(begin + tokens * static_cast<size_t>(shape_.num_heads / shape_.num_kv_heads));
        attention_scores(store_.kernels(), shape_, views.data(), window.data(), positions.data(), positions.size(),
                         static_cast<Reduce>(e.reduce), scores.data() + begin, parallel_for());
    }

    std::vector<float> scores;

private:
    // The captured rows, oldest first.
    void read_capture(const Sequence& sequence, std::vector<float>& rows, std::vector<int32_t>& positions) const {
        const size_t width = static_cast<size_t>(shape_.num_heads) * shape_.head_size;
        const Capture& ring = sequence.captures[layer_];
        const int64_t n = std::min(ring.seen, sequence.capture_rows);
        for (int64_t i = ring.seen - n; i < ring.seen; ++i) {
            const size_t slot = static_cast<size_t>(i % sequence.capture_rows);
            rows.insert(rows.end(), ring.q.begin() + slot * width, ring.q.begin() + (slot + 1) * width);
            positions.push_back(ring.position[slot]);
        }
    }

    Store& store_;
    const size_t layer_;
    const LayerShape shape_;
};

const int32_t* int32_input(const ov::TensorVector& inputs, size_t i) {
    OPENVINO_ASSERT(inputs[i].get_element_type() == ov::element::i32, "input ", i, " must be int32, got ",
                    inputs[i].get_element_type());
    return inputs[i].data<const int32_t>();
}

std::shared_ptr<Store> find_store(const ov::TensorVector& inputs, size_t i) {
    require(inputs[i].get_size() == 1, "crush_store must be one id", inputs[i].get_size());
    return StoreRegistry::find(int32_input(inputs, i)[0]);
}

}  // namespace

CrushAttention::CrushAttention(const ov::OutputVector& arguments, int64_t layer) : Op(arguments), layer_(layer) {
    constructor_validate_and_infer_types();
}

void CrushAttention::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == 6, "CrushAttention must have 6 inputs, got ", get_input_size());
    const ov::element::Type type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type == ov::element::f32 || type == ov::element::bf16,
                          "q must be float32 or bfloat16, got ", type);
    set_output_type(0, type, get_input_partial_shape(0));
}

std::shared_ptr<ov::Node> CrushAttention::clone_with_new_inputs(const ov::OutputVector& arguments) const {
    return std::make_shared<CrushAttention>(arguments, layer_);
}

bool CrushAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("layer", layer_);
    return true;
}

bool CrushAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    try {
        for (size_t i = 0; i < 4; ++i) {
            const ov::element::Type type = inputs[i].get_element_type();
            OPENVINO_ASSERT(type == outputs[0].get_element_type(), "input ", i, " must be of the type of q, got ",
                            type);
        }
        int32_input(inputs, 5);
        const std::shared_ptr<Store> store = find_store(inputs, 4);
        require(static_cast<size_t>(layer_) < store->config().layers.size(), "layer must be one of the store's",
                static_cast<size_t>(layer_));
        LayerStep(*store, static_cast<size_t>(layer_), inputs, outputs).run();
    } catch (const ov::Exception&) {
        throw;
    } catch (const std::exception& error) {
        OPENVINO_THROW("CrushAttention of layer ", layer_, ": ", error.what());
    }
    return true;
}

CrushScores::CrushScores(const ov::OutputVector& arguments, int64_t layers) : Op(arguments), layers_(layers) {
    constructor_validate_and_infer_types();
}

void CrushScores::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == 3, "CrushScores must have 3 inputs, got ", get_input_size());
    NODE_VALIDATION_CHECK(this, layers_ > 0, "layers must be at least 1, got ", layers_);
    for (int64_t i = 0; i < layers_; ++i) {
        set_output_type(static_cast<size_t>(i), ov::element::f32, ov::PartialShape{-1});
    }
}

std::shared_ptr<ov::Node> CrushScores::clone_with_new_inputs(const ov::OutputVector& arguments) const {
    return std::make_shared<CrushScores>(arguments, layers_);
}

bool CrushScores::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("layers", layers_);
    return true;
}

bool CrushScores::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    try {
        const int32_t* numbers = int32_input(inputs, 2);
        const size_t size = inputs[2].get_size();
        const Plan plan = Plan::parse(numbers, size, size > 1 ? static_cast<size_t>(std::max(numbers[1], 0)) : 0);
        const bool is_wanted =
            std::any_of(plan.entries.begin(), plan.entries.end(), [](const PlanEntry& e) { return e.wants_scores(); });
        if (!is_wanted) {
            for (ov::Tensor& output : outputs) output.set_shape({0});
            return true;
        }
        const std::shared_ptr<Store> store = find_store(inputs, 1);
        require(static_cast<size_t>(layers_) == store->config().layers.size(), "layers must be as many as the store's",
                static_cast<size_t>(layers_));
        const std::lock_guard<std::mutex> lock(store->mutex());
        for (size_t layer = 0; layer < outputs.size(); ++layer) {
            LayerScores of_layer(*store, layer);
            for (const PlanEntry& e : plan.entries) {
                if (e.wants_scores()) of_layer.append(e);
            }
            outputs[layer].set_shape({of_layer.scores.size()});
            std::copy(of_layer.scores.begin(), of_layer.scores.end(), outputs[layer].data<float>());
        }
    } catch (const ov::Exception&) {
        throw;
    } catch (const std::exception& error) {
        OPENVINO_THROW("CrushScores: ", error.what());
    }
    return true;
}

}  // namespace crush

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<crush::CrushAttention>>(),
                                                            std::make_shared<ov::OpExtension<crush::CrushScores>>()}));
