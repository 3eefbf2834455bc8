// The operation CrushProduct: a product with compressed weights, or an MLP of three, for steps of few rows.
#pragma once

#include <cstdint>
#include <memory>
#include <openvino/op/op.hpp>

#include "kernels/product.hpp"

namespace crush {

// Products by their ids, which the operation has as an attribute: weights packed once are no constants of the graph,
// of which the plugin would make its own copy.
class ProductRegistry {
public:
    struct Entry {
        std::shared_ptr<const Product> product;
        const ProductKernels* kernels;
    };
    static int32_t add(Entry);
    static Entry find(int64_t id);  // throws std::invalid_argument
    static void remove(int32_t id);
};

// Inputs:
//   0  x [T, .., K] float32
//   1  the same product as the plugin makes it [T or 0, .., N] float32
// Output:
//   [T, .., N]: input 1 where it has rows, else what is computed here
// Attributes:
//   product  id        width  N
class CrushProduct : public ov::op::Op {
public:
    OPENVINO_OP("CrushProduct", "ov_kvcrush");

    CrushProduct() = default;
    CrushProduct(const ov::OutputVector& arguments, int64_t product, int64_t width);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& arguments) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    // Throws ov::Exception with the reason for a product that is gone and for shapes that do not fit it.
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    int64_t product_ = 0, width_ = 0;
};

}  // namespace crush
