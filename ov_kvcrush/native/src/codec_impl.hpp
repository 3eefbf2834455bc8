// Encoding and decoding of tiles, once for all instruction sets: I is a Simd* struct. (No standard library: see attend_impl.hpp)
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "half.hpp"
#include "kernels.hpp"

namespace crush {
namespace {

// 16 bytes c0..c15, each below 16, as a run of u4: even codes in dword 0, odd ones in dword 1 (SWAR).
static inline uint32_t squeeze_nibbles(uint64_t x) {  // of bytes 0, 2, 4, 6
    x &= 0x000f000f000f000full;
    x = (x | x >> 12) & 0x000000ff000000ffull;
    return static_cast<uint32_t>((x | x >> 24) & 0xffff);
}
static inline void pack_u4(const uint8_t* bytes, uint8_t* to) {
    uint64_t x[2];
    std::memcpy(x, bytes, sizeof(x));
    const uint32_t dwords[2] = {squeeze_nibbles(x[0]) | squeeze_nibbles(x[1]) << 16,
                                squeeze_nibbles(x[0] >> 8) | squeeze_nibbles(x[1] >> 8) << 16};
    std::memcpy(to, dwords, sizeof(dwords));
}

// 16 bytes, each below 4, as a run of u2: code j at bits 2j.
static inline uint32_t squeeze_pairs(uint64_t x) { return squeeze_nibbles(x | x >> 6); }
static inline void pack_u2(const uint8_t* bytes, uint8_t* to) {
    uint64_t x[2];
    std::memcpy(x, bytes, sizeof(x));
    const uint32_t dword = squeeze_pairs(x[0]) | squeeze_pairs(x[1]) << 16;
    std::memcpy(to, &dword, sizeof(dword));
}

// to[j][i] = from[i][j], 16 x 16 bytes; rows of `from` follow one another, rows of `to` are `stride` apart
static inline void transpose_16x16(const uint8_t* from, uint8_t* to, int stride) {
#if defined(__SSE2__)
    __m128i x[16], y[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i));
    for (int round = 0; round < 4; ++round) {
        for (int i = 0; i < 8; ++i) {
            y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
            y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
        }
        for (int i = 0; i < 16; ++i) x[i] = y[i];
    }
    for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + stride * i), x[i]);
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) to[stride * j + i] = from[16 * i + j];
#endif
}

template <class I>
struct CodecImpl {
    using V = typename I::V;

    static int levels(Codec c) { return (1 << code_bits(c)) - 1; }
    static int run_bytes(Codec c) { return 2 * code_bits(c); }

    static V clamped(V x) { return I::min(I::max(x, I::set1(-HALF_MAX)), I::set1(HALF_MAX)); }  // NaN: -HALF_MAX

    static void store_floats(Codec codec, uint8_t* to, V x) {
        uint16_t* half = reinterpret_cast<uint16_t*>(to);
        if (codec == Codec::f32) I::store(reinterpret_cast<float*>(to), x);
        if (codec == Codec::bf16) I::store_bf16(half, x);
        if (codec == Codec::f16) I::template store_f16<Rounding::nearest>(half, clamped(x));
    }
    static V load_codes(Codec codec, const uint8_t* p) {
        switch (codec) {
            case Codec::f32: return I::load(reinterpret_cast<const float*>(p));
            case Codec::bf16: return I::load_bf16(reinterpret_cast<const uint16_t*>(p));
            case Codec::f16: return I::load_f16(reinterpret_cast<const uint16_t*>(p));
            case Codec::u8: return I::load_u8(p);
            case Codec::u4: return I::load_u4(p);
            case Codec::u2: return I::load_u2(p);
        }
        return I::set1(0);
    }
    static void store_run(Codec codec, const uint8_t* bytes, uint8_t* to) {
        if (codec == Codec::u8) std::memcpy(to, bytes, 16);
        if (codec == Codec::u4) pack_u4(bytes, to);
        if (codec == Codec::u2) pack_u2(bytes, to);
    }

    // From the bounds of what a scale is for: stores min (rounded down) and scale (rounded up) as f16 and gives them as floats.
    static void make_scale(Codec codec, V low, V high, uint8_t* min_to, uint8_t* scale_to, V& min, V& scale) {
        uint16_t* min16 = reinterpret_cast<uint16_t*>(min_to);
        uint16_t* scale16 = reinterpret_cast<uint16_t*>(scale_to);
        I::template store_f16<Rounding::down>(min16, low);
        min = I::load_f16(min16);
        const V step = I::div(I::sub(high, min), I::set1(static_cast<float>(levels(codec))));
        I::template store_f16<Rounding::up>(scale16, I::max(step, I::set1(HALF_TINY)));
        scale = I::load_f16(scale16);
    }

    static void store_code_bytes(Codec codec, V x, V min, V scale, uint8_t* bytes) {
        const V top = I::set1(static_cast<float>(levels(codec)));
        const V code = I::div(I::sub(clamped(x), min), scale);
        I::store_bytes(bytes, I::min(I::max(code, I::set1(0)), top));
    }

    static void encode_keys(uint8_t* tile, const TileLayout& l, const float* k, size_t stride, int count) {
        const int run = run_bytes(l.key);
        for (int c = 0; c < l.head_size; c += 16) {
            uint8_t* to = tile + l.key_codes + 2 * c * run;
            if (!is_quantised(l.key)) {
                alignas(ALIGNMENT) float x[16][TILE] = {};
                for (int t = 0; t < count; ++t)
                    for (int j = 0; j < 16; ++j) x[j][t] = k[t * stride + c + j];
                for (int j = 0; j < 16; ++j)
                    for (int u = 0; u < 2; ++u) store_floats(l.key, to + (2 * j + u) * run, I::load(x[j] + 16 * u));
                continue;
            }
            V low = I::set1(count ? HALF_MAX : 0.f), high = I::set1(count ? -HALF_MAX : 0.f);
            for (int t = 0; t < count; ++t) {
                const V x = clamped(I::load(k + t * stride + c));
                low = I::min(low, x);
                high = I::max(high, x);
            }
            V min, scale;
            make_scale(l.key, low, high, tile + l.key_min + 2 * c, tile + l.key_scale + 2 * c, min, scale);
            alignas(ALIGNMENT) uint8_t by_token[TILE * 16] = {}, by_channel[16 * TILE];
            for (int t = 0; t < count; ++t)
                store_code_bytes(l.key, I::load(k + t * stride + c), min, scale, by_token + 16 * t);
            transpose_16x16(by_token, by_channel, TILE);
            transpose_16x16(by_token + 256, by_channel + 16, TILE);
            for (int i = 0; i < 32; ++i) store_run(l.key, by_channel + 16 * i, to + i * run);
        }
    }

    static void encode_values(uint8_t* tile, const TileLayout& l, const float* v, size_t stride, int count) {
        const int run = run_bytes(l.value), row_bytes = l.head_size / 16 * run;
        uint8_t* codes = tile + l.value_codes;
        std::memset(codes + count * row_bytes, 0, static_cast<size_t>((TILE - count) * row_bytes));
        if (!is_quantised(l.value)) {
            for (int t = 0; t < count; ++t)
                for (int c = 0; c < l.head_size; c += 16)
                    store_floats(l.value, codes + t * row_bytes + c / 16 * run, I::load(v + t * stride + c));
            return;
        }
        for (int c = 0; c < l.head_size; c += l.group_size) {
            alignas(ALIGNMENT) float low[TILE] = {}, high[TILE] = {}, min[TILE], scale[TILE];
            for (int t = 0; t < count; ++t) {
                V a = clamped(I::load(v + t * stride + c)), b = a;
                for (int j = 16; j < l.group_size; j += 16) {
                    const V x = clamped(I::load(v + t * stride + c + j));
                    a = I::min(a, x);
                    b = I::max(b, x);
                }
                low[t] = I::reduce_min(a);
                high[t] = I::reduce_max(b);
            }
            const size_t group = static_cast<size_t>(c / l.group_size) * TILE * 2;
            for (int t = 0; t < TILE; t += 16) {
                V lo, step;
                make_scale(l.value, I::load(low + t), I::load(high + t), tile + l.value_min + group + 2 * t,
                           tile + l.value_scale + group + 2 * t, lo, step);
                I::store(min + t, lo);
                I::store(scale + t, step);
            }
            for (int t = 0; t < count; ++t)
                for (int j = c; j < c + l.group_size; j += 16) {
                    uint8_t bytes[16];
                    store_code_bytes(l.value, I::load(v + t * stride + j), I::set1(min[t]), I::set1(scale[t]), bytes);
                    store_run(l.value, bytes, codes + t * row_bytes + j / 16 * run);
                }
        }
    }

    static void encode(uint8_t* tile, const float* k, size_t k_stride, const float* v, size_t v_stride, int count) {
        const TileLayout& l = layout(tile);
        encode_keys(tile, l, k, k_stride, count);
        encode_values(tile, l, v, v_stride, count);
    }

    static void decode(const uint8_t* tile, float* k, float* v) {
        const TileLayout& l = layout(tile);
        alignas(ALIGNMENT) float x[16], scale[16], min[16];
        for (int c = 0; c < l.head_size; ++c) {
            if (is_quantised(l.key) && c % 16 == 0) {
                I::store(scale, I::load_f16(reinterpret_cast<const uint16_t*>(tile + l.key_scale) + c));
                I::store(min, I::load_f16(reinterpret_cast<const uint16_t*>(tile + l.key_min) + c));
            }
            for (int u = 0; u < 2; ++u) {
                V code = load_codes(l.key, tile + l.key_codes + (2 * c + u) * run_bytes(l.key));
                if (is_quantised(l.key)) code = I::fma(code, I::set1(scale[c % 16]), I::set1(min[c % 16]));
                I::store(x, code);
                for (int t = 0; t < 16; ++t) k[(16 * u + t) * l.head_size + c] = x[t];
            }
        }
        const uint16_t* value_scale = reinterpret_cast<const uint16_t*>(tile + l.value_scale);
        const uint16_t* value_min = reinterpret_cast<const uint16_t*>(tile + l.value_min);
        for (int t = 0; t < TILE; ++t)
            for (int c = 0; c < l.head_size; c += 16) {
                V code = load_codes(l.value, tile + l.value_codes + (t * l.head_size + c) / 16 * run_bytes(l.value));
                if (is_quantised(l.value)) {
                    const int i = c / l.group_size * TILE + t;
                    code = I::fma(code, I::set1(float_of_half(value_scale[i])), I::set1(float_of_half(value_min[i])));
                }
                I::store(v + t * l.head_size + c, code);
            }
    }

    static void put(uint8_t* tile, int slot, const float* k, const float* v) {
        const TileLayout& l = layout(tile);
        const int item = code_bits(l.key) / 8;
        alignas(ALIGNMENT) uint8_t codes[64];
        for (int c = 0; c < l.head_size; c += 16) {
            store_floats(l.key, codes, I::load(k + c));
            uint8_t* to = tile + l.key_codes + (c * TILE + slot) * item;
            for (int j = 0; j < 16; ++j) std::memcpy(to + j * TILE * item, codes + j * item, static_cast<size_t>(item));
            store_floats(l.value, tile + l.value_codes + (slot * l.head_size + c) / 16 * run_bytes(l.value),
                         I::load(v + c));
        }
    }
};

}  // namespace
}  // namespace crush
