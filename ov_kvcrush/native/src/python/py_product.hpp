// Products with compressed weights as Python sees them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "op/crush_product.hpp"
#include "python/py_arrays.hpp"

namespace crush {

class PyProduct {
public:
    using Weights = std::tuple<int64_t, Input, Input, Input>;  // bits, codes, scales, zero points

    PyProduct(const std::vector<Weights>& weights, const std::string& activation, const std::string& isa);
    ~PyProduct();
    PyProduct(const PyProduct&) = delete;
    PyProduct& operator=(const PyProduct&) = delete;

    int32_t id() const { return id_; }
    size_t nbytes() const { return entry_.product->nbytes(); }
    size_t num_inputs() const { return entry_.product->num_inputs(); }
    size_t num_outputs() const { return entry_.product->num_outputs(); }
    Output<float> run(const Input& x) const;

private:
    ProductRegistry::Entry entry_;
    int32_t id_;
};

}  // namespace crush
