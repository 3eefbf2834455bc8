// Encoding and decoding of tiles, once for all instruction sets: I is a Simd* struct. (No standard library: see
// attend_impl.hpp)
#pragma once

#include "kernels/hadamard.hpp"
#include "kernels/half.hpp"
#include "kernels/kernels.hpp"

namespace crush {
namespace {

template <class I>
struct CodecImpl {
    using V = typename I::V;
    static constexpr int MAX_HEAD = 256;

    static int levels(Codec c) { return (1 << code_bits(c)) - 1; }
    static V clamped(V x) { return I::min(I::max(x, I::set1(-HALF_MAX)), I::set1(HALF_MAX)); }  // NaN: -HALF_MAX

    static void store_floats(Codec codec, uint8_t* to, V x) {
        uint16_t* half = reinterpret_cast<uint16_t*>(to);
        if (codec == Codec::f32) I::store(reinterpret_cast<float*>(to), x);
        if (codec == Codec::bf16) I::store_bf16(half, x);
        if (codec == Codec::f16) I::template store_f16<Rounding::nearest>(half, clamped(x));
    }
    static V load_floats(Codec codec, const uint8_t* p) {
        if (codec == Codec::bf16) return I::load_bf16(reinterpret_cast<const uint16_t*>(p));
        if (codec == Codec::f16) return I::load_f16(reinterpret_cast<const uint16_t*>(p));
        return I::load(reinterpret_cast<const float*>(p));
    }
    static V code(Codec codec, const typename I::Dwords& d, int i) {
        const int shift = code_shift(codec, i);
        if (codec == Codec::u8) return I::template code<8>(d, shift);
        if (codec == Codec::u4) return I::template code<4>(d, shift);
        return I::template code<2>(d, shift);
    }

    // From the bounds of what a scale is for: stores min (rounded down) and scale (rounded up) as f16 and gives them as
    // floats.
    static void make_scale(Codec codec, V low, V high, uint8_t* min_to, uint8_t* scale_to, V& min, V& scale) {
        uint16_t* min16 = reinterpret_cast<uint16_t*>(min_to);
        uint16_t* scale16 = reinterpret_cast<uint16_t*>(scale_to);
        I::template store_f16<Rounding::down>(min16, low);
        min = I::load_f16(min16);
        const V step = I::div(I::sub(high, min), I::set1(static_cast<float>(levels(codec))));
        I::template store_f16<Rounding::up>(scale16, I::max(step, I::set1(HALF_TINY)));
        scale = I::load_f16(scale16);
    }

    // Two bits a code. Four levels over the whole range are up to a sixth of it away; four in the middles of its
    // quarters up to an eighth, with a third less squared error where numbers are spread, but they miss numbers that
    // lie close to the bounds, such as those beside an outlier. Bounds are narrowed to the middles where that leaves
    // less squared error. Both errors are measured from the same numbers, so their difference is linear between the
    // points where a nearest level changes: with u the distance from the centre, in ranges, 12 times it is
    //     35/48 - 2 u + 3 |u - 1/4| - 4 |u - 1/3|.
    // Here u is rounded to 2^-13: sums are exact, and the choice depends neither on their order nor on fused products.
    // (Numbers beyond f16 are far outside: with one of them, or NaN, the bounds stay.)
    static constexpr float THIRD = 2731.f / 8192, CONSTANT = 7.f / 48 - 3.f / 4 + 4 * THIRD;
    static V gain(V x, V centre, V inverse, V sum) {
        const V exact = I::abs(I::mul(I::sub(x, centre), inverse));
        const V u = I::sub(I::add(exact, I::set1(1536.f)), I::set1(1536.f));
        sum = I::fma(u, I::set1(-2), sum);
        sum = I::fma(I::abs(I::sub(u, I::set1(0.25f))), I::set1(3), sum);
        return I::fma(I::abs(I::sub(u, I::set1(THIRD))), I::set1(-4), sum);
    }
    static V centre(V low, V high) { return I::mul(I::add(low, high), I::set1(0.5f)); }
    static V inverse_range(V low, V high) {
        return I::div(I::set1(1), I::max(I::sub(high, low), I::set1(HALF_TINY)));
    }
    // The bounds of 16 scales, each of `count` numbers with these sums.
    static void narrow(V sums, int count, float* low, float* high) {
        alignas(ALIGNMENT) float sum[16];
        I::store(sum, sums);
        const float least = static_cast<float>(count) * -CONSTANT;
        for (int i = 0; i < 16; ++i) {
            const float eighth = sum[i] > least ? (high[i] - low[i]) / 8 : 0.f;
            low[i] += eighth;
            high[i] -= eighth;
        }
    }
    // Of `count` rows, with a scale for each of 16 columns.
    static void narrow_columns(const float* x, size_t stride, int count, V& low, V& high) {
        const V middle = centre(low, high), inverse = inverse_range(low, high);
        V sums = I::set1(0);
        for (int t = 0; t < count; ++t) sums = gain(I::load(x + t * stride), middle, inverse, sums);
        alignas(ALIGNMENT) float bounds[2][16];
        I::store(bounds[0], low);
        I::store(bounds[1], high);
        narrow(sums, count, bounds[0], bounds[1]);
        low = I::load(bounds[0]);
        high = I::load(bounds[1]);
    }
    // Of `count` rows, 32 at most, of `size` columns, with a scale for each row.
    static void narrow_rows(const float* x, size_t stride, int count, int size, float* low, float* high) {
        alignas(ALIGNMENT) float middle[TILE], inverse[TILE], sums[TILE] = {};
        for (int t = 0; t < TILE; t += 16) {
            I::store(middle + t, centre(I::load(low + t), I::load(high + t)));
            I::store(inverse + t, inverse_range(I::load(low + t), I::load(high + t)));
        }
        for (int t = 0; t < count; ++t) {
            V sum = I::set1(0);
            for (int j = 0; j < size; j += 16)
                sum = gain(I::load(x + t * stride + j), I::set1(middle[t]), I::set1(inverse[t]), sum);
            sums[t] = I::reduce_add(sum);
        }
        for (int t = 0; t < TILE; t += 16) narrow(I::load(sums + t), size, low + t, high + t);
    }

    static typename I::Dwords encoded(Codec codec, V x, V min, V scale) {
        const V top = I::set1(static_cast<float>(levels(codec)));
        return I::to_dwords(I::min(I::max(I::div(I::sub(clamped(x), min), scale), I::set1(0)), top));
    }

    static void encode_keys(uint8_t* tile, const TileLayout& l, const float* k, size_t stride, int count) {
        for (int c = 0; c < l.head_size; c += 16) {
            uint8_t* to = tile + l.key_codes + c * TILE * code_bits(l.key) / 8;
            if (is_quantised(l.key))
                quantise_keys(tile, to, l, k + c, stride, count, c);
            else
                store_keys(to, l.key, k + c, stride, count);
        }
    }

    static void store_keys(uint8_t* to, Codec codec, const float* k, size_t stride, int count) {
        alignas(ALIGNMENT) float x[16][TILE] = {};
        for (int t = 0; t < count; ++t)
            for (int j = 0; j < 16; ++j) x[j][t] = k[t * stride + j];
        for (int i = 0; i < 16 * TILE; i += 16) store_floats(codec, to + i * code_bits(codec) / 8, I::load(x[0] + i));
    }

    static void quantise_keys(uint8_t* tile, uint8_t* to, const TileLayout& l, const float* k, size_t stride, int count,
                              int c) {
        V low = I::set1(count ? HALF_MAX : 0.f), high = I::set1(count ? -HALF_MAX : 0.f);
        for (int t = 0; t < count; ++t) {
            const V x = clamped(I::load(k + t * stride));
            low = I::min(low, x);
            high = I::max(high, x);
        }
        if (l.key == Codec::u2) narrow_columns(k, stride, count, low, high);
        V min, scale;
        make_scale(l.key, low, high, tile + l.key_min + 2 * c, tile + l.key_scale + 2 * c, min, scale);
        uint32_t dwords[4][TILE] = {};  // 16 / n of them
        const int per_dword = codes_per_dword(l.key) / 4, bits = code_bits(l.key);
        for (int t = 0; t < count; ++t) {
            uint32_t quads[4];  // bytes: four channels
            I::store_bytes(reinterpret_cast<uint8_t*>(quads), encoded(l.key, I::load(k + t * stride), min, scale));
            for (int i = 0; i < 4; ++i) dwords[i / per_dword][t] |= quads[i] << (i % per_dword * bits);
        }
        std::memcpy(to, dwords, static_cast<size_t>(16 * TILE * bits / 8));
    }

    static void encode_values(uint8_t* tile, const TileLayout& l, const float* v, size_t stride, int count) {
        uint8_t* codes = tile + l.value_codes;
        if (l.rotation) {
            alignas(ALIGNMENT) float rows[TILE * MAX_HEAD];
            for (int t = 0; t < count; ++t)
                for (int c = 0; c < l.head_size; c += 16)
                    I::store(rows + t * l.head_size + c, clamped(I::load(v + t * stride + c)));
            Hadamard<I>::rotate(rows, count, l.head_size, l.rotation);
            const auto width = static_cast<size_t>(l.head_size);
            for (int c = 0; c < l.head_size; c += l.group_size) quantise_values(tile, l, rows + c, width, count, c);
            return;
        }
        if (is_quantised(l.value)) {
            for (int c = 0; c < l.head_size; c += l.group_size) quantise_values(tile, l, v + c, stride, count, c);
            return;
        }
        const int row_bytes = l.head_size * code_bits(l.value) / 8;
        std::memset(codes + count * row_bytes, 0, static_cast<size_t>((TILE - count) * row_bytes));
        for (int t = 0; t < count; ++t)
            for (int c = 0; c < l.head_size; c += 16)
                store_floats(l.value, codes + t * row_bytes + c * code_bits(l.value) / 8, I::load(v + t * stride + c));
    }

    // The group of channels from c on.
    static void quantise_values(uint8_t* tile, const TileLayout& l, const float* v, size_t stride, int count, int c) {
        alignas(ALIGNMENT) float low[TILE] = {}, high[TILE] = {}, min[TILE], scale[TILE];
        for (int t = 0; t < count; ++t) {
            V a = clamped(I::load(v + t * stride)), b = a;
            for (int j = 16; j < l.group_size; j += 16) {
                const V x = clamped(I::load(v + t * stride + j));
                a = I::min(a, x);
                b = I::max(b, x);
            }
            low[t] = I::reduce_min(a);
            high[t] = I::reduce_max(b);
        }
        if (l.value == Codec::u2) narrow_rows(v, stride, count, l.group_size, low, high);
        const size_t group = static_cast<size_t>(c / l.group_size) * TILE * 2;
        for (int t = 0; t < TILE; t += 16) {
            V lo, step;
            make_scale(l.value, I::load(low + t), I::load(high + t), tile + l.value_min + group + 2 * t,
                       tile + l.value_scale + group + 2 * t, lo, step);
            I::store(min + t, lo);
            I::store(scale + t, step);
        }
        const int per_dword = codes_per_dword(l.value);
        for (int first = 0; first < TILE; first += per_dword)
            for (int j = 0; j < l.group_size; j += 16) {
                typename I::Dwords d = I::to_dwords(I::set1(0));
                for (int t = first; t < first + per_dword && t < count; ++t)
                    d = I::merge(d, encoded(l.value, I::load(v + t * stride + j), I::set1(min[t]), I::set1(scale[t])),
                                 code_shift(l.value, t - first));
                I::store_dwords(tile + l.value_codes + (first / per_dword * l.head_size + c + j) * 4, d);
            }
    }

    static void encode(uint8_t* tile, const float* k, size_t k_stride, const float* v, size_t v_stride, int count) {
        const TileLayout& l = layout(tile);
        encode_keys(tile, l, k, k_stride, count);
        encode_values(tile, l, v, v_stride, count);
    }

    static void decode(const uint8_t* tile, float* k, float* v) {
        const TileLayout& l = layout(tile);
        for (int c = 0; c < l.head_size; ++c)
            for (int t = 0; t < TILE; t += 16) {
                alignas(ALIGNMENT) float x[16];
                I::store(x, key(tile, l, c, t));
                for (int i = 0; i < 16; ++i) k[(t + i) * l.head_size + c] = x[i];
            }
        for (int t = 0; t < TILE; ++t)
            for (int c = 0; c < l.head_size; c += 16) I::store(v + t * l.head_size + c, value(tile, l, t, c));
        if (l.rotation) Hadamard<I>::rotate(v, TILE, l.head_size, l.rotation);
    }

    static float half_at(const uint8_t* p, int i) { return float_of_half(reinterpret_cast<const uint16_t*>(p)[i]); }

    // 16 tokens of a channel
    static V key(const uint8_t* tile, const TileLayout& l, int c, int t) {
        const uint8_t* codes = tile + l.key_codes;
        if (!is_quantised(l.key)) return load_floats(l.key, codes + (c * TILE + t) * code_bits(l.key) / 8);
        const int n = codes_per_dword(l.key);
        const V x = code(l.key, I::load_dwords(codes + (c / n * TILE + t) * 4), c % n);
        return I::fma(x, I::set1(half_at(tile + l.key_scale, c)), I::set1(half_at(tile + l.key_min, c)));
    }
    // 16 channels of a token
    static V value(const uint8_t* tile, const TileLayout& l, int t, int c) {
        const uint8_t* codes = tile + l.value_codes;
        if (!is_quantised(l.value)) return load_floats(l.value, codes + (t * l.head_size + c) * code_bits(l.value) / 8);
        const int n = codes_per_dword(l.value), at = c / l.group_size * TILE + t;
        const V x = code(l.value, I::load_dwords(codes + (t / n * l.head_size + c) * 4), t % n);
        return I::fma(x, I::set1(half_at(tile + l.value_scale, at)), I::set1(half_at(tile + l.value_min, at)));
    }

    // Row c of the keys and row `slot` of the values are matrices of floats here.
    static void append_token(uint8_t* tile, int slot, const float* k, const float* v) {
        const TileLayout& l = layout(tile);
        const int item = code_bits(l.key) / 8, value_item = code_bits(l.value) / 8;
        alignas(ALIGNMENT) uint8_t codes[64];
        for (int c = 0; c < l.head_size; c += 16) {
            store_floats(l.key, codes, I::load(k + c));
            uint8_t* to = tile + l.key_codes + (c * TILE + slot) * item;
            for (int j = 0; j < 16; ++j) std::memcpy(to + j * TILE * item, codes + j * item, static_cast<size_t>(item));
            store_floats(l.value, tile + l.value_codes + (slot * l.head_size + c) * value_item, I::load(v + c));
        }
    }
};

}  // namespace
}  // namespace crush
