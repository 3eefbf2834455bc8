// What both operations need to evaluate: their int32 inputs, and errors that OpenVINO passes on.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <openvino/core/except.hpp>
#include <openvino/runtime/tensor.hpp>
#include <string>

#include "store/require.hpp"
#include "store/store.hpp"

namespace crush {

inline const int32_t* int32_input(const ov::TensorVector& inputs, size_t i) {
    OPENVINO_ASSERT(inputs[i].get_element_type() == ov::element::i32, "input ", i, " must be int32, got ",
                    inputs[i].get_element_type());
    return inputs[i].data<const int32_t>();
}

inline std::shared_ptr<Store> find_store(const ov::TensorVector& inputs, size_t i) {
    require(inputs[i].get_size() == 1, "crush_store must be one id", inputs[i].get_size());
    return StoreRegistry::find(int32_input(inputs, i)[0]);
}

// Runs `body`; an exception becomes an error of OpenVINO that says where it was thrown.
template <class Body>
bool with_context(const std::string& where, const Body& body) {
    try {
        body();
    } catch (const ov::Exception&) {
        throw;
    } catch (const std::exception& error) {
        OPENVINO_THROW(where, ": ", error.what());
    }
    return true;
}

}  // namespace crush
