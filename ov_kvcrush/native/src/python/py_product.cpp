#include "python/py_product.hpp"

#include "op/threads.hpp"
#include "python/arguments.hpp"

namespace crush {
namespace {

CompressedWeights weights_of(const PyProduct::Weights& arrays) {
    const auto& [bits, codes, scales, zeros] = arrays;
    require(bits == 8 || bits == 4, "bits must be 8 or 4", bits);
    CompressedWeights w{};
    w.bits = static_cast<int>(bits);
    w.codes = data_of<uint8_t>(codes, "codes", {ANY, ANY});
    w.num_outputs = codes.shape(0);
    w.num_inputs = codes.shape(1) * 8 / static_cast<size_t>(bits);
    const auto rows = static_cast<int64_t>(w.num_outputs);
    w.scales = data_of<uint16_t>(scales, "scales", {rows, ANY});
    const size_t groups = scales.shape(1);
    w.zeros = data_of<uint16_t>(zeros, "zeros", {rows, static_cast<int64_t>(groups)});
    require(groups > 0 && w.num_inputs % groups == 0, "scales must be one for each group of inputs", groups);
    w.group = w.num_inputs / groups;
    return w;
}

Activation activation_of(const std::string& name) {
    if (name == "silu") return Activation::silu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    throw std::invalid_argument("activation must be silu or gelu_tanh, got " + name);
}

ProductRegistry::Entry entry_of(const std::vector<PyProduct::Weights>& weights, const std::string& activation,
                                const std::string& isa) {
    require(weights.size() == 1 || weights.size() == 3, "weights must be 1, or 3 for an MLP", weights.size());
    std::vector<CompressedWeights> w;
    for (const PyProduct::Weights& arrays : weights) w.push_back(weights_of(arrays));
    const Activation chosen = activation_of(activation);
    const ProductKernels& kernels = product_kernels(isa);
    const nanobind::gil_scoped_release release;
    return {w.size() == 1 ? make_linear(w[0], parallel_for()) : make_mlp(w[0], w[1], w[2], chosen, parallel_for()),
            &kernels};
}

}  // namespace

PyProduct::PyProduct(const std::vector<Weights>& weights, const std::string& activation, const std::string& isa)
    : entry_(entry_of(weights, activation, isa)), id_(ProductRegistry::add(entry_)) {}

PyProduct::~PyProduct() { ProductRegistry::remove(id_); }

Output<float> PyProduct::run(const Input& x) const {
    const float* rows = data_of<float>(x, "x", {ANY, static_cast<int64_t>(num_inputs())});
    const size_t num_rows = x.shape(0);
    std::vector<float> out(num_rows * num_outputs());
    if (num_rows) {
        const nanobind::gil_scoped_release release;
        entry_.product->run(*entry_.kernels, rows, num_rows, out.data(), parallel_for());
    }
    return to_numpy(std::move(out), {num_rows, num_outputs()});
}

}  // namespace crush
