// float16 and bf16 in software, every rounding exact. (static: see tile.hpp)
#pragma once

#include <cstdint>
#include <cstring>

namespace crush {

constexpr float HALF_MAX = 65504.f;
constexpr float HALF_TINY = 5.9604644775390625e-8f;  // 2^-24, the smallest positive one

static inline float float_of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

// The nearest one, half to even.
static inline uint16_t bf16_of_float(float x) {
    const uint32_t bits = bits_of_float(x);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static inline float float_of_half(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return float_of_bits(sign | ((magnitude << 13) + (112u << 23)));
    return float_of_bits(sign | bits_of_float(static_cast<float>(magnitude) * HALF_TINY));
}

enum class Rounding { nearest, down, up };

// |x| <= HALF_MAX
static inline uint16_t half_of_float(float x, Rounding rounding) {
    const uint32_t sign = bits_of_float(x) >> 31, magnitude = bits_of_float(x) & 0x7fffffffu;
    // A half is `kept` steps of 2^(exponent) with `rest` of `unit` below.
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    uint32_t kept, rest, unit;
    if (exponent >= -14) {
        kept = (magnitude - (112u << 23)) >> 13;
        rest = magnitude & 0x1fffu;
        unit = 0x2000u;
    } else if (exponent >= -26) {
        const int shift = -1 - exponent;  // 14..25: of the 24-bit significand down to steps of 2^-24
        const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
        kept = significand >> shift;
        unit = 1u << shift;
        rest = significand & (unit - 1);
    } else {
        kept = 0;
        rest = magnitude ? 1 : 0;
        unit = 4;
    }
    bool away;
    if (rounding == Rounding::nearest) {
        away = rest * 2 > unit || (rest * 2 == unit && (kept & 1));
    } else {
        away = rest != 0 && (rounding == Rounding::down) == (sign == 1);
    }
    return static_cast<uint16_t>(sign << 15 | (kept + away));
}

}  // namespace crush
