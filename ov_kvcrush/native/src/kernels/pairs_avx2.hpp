// Pairs of 16-bit integers in AVX2 registers: see attend_pairs.hpp
#pragma once

#include "kernels/simd_avx2.hpp"

namespace crush {
namespace {

struct PairsAvx2 {
    using I = SimdAvx2;
    using V = I::V;
    static constexpr int BLOCK_ROWS = I::BLOCK_ROWS, BLOCK_UNITS = I::BLOCK_UNITS;
    static constexpr int SUMS_PER_UNIT = 2;  // registers of 16 columns
    static constexpr int MIN_SUMS = 1;       // additions take one cycle: a sum can take a product each cycle

    struct W {
        __m256i a, b;
    };

    static W zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static W load(const uint8_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
    }
    static W pair(uint32_t x) {
        const __m256i w = _mm256_set1_epi32(static_cast<int>(x));
        return {w, w};
    }
    // The numbers of BITS bits that begin at bit SHIFT of each word.
    template <int BITS, int SHIFT>
    static W field(W x) {
        return {field<BITS, SHIFT>(x.a), field<BITS, SHIFT>(x.b)};
    }
    static W add(W x, W y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
    // sum + the products of two words in each dword
    static W add_products(W sum, W x, W y) {
        sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, y.a));
        sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, y.b));
        // Else GCC adds the products of several calls first, and runs out of registers.
        __asm__("" : "+x"(sum.a), "+x"(sum.b));
        return sum;
    }
    static V to_float(W x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

    static void split(V x, V y, V& low, V& high) {
        low = {unpack_low(x.a, y.a), unpack_low(x.b, y.b)};
        high = {unpack_high(x.a, y.a), unpack_high(x.b, y.b)};
    }
    // Dword i: the low words of low_i and high_i.
    static void store_pairs(uint32_t* to, V low, V high) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), merge(low.a, high.a));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 8), merge(low.b, high.b));
    }
    // The sums of the lanes of four registers.
    static void reduce4(const V* x, float* to) {
        const __m256 ab = _mm256_hadd_ps(lanes(x[0]), lanes(x[1])), cd = _mm256_hadd_ps(lanes(x[2]), lanes(x[3]));
        const __m256 sums = _mm256_hadd_ps(ab, cd);
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
    }

private:
    template <int BITS, int SHIFT>
    static __m256i field(__m256i x) {
        const __m256i low = SHIFT ? _mm256_srli_epi16(x, SHIFT) : x;
        return SHIFT + BITS == 16 ? low : _mm256_and_si256(low, _mm256_set1_epi16((1 << BITS) - 1));
    }
    static __m256 unpack_low(__m256 x, __m256 y) {
        return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
    }
    static __m256 unpack_high(__m256 x, __m256 y) {
        return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
    }
    static __m256i merge(__m256 low, __m256 high) {
        return _mm256_blend_epi16(_mm256_castps_si256(low), _mm256_slli_epi32(_mm256_castps_si256(high), 16), 0xaa);
    }
    static __m256 lanes(V x) { return _mm256_add_ps(x.a, x.b); }
};

struct PairsAvxVnni : PairsAvx2 {
    static constexpr int MIN_SUMS = 8;  // of 16 registers; a product takes five cycles, and two begin in one
    static W add_products(W sum, W x, W y) {
        __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum.a) : "x"(x.a), "x"(y.a));
        __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum.b) : "x"(x.b), "x"(y.b));
        return sum;
    }
};

}  // namespace
}  // namespace crush
