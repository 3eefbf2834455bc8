#include "op/crush_product.hpp"

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "op/evaluate.hpp"
#include "op/threads.hpp"
#include "store/require.hpp"

namespace crush {
namespace {

struct Registry {
    std::mutex mutex;
    std::unordered_map<int64_t, ProductRegistry::Entry> entries;
    int32_t last_id = 0;
};

Registry& registry() {
    static Registry instance;
    return instance;
}

void copy_rows(const float* from, size_t size, float* to) {
    constexpr size_t at_once = 64 << 10;
    parallel_for()((size + at_once - 1) / at_once, [&](size_t i) {
        std::copy(from + i * at_once, from + std::min(size, (i + 1) * at_once), to + i * at_once);
    });
}

}  // namespace

int32_t ProductRegistry::add(Entry entry) {
    Registry& r = registry();
    const std::lock_guard<std::mutex> lock(r.mutex);
    r.entries.emplace(r.last_id + 1, std::move(entry));
    return ++r.last_id;
}

ProductRegistry::Entry ProductRegistry::find(int64_t id) {
    Registry& r = registry();
    const std::lock_guard<std::mutex> lock(r.mutex);
    const auto found = r.entries.find(id);
    require(found != r.entries.end(), "product must be the id of one that is there", id);
    return found->second;
}

void ProductRegistry::remove(int32_t id) {
    Entry last;  // freed outside the lock
    Registry& r = registry();
    const std::lock_guard<std::mutex> lock(r.mutex);
    const auto found = r.entries.find(id);
    if (found == r.entries.end()) return;
    last = std::move(found->second);
    r.entries.erase(found);
}

CrushProduct::CrushProduct(const ov::OutputVector& arguments, int64_t product, int64_t width)
    : Op(arguments), product_(product), width_(width) {
    constructor_validate_and_infer_types();
}

void CrushProduct::validate_and_infer_types() {
    NODE_VALIDATION_CHECK(this, get_input_size() == 2, "CrushProduct must have 2 inputs, got ", get_input_size());
    const ov::element::Type type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type == ov::element::f32, "x must be float32, got ", type);
    ov::PartialShape shape = get_input_partial_shape(0);
    NODE_VALIDATION_CHECK(this, shape.rank().is_static() && shape.size() > 0, "x must have a known rank, got ", shape);
    shape[shape.size() - 1] = width_;
    set_output_type(0, type, shape);
}

std::shared_ptr<ov::Node> CrushProduct::clone_with_new_inputs(const ov::OutputVector& arguments) const {
    return std::make_shared<CrushProduct>(arguments, product_, width_);
}

bool CrushProduct::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("product", product_);
    visitor.on_attribute("width", width_);
    return true;
}

bool CrushProduct::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    return with_context("CrushProduct", [&] {
        const ProductRegistry::Entry entry = ProductRegistry::find(product_);
        const Product& product = *entry.product;
        for (const ov::Tensor& input : inputs) {
            const ov::element::Type type = input.get_element_type();
            OPENVINO_ASSERT(type == ov::element::f32, "inputs must be float32, got ", type);
        }
        require(static_cast<size_t>(width_) == product.num_outputs(), "width must be the product's", width_);
        ov::Shape shape = inputs[0].get_shape();
        require(shape.back() == product.num_inputs(), "x must have the product's inputs", shape.back());
        shape.back() = product.num_outputs();
        outputs[0].set_shape(shape);
        float* out = outputs[0].data<float>();
        if (inputs[1].get_size()) {
            require(inputs[1].get_shape() == shape, "the plugin's rows must have the product's shape",
                    inputs[1].get_size());
            copy_rows(inputs[1].data<const float>(), inputs[1].get_size(), out);
        } else if (outputs[0].get_size()) {
            product.run(*entry.kernels, inputs[0].data<const float>(), inputs[0].get_size() / product.num_inputs(),
                        out, parallel_for());
        }
    });
}

}  // namespace crush
