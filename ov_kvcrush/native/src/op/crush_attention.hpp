// The operation CrushAttention: attention over the store, and over the staging blocks of fresh prompts.
#pragma once

#include <openvino/op/op.hpp>

namespace crush {

// Inputs:
//   0..2  q [T, H * D], k [T, K * D], v [T, K * D]: float32; all rows of the step, RoPE applied
//   3     output of PagedAttention, of which the prompt rows are read
//   4     crush_store i32 [1]: id of the store       5  crush_plan i32 [n]: see plan.hpp
// Output:
//   [T, H * D]: PagedAttention's prompt rows, then the rows computed here
// Attributes:
//   layer    of the store
//   appends  false for a layer of the model that reads the keys and values which an earlier layer of the step appended
//            to the same layer of the store: it appends nothing and captures no queries. Its k and v are that one's.
// (bf16 tensors gain nothing: the plugin puts a conversion to float32 before each Convert to bf16.)
// One output, of a shape that follows from the inputs: with a second of unknown shape the plugin would copy both.
class CrushAttention : public ov::op::Op {
public:
    OPENVINO_OP("CrushAttention", "ov_kvcrush");

    CrushAttention() = default;
    CrushAttention(const ov::OutputVector& arguments, int64_t layer, bool appends);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& arguments) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    // Throws ov::Exception with the reason for an invalid plan, shape or store id.
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    int64_t layer_ = 0;
    bool appends_ = true;
};

}  // namespace crush
