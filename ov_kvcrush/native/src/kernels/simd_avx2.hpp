// 16 floats as two AVX2 registers.
#pragma once

#include <immintrin.h>

#include "kernels/half.hpp"

namespace crush {
namespace {

struct SimdAvx2 {
    static constexpr const char* NAME = "avx2";
    static constexpr int BLOCK_ROWS = 4;  // 8 accumulators of 16 registers
    static constexpr int BLOCK_UNITS = 1;

    struct V {
        __m256 a, b;
    };

    static V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, V x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    // y where x is NaN
    static V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static V abs(V x) {
        const __m256 sign = _mm256_set1_ps(-0.f);
        return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
    }
    template <int H>
    static __m256 swap_lanes(__m256 x) {
        if constexpr (H == 4) return _mm256_permute2f128_ps(x, x, 1);
        return _mm256_permute_ps(x, H == 1 ? 0xb1 : 0x4e);
    }
    // Lane i is lane i ^ H.
    template <int H>
    static V swap_lanes(V x) {
        if constexpr (H == 8) return {x.b, x.a};
        return {swap_lanes<H>(x.a), swap_lanes<H>(x.b)};
    }
    static float reduce_add(V x) {
        const __m256 s = _mm256_add_ps(x.a, x.b);
        __m128 r = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
        r = _mm_add_ps(r, _mm_movehl_ps(r, r));
        return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
    }
    static float reduce_max(V x) {
        const __m256 s = _mm256_max_ps(x.a, x.b);
        __m128 r = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
        r = _mm_max_ps(r, _mm_movehl_ps(r, r));
        return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
    }
    static float reduce_min(V x) {
        const __m256 s = _mm256_min_ps(x.a, x.b);
        __m128 r = _mm_min_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
        r = _mm_min_ps(r, _mm_movehl_ps(r, r));
        return _mm_cvtss_f32(_mm_min_ss(r, _mm_movehdup_ps(r)));
    }
    static __m256 exp2(__m256 t, const float* poly) {
        const __m256 alive = _mm256_cmp_ps(t, _mm256_set1_ps(-126.f), _CMP_GT_OQ);
        t = _mm256_max_ps(t, _mm256_set1_ps(-126.f));
        const __m256 whole = _mm256_floor_ps(t);
        const __m256 f = _mm256_sub_ps(t, whole);
        __m256 p = _mm256_set1_ps(poly[5]);
        for (int k = 4; k >= 0; --k) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(poly[k]));
        const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
        return _mm256_and_ps(alive, _mm256_mul_ps(p, _mm256_castsi256_ps(bits)));
    }
    // 2^t for t <= 100, 0 below -126
    static V exp2(V t, const float* poly) { return {exp2(t.a, poly), exp2(t.b, poly)}; }

    static V load_bf16(const uint16_t* p) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)), 16))};
    }
    static V load_f16(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
    }
    struct Dwords {
        __m256i a, b;
    };
    static Dwords load_dwords(const uint8_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
    }
    static void store_dwords(uint8_t* p, Dwords d) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), d.a);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), d.b);
    }
    static Dwords merge(Dwords x, Dwords y, int shift) {
        return {_mm256_or_si256(x.a, _mm256_slli_epi32(y.a, shift)),
                _mm256_or_si256(x.b, _mm256_slli_epi32(y.b, shift))};
    }
    // The code of BITS bits at SHIFT of each dword.
    template <int BITS>
    static V code(Dwords d, int shift) {
        const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
        return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(d.a, shift), mask)),
                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(d.b, shift), mask))};
    }

    template <Rounding ROUNDING>
    static void store_f16(uint16_t* p, V x) {
        constexpr int mode = ROUNDING == Rounding::nearest ? _MM_FROUND_TO_NEAREST_INT
                             : ROUNDING == Rounding::down  ? _MM_FROUND_TO_NEG_INF
                                                           : _MM_FROUND_TO_POS_INF;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, mode));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, mode));
    }
    static __m256i to_bf16(__m256 x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    }
    static void store_bf16(uint16_t* p, V x) {
        const __m256i packed = _mm256_packus_epi32(to_bf16(x.a), to_bf16(x.b));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    // The nearest integers (half to even) of 0 <= a <= 255
    static Dwords to_dwords(V x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
    static void store_bytes(uint8_t* p, Dwords d) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(d.a, d.b), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }

    static __m256 keep_between(__m256 x, const int32_t* position, int32_t low, int32_t high) {
        const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(position));
        const __m256i above = _mm256_cmpgt_epi32(at, _mm256_set1_epi32(low));
        const __m256i keep = _mm256_andnot_si256(_mm256_cmpgt_epi32(at, _mm256_set1_epi32(high)), above);
        return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), x, _mm256_castsi256_ps(keep));
    }
    // x where low < position <= high, else -inf
    static V keep_between(V x, const int32_t* position, int32_t low, int32_t high) {
        return {keep_between(x.a, position, low, high), keep_between(x.b, position + 8, low, high)};
    }
    // To the L2 cache. (Not inlined early, GCC takes it for a function without effect and drops calls of it.)
    __attribute__((always_inline)) static void prefetch(const uint8_t* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
    }
};

}  // namespace
}  // namespace crush
