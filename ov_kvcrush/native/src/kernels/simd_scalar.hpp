// 16 floats as plain C++: what the other instruction sets are checked against, and what runs where there is none of
// them.
#pragma once

#include "kernels/half.hpp"

namespace crush {
namespace {

struct SimdScalar {
    static constexpr const char* NAME = "scalar";
    static constexpr int BLOCK_ROWS = 1;  // rows that share registers
    static constexpr int BLOCK_UNITS = 1;

    struct V {
        float x[16];
    };

    template <class F>
    static V lanes(F f) {
        V v;
        for (int i = 0; i < 16; ++i) v.x[i] = f(i);
        return v;
    }

    static V set1(float a) {
        return lanes([&](int) { return a; });
    }
    static V load(const float* p) {
        return lanes([&](int i) { return p[i]; });
    }
    static void store(float* p, const V& a) { std::memcpy(p, a.x, sizeof(a.x)); }
    static V add(const V& a, const V& b) {
        return lanes([&](int i) { return a.x[i] + b.x[i]; });
    }
    static V sub(const V& a, const V& b) {
        return lanes([&](int i) { return a.x[i] - b.x[i]; });
    }
    static V mul(const V& a, const V& b) {
        return lanes([&](int i) { return a.x[i] * b.x[i]; });
    }
    static V div(const V& a, const V& b) {
        return lanes([&](int i) { return a.x[i] / b.x[i]; });
    }
    static V fma(const V& a, const V& b, const V& c) {
        return lanes([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
    }
    // b where a is NaN
    static V max(const V& a, const V& b) {
        return lanes([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
    }
    static V min(const V& a, const V& b) {
        return lanes([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
    }
    static V abs(const V& a) {
        return lanes([&](int i) {
            uint32_t bits;
            std::memcpy(&bits, a.x + i, sizeof(bits));
            return float_of_bits(bits & 0x7fffffffu);
        });
    }
    // Lane i is lane i ^ H.
    template <int H>
    static V swap_lanes(const V& a) {
        return lanes([&](int i) { return a.x[i ^ H]; });
    }
    static float reduce_add(const V& a) {
        float s = 0;
        for (float x : a.x) s += x;
        return s;
    }
    static float reduce_max(const V& a) {
        float m = a.x[0];
        for (float x : a.x) m = x > m ? x : m;
        return m;
    }
    static float reduce_min(const V& a) {
        float m = a.x[0];
        for (float x : a.x) m = x < m ? x : m;
        return m;
    }
    // 2^t for t <= 100, 0 below -126
    static V exp2(const V& t, const float* poly) {
        return lanes([&](int i) {
            if (!(t.x[i] > -126.f)) return 0.f;
            int whole = static_cast<int>(t.x[i]);
            whole -= static_cast<float>(whole) > t.x[i];
            const float f = t.x[i] - static_cast<float>(whole);
            float p = poly[5];
            for (int k = 4; k >= 0; --k) p = p * f + poly[k];
            return p * float_of_bits(static_cast<uint32_t>(whole + 127) << 23);
        });
    }

    static V load_bf16(const uint16_t* p) {
        return lanes([&](int i) { return float_of_bits(static_cast<uint32_t>(p[i]) << 16); });
    }
    static V load_f16(const uint16_t* p) {
        return lanes([&](int i) { return float_of_half(p[i]); });
    }
    struct Dwords {
        uint32_t x[16];
    };
    static Dwords load_dwords(const uint8_t* p) {
        Dwords d;
        std::memcpy(d.x, p, sizeof(d.x));
        return d;
    }
    static void store_dwords(uint8_t* p, const Dwords& d) { std::memcpy(p, d.x, sizeof(d.x)); }
    static Dwords merge(Dwords a, const Dwords& b, int shift) {
        for (int i = 0; i < 16; ++i) a.x[i] |= b.x[i] << shift;
        return a;
    }
    // The code of BITS bits at SHIFT of each dword.
    template <int BITS>
    static V code(const Dwords& d, int shift) {
        return lanes([&](int i) { return static_cast<float>(d.x[i] >> shift & ((1u << BITS) - 1)); });
    }

    template <Rounding ROUNDING>
    static void store_f16(uint16_t* p, const V& a) {
        for (int i = 0; i < 16; ++i) p[i] = half_of_float(a.x[i], ROUNDING);
    }
    static void store_bf16(uint16_t* p, const V& a) {
        for (int i = 0; i < 16; ++i) p[i] = bf16_of_float(a.x[i]);
    }
    // The nearest integers (half to even) of 0 <= a <= 255
    static Dwords to_dwords(const V& a) {
        constexpr float magic = 12582912.f;  // 1.5 * 2^23
        Dwords d;
        for (int i = 0; i < 16; ++i) d.x[i] = static_cast<uint32_t>((a.x[i] + magic) - magic);
        return d;
    }
    static void store_bytes(uint8_t* p, const Dwords& d) {
        for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(d.x[i]);
    }

    // a where low < position <= high, else -inf
    static V keep_between(const V& a, const int32_t* position, int32_t low, int32_t high) {
        return lanes([&](int i) { return position[i] > low && position[i] <= high ? a.x[i] : -__builtin_inff(); });
    }
    static void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }
};

}  // namespace
}  // namespace crush
