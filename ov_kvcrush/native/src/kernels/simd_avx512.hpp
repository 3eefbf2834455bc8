// 16 floats as one AVX-512 register.
#pragma once

// GCC's own header reads variables that it leaves uninitialised on purpose (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "kernels/half.hpp"

namespace crush {
namespace {

struct SimdAvx512 {
    static constexpr const char* NAME = "avx512";
    static constexpr int BLOCK_ROWS = 8;  // times 2 units: 16 accumulators of 32 registers
    static constexpr int BLOCK_UNITS = 2;

    using V = __m512;

    static V set1(float x) { return _mm512_set1_ps(x); }
    static V load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, V x) { _mm512_storeu_ps(p, x); }
    static V add(V x, V y) { return _mm512_add_ps(x, y); }
    static V sub(V x, V y) { return _mm512_sub_ps(x, y); }
    static V mul(V x, V y) { return _mm512_mul_ps(x, y); }
    static V div(V x, V y) { return _mm512_div_ps(x, y); }
    static V fma(V x, V y, V z) { return _mm512_fmadd_ps(x, y, z); }
    // y where x is NaN
    static V max(V x, V y) { return _mm512_max_ps(x, y); }
    static V min(V x, V y) { return _mm512_min_ps(x, y); }
    static V abs(V x) { return _mm512_abs_ps(x); }
    // Lane i is lane i ^ H.
    template <int H>
    static V swap_lanes(V x) {
        if constexpr (H >= 4) return _mm512_shuffle_f32x4(x, x, H == 4 ? 0xb1 : 0x4e);
        return _mm512_permute_ps(x, H == 1 ? 0xb1 : 0x4e);
    }
    static float reduce_add(V x) { return _mm512_reduce_add_ps(x); }
    static float reduce_max(V x) { return _mm512_reduce_max_ps(x); }
    static float reduce_min(V x) { return _mm512_reduce_min_ps(x); }
    // 2^t for t <= 100. Both instructions take the floor themselves, and give 0 and 2^-inf = 0 for -inf.
    static V exp2(V t, const float* poly) {
        const V f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        V p = set1(poly[5]);
#pragma GCC unroll 5
        for (int k = 4; k >= 0; --k) p = fma(p, f, set1(poly[k]));
        return _mm512_scalef_ps(p, t);
    }

    static V load_bf16(const uint16_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
    }
    static V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load_256(p)); }
    using Dwords = __m512i;
    static Dwords load_dwords(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store_dwords(uint8_t* p, Dwords d) { _mm512_storeu_si512(p, d); }
    static Dwords merge(Dwords x, Dwords y, int shift) {
        return _mm512_or_si512(x, _mm512_slli_epi32(y, static_cast<unsigned>(shift)));
    }
    // The code of BITS bits at SHIFT of each dword.
    template <int BITS>
    static V code(Dwords d, int shift) {
        const __m512i low = shift ? _mm512_srli_epi32(d, static_cast<unsigned>(shift)) : d;
        if constexpr (BITS == 8) {
            // At both ends one instruction isolates the byte, between them one shuffle does.
            if (shift == 0) return _mm512_cvtepi32_ps(_mm512_and_si512(d, _mm512_set1_epi32(255)));
            if (shift == 24) return _mm512_cvtepi32_ps(low);
            const int at = shift / 8;
            return _mm512_cvtepi32_ps(
                _mm512_maskz_shuffle_epi8(0x1111111111111111u, d, _mm512_set4_epi32(12 + at, 8 + at, 4 + at, at)));
        }
        // The permutation looks at the low 4 bits of a lane only: it masks and converts in one step.
        const V table = BITS == 4 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                                  : _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
        return _mm512_permutexvar_ps(low, table);
    }

    template <Rounding ROUNDING>
    static void store_f16(uint16_t* p, V x) {
        constexpr int mode = ROUNDING == Rounding::nearest ? _MM_FROUND_TO_NEAREST_INT
                             : ROUNDING == Rounding::down  ? _MM_FROUND_TO_NEG_INF
                                                           : _MM_FROUND_TO_POS_INF;
        store_256(p, _mm512_cvtps_ph(x, mode));
    }
    // The nearest bf16 numbers, half to even, as dwords.
    static Dwords nearest_bf16(V x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        return _mm512_srli_epi32(sum, 16);
    }
    static void store_bf16(uint16_t* p, V x) { store_256(p, _mm512_cvtepi32_epi16(nearest_bf16(x))); }
    // The nearest integers (half to even) of 0 <= a <= 255
    static Dwords to_dwords(V x) { return _mm512_cvtps_epi32(x); }
    static void store_bytes(uint8_t* p, Dwords d) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(d));
    }

    // x where low < position <= high, else -inf
    static V keep_between(V x, const int32_t* position, int32_t low, int32_t high) {
        const __m512i at = _mm512_loadu_si512(position);
        const __mmask16 above = _mm512_cmpgt_epi32_mask(at, _mm512_set1_epi32(low));
        const __mmask16 keep = _mm512_mask_cmple_epi32_mask(above, at, _mm512_set1_epi32(high));
        return _mm512_mask_blend_ps(keep, set1(-__builtin_inff()), x);
    }
    // To the L2 cache. (Not inlined early, GCC takes it for a function without effect and drops calls of it.)
    __attribute__((always_inline)) static void prefetch(const uint8_t* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
    }

private:
    static __m256i load_256(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store_256(uint16_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
};

}  // namespace
}  // namespace crush
