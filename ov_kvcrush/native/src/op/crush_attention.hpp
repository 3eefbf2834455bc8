// The OpenVINO operation CrushAttention: attention of the rows that do not belong to a fresh prompt, over the store.
#pragma once

#include <openvino/op/op.hpp>

namespace crush {

// Inputs:
//   0..2  q [T, H * D], k [T, K * D], v [T, K * D]: float32; all rows of the step, RoPE applied
//   3     output of PagedAttention, of which the prompt rows are read
//   4     crush_store i32 [1]: id of the store       5  crush_plan i32 [n]: see plan.hpp
// Output:
//   [T, H * D]: PagedAttention's prompt rows, then the rows computed here
// (bfloat16 tensors are no gain: the plugin puts a conversion to float32 before each Convert to bfloat16.)
// One output, of a shape that follows from the inputs: with a second of unknown shape the plugin would copy both.
class CrushAttention : public ov::op::Op {
public:
    OPENVINO_OP("CrushAttention", "ov_kvcrush");

    CrushAttention() = default;
    CrushAttention(const ov::OutputVector& arguments, int64_t layer);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& arguments) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    // Throws ov::Exception with the reason for a plan, a shape or a handle that cannot be believed.
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    int64_t layer_ = 0;
};

// The operation CrushScores: attention scores of all layers, of the entries that ask for them. It runs once, behind the
// last CrushAttention, when all keys and queries of the step are in the store or on staging blocks.
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
