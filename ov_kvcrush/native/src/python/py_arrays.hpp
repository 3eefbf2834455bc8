// Arrays from and for Python: inputs are checked, outputs own their memory.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace crush {

using Input = nanobind::ndarray<nanobind::ro>;  // of any type and shape: `data_of` checks it
using Writable = nanobind::ndarray<>;           // the same, but nanobind refuses read-only ones
template <class Number>
using Output = nanobind::ndarray<nanobind::numpy, Number>;

constexpr int64_t ANY = -1;

namespace detail {

template <class Number>
constexpr const char* name_of() {
    if constexpr (std::is_same_v<Number, float>) return "float32";
    if constexpr (std::is_same_v<Number, uint8_t>) return "uint8";
    if constexpr (std::is_same_v<Number, uint16_t>) return "uint16";
    if constexpr (std::is_same_v<Number, int32_t>) return "int32";
    return "int64";
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) {
        text += (i ? ", " : "") + (shape[i] == ANY ? std::string("any") : std::to_string(shape[i]));
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

template <class Array>
std::vector<int64_t> shape_of(const Array& array) {
    std::vector<int64_t> shape;
    for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<int64_t>(array.shape(i)));
    return shape;
}

template <class Array>
bool is_contiguous(const Array& array) {
    for (size_t i = 0; i < array.ndim(); ++i) {
        if (array.shape(i) == 0) return true;  // numpy's strides of an empty array mean nothing
    }
    int64_t stride = 1;
    for (size_t i = array.ndim(); i-- > 0;) {
        if (array.shape(i) != 1 && array.stride(i) != stride) return false;
        stride *= static_cast<int64_t>(array.shape(i));
    }
    return true;
}

template <class Number, class Array>
void check(const Array& array, const char* field, const std::vector<int64_t>& shape) {
    const std::string name = field;
    if (array.device_type() != nanobind::device::cpu::value || array.dtype() != nanobind::dtype<Number>()) {
        throw std::invalid_argument(name + " must be an array of " + detail::name_of<Number>() +
                                    ", got another type; use .astype(numpy." + detail::name_of<Number>() + ")");
    }
    const std::vector<int64_t> got = detail::shape_of(array);
    bool fits = got.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == ANY || shape[i] == got[i];
    if (!fits) {
        throw std::invalid_argument(name + " must have shape " + detail::shape_text(shape) + ", got " +
                                    detail::shape_text(got));
    }
    if (!detail::is_contiguous(array)) {
        throw std::invalid_argument(name + " must be contiguous, got strides; use numpy.ascontiguousarray");
    }
    if (reinterpret_cast<uintptr_t>(array.data()) % alignof(Number) != 0) {
        throw std::invalid_argument(name + " must be aligned, got an odd address; use numpy.array to copy it");
    }
}

}  // namespace detail

// The numbers of an array of this type and shape (ANY = whatever). Throws std::invalid_argument naming `field`.
template <class Number>
const Number* data_of(const Input& array, const char* field, const std::vector<int64_t>& shape) {
    detail::check<Number>(array, field, shape);
    static const Number none{};  // empty arrays may come without an address
    return array.data() ? static_cast<const Number*>(array.data()) : &none;
}
template <class Number>
Number* data_of(const Writable& array, const char* field, const std::vector<int64_t>& shape) {
    detail::check<Number>(array, field, shape);
    return static_cast<Number*>(array.data());
}

// A numpy array that owns the vector's numbers.
template <class Number>
Output<Number> to_numpy(std::vector<Number>&& numbers, std::initializer_list<size_t> shape) {
    auto* owned = new std::vector<Number>(std::move(numbers));
    const nanobind::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<Number>*>(p); });
    return Output<Number>(owned->data(), shape, owner);
}

}  // namespace crush
