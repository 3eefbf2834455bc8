#include "op/crush_scores.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "op/evaluate.hpp"
#include "op/plan.hpp"
#include "store/require.hpp"
#include "store/store.hpp"

namespace crush {
namespace {

// Scores of one layer of one step, for all entries that ask.
class LayerScores {
public:
    LayerScores(Store& store, size_t layer) : store_(store), layer_(layer) {}

    void append(const PlanEntry& e) {
        const Sequence& sequence = store_.sequence_locked(e.sequence);
        require(sequence.capture_rows > 0, "a sequence whose scores are wanted must capture queries", 0);
        std::vector<float> window;
        std::vector<int32_t> positions;
        store_.captured_locked(sequence, layer_, window, positions);
        store_.scores_locked(sequence, layer_, window.data(), positions.data(), positions.size(),
                             static_cast<Reduce>(e.reduce), scores);
    }

    std::vector<float> scores;

private:
    Store& store_;
    const size_t layer_;
};

}  // namespace

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
    return with_context("CrushScores", [&] {
        const int32_t* numbers = int32_input(inputs, 2);
        const size_t size = inputs[2].get_size();
        const Plan plan = Plan::parse(numbers, size, size > 1 ? static_cast<size_t>(std::max(numbers[1], 0)) : 0);
        const bool any_scores =
            std::any_of(plan.entries.begin(), plan.entries.end(), [](const PlanEntry& e) { return e.wants_scores(); });
        if (!any_scores) {
            for (ov::Tensor& output : outputs) output.set_shape({0});
            return;
        }
        const std::shared_ptr<Store> store = find_store(inputs, 1);
        require(static_cast<size_t>(layers_) == store->config().layers.size(), "layers must be as many as the store's",
                static_cast<size_t>(layers_));
        const std::lock_guard<std::mutex> lock(store->mutex());
        for (size_t layer = 0; layer < outputs.size(); ++layer) {
            LayerScores layer_scores(*store, layer);
            for (const PlanEntry& e : plan.entries) {
                if (e.wants_scores()) layer_scores.append(e);
            }
            outputs[layer].set_shape({layer_scores.scores.size()});
            std::copy(layer_scores.scores.begin(), layer_scores.scores.end(), outputs[layer].data<float>());
        }
    });
}

}  // namespace crush
