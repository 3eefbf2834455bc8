// Pairs of 16-bit integers in AVX-512 registers: see attend_pairs.hpp
#pragma once

#include "kernels/simd_avx512.hpp"

namespace crush {
namespace {

struct PairsAvx512 {
    using I = SimdAvx512;
    using V = I::V;
    using W = __m512i;
    static constexpr int BLOCK_ROWS = I::BLOCK_ROWS, BLOCK_UNITS = I::BLOCK_UNITS;
    static constexpr int SUMS_PER_UNIT = 1;  // registers of 16 columns
    static constexpr int MIN_SUMS = 1;       // additions take one cycle: a sum can take a product each cycle

    static W zero() { return _mm512_setzero_si512(); }
    static W load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static W pair(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    // The numbers of BITS bits that begin at bit SHIFT of each word.
    template <int BITS, int SHIFT>
    static W field(W x) {
        const W low = SHIFT ? _mm512_srli_epi16(x, SHIFT) : x;
        return SHIFT + BITS == 16 ? low : _mm512_and_si512(low, _mm512_set1_epi16((1 << BITS) - 1));
    }
    static W add(W x, W y) { return _mm512_add_epi32(x, y); }
    // sum + the products of two words in each dword
    static W add_products(W sum, W x, W y) {
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x, y));
        __asm__("" : "+v"(sum));  // else GCC adds the products of several calls first
        return sum;
    }
    static V to_float(W x) { return _mm512_cvtepi32_ps(x); }

    static void split(V x, V y, V& low, V& high) {
        low = unpack_low(x, y);
        high = unpack_high(x, y);
    }
    // Dword i: the low words of low_i and high_i.
    static void store_pairs(uint32_t* to, V low, V high) {
        const W upper = _mm512_slli_epi32(_mm512_castps_si512(high), 16);
        _mm512_store_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_castps_si512(low), upper));
    }
    // The sums of the lanes of four registers.
    static void reduce4(const V* x, float* to) {
        const V ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const V cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        const V sums = _mm512_add_ps(unpack_low(ab, cd), unpack_high(ab, cd));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }

private:
    static V unpack_low(V x, V y) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    }
    static V unpack_high(V x, V y) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    }
};

struct PairsAvx512Vnni : PairsAvx512 {
    static constexpr int MIN_SUMS = 10;  // a product takes five cycles, and two begin in one
    // (With the intrinsic GCC 12 copies sums from register to register: 1.07 times the time.)
    static W add_products(W sum, W x, W y) {
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
        return sum;
    }
};

}  // namespace
}  // namespace crush
