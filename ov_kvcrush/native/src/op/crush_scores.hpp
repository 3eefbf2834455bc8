// The operation CrushScores: attention scores of the sequences that ask for them.
#pragma once

#include <openvino/op/op.hpp>

namespace crush {

// Scores of all layers, for the entries of the plan that ask. It runs once, behind the last CrushAttention, when all
// keys and queries of the step are in the store or on staging blocks.
//
// Inputs:
//   0     anything that is computed after the last CrushAttention; not read
//   1, 2  crush_store and crush_plan
// Outputs: one per layer, f32 [n], empty unless an entry asks; see attention_scores
class CrushScores : public ov::op::Op {
public:
    OPENVINO_OP("CrushScores", "ov_kvcrush");

    CrushScores() = default;
    CrushScores(const ov::OutputVector& arguments, int64_t layers);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& arguments) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    int64_t layers_ = 0;
};

}  // namespace crush
