// Checks of what callers give: "<field> must be <rule>, got <value>".
#pragma once

#include <stdexcept>
#include <string>

namespace crush {

template <class Value>
void require(bool holds, const char* rule, Value got) {
    if (!holds) throw std::invalid_argument(std::string(rule) + ", got " + std::to_string(got));
}

template <class Value>
void require(bool holds, const std::string& rule, Value got) {
    if (!holds) throw std::invalid_argument(rule + ", got " + std::to_string(got));
}

}  // namespace crush
