#include "op/crush_attention.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "op/evaluate.hpp"
#include "op/plan.hpp"
#include "op/threads.hpp"
#include "store/require.hpp"
#include "store/store.hpp"

namespace crush {
namespace {

void check_columns(const char* what, const ov::Shape& shape, size_t width) {
    if (shape.size() == 2 && shape[1] == width) return;
    require(false, std::string(what) + " must have " + std::to_string(width) + " columns", shape.back());
}

// One layer of one step.
class LayerStep {
public:
    LayerStep(Store& store, size_t layer, bool appends, const ov::TensorVector& inputs, ov::TensorVector& outputs)
        : store_(store),
          layer_(layer),
          appends_(appends),
          shape_(store.config().layers[layer]),
          inputs_(inputs),
          outputs_(outputs) {
        const ov::Shape& q = inputs[0].get_shape();
        const size_t width = static_cast<size_t>(shape_.num_heads) * shape_.head_size;
        const size_t kv_width = static_cast<size_t>(shape_.num_kv_heads) * shape_.head_size;
        check_columns("q", q, width);
        for (size_t i : {1, 2}) {
            const ov::Shape& kv = inputs[i].get_shape();
            check_columns("keys and values", kv, kv_width);
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
        prefill_rows();
        attend_stored_rows();
        if (appends_) capture_queries();
    }

private:
    void copy_prompt_rows() {
        if (!plan_.num_prompt_rows) return;
        const ov::Shape& shape = inputs_[3].get_shape();
        require(shape.size() == 2 && shape[1] == width_ && shape[0] >= plan_.num_prompt_rows,
                "PagedAttention must give a row for each of " + std::to_string(plan_.num_prompt_rows) + " prompt rows",
                shape[0]);
        const size_t rows = plan_.num_prompt_rows, at_once = 32;
        const float* from = inputs_[3].data<const float>();
        float* to = outputs_[0].data<float>();
        parallel_for()((rows + at_once - 1) / at_once, [&](size_t i) {
            const size_t begin = i * at_once, end = std::min(rows, begin + at_once);
            std::copy(from + begin * width_, from + end * width_, to + begin * width_);
        });
    }

    // Row `row` of q, k or v, which are inputs 0, 1 and 2.
    const float* at(size_t input, int32_t row) const {
        return inputs_[input].data<const float>() + static_cast<size_t>(row) * (input == 0 ? width_ : kv_width_);
    }

    // Rows of fresh prompts that bypass PagedAttention. A layer that does not append has the keys and values of the one
    // that does as its inputs: writing them again changes nothing.
    void prefill_rows() {
        std::vector<RowSpan> spans;
        for (const PlanEntry& e : plan_.entries) {
            if (e.kind != PlanEntry::prefill) continue;
            spans.push_back({&store_.sequence_locked(e.sequence), static_cast<size_t>(e.row_begin),
                             static_cast<size_t>(e.num_rows), e.first_position});
        }
        if (spans.empty()) return;
        store_.prefill_locked(layer_, spans, at(0, 0), at(1, 0), at(2, 0), outputs_[0].data<float>(), num_threads());
    }

    // Rows over the store: appends their keys and values, unless an earlier layer of the step has, then attends.
    void attend_stored_rows() {
        std::vector<RowSpan> spans;
        for (const PlanEntry& e : plan_.entries) {
            if (e.kind != PlanEntry::stored) continue;
            Sequence& sequence = store_.sequence_locked(e.sequence);
            if (appends_) {
                store_.append_locked(sequence, layer_, at(1, e.row_begin), at(2, e.row_begin), e.num_rows,
                                     e.first_position);
            }
            spans.push_back(
                {&sequence, static_cast<size_t>(e.row_begin), static_cast<size_t>(e.num_rows), e.first_position});
        }
        if (spans.empty()) return;
        store_.attend_locked(layer_, spans, at(0, 0), outputs_[0].data<float>(), num_threads());
    }

    void capture_queries() {
        for (const PlanEntry& e : plan_.entries) {
            Sequence& sequence = store_.sequence_locked(e.sequence);
            if (!sequence.capture_rows) continue;
            store_.capture_locked(sequence, layer_, at(0, e.row_begin), e.num_rows, e.first_position);
        }
    }

    Store& store_;
    const size_t layer_;
    const bool appends_;
    const LayerShape& shape_;
    const ov::TensorVector& inputs_;
    ov::TensorVector& outputs_;
    size_t width_ = 0, kv_width_ = 0;
    Plan plan_;
};

}  // namespace

CrushAttention::CrushAttention(const ov::OutputVector& arguments, int64_t layer, bool appends)
    : Op(arguments), layer_(layer), appends_(appends) {
    constructor_validate_and_infer_types();
}

void CrushAttention::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == 6, "CrushAttention must have 6 inputs, got ", get_input_size());
    const ov::element::Type type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type == ov::element::f32, "q must be float32, got ", type);
    set_output_type(0, type, get_input_partial_shape(0));
}

std::shared_ptr<ov::Node> CrushAttention::clone_with_new_inputs(const ov::OutputVector& arguments) const {
    return std::make_shared<CrushAttention>(arguments, layer_, appends_);
}

bool CrushAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("layer", layer_);
    visitor.on_attribute("appends", appends_);
    return true;
}

bool CrushAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    return with_context("CrushAttention of layer " + std::to_string(layer_), [&] {
        for (size_t i = 0; i < 4; ++i) {
            const ov::element::Type type = inputs[i].get_element_type();
            OPENVINO_ASSERT(type == ov::element::f32, "input ", i, " must be float32, got ", type);
        }
        int32_input(inputs, 5);
        const std::shared_ptr<Store> store = find_store(inputs, 4);
        require(static_cast<size_t>(layer_) < store->config().layers.size(), "layer must be one of the store's",
                static_cast<size_t>(layer_));
        LayerStep(*store, static_cast<size_t>(layer_), appends_, inputs, outputs).run();
    });
}

}  // namespace crush
