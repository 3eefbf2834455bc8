// 16 dwords as two AVX2 registers, for products: see product_impl.hpp
#pragma once

#include "kernels/product_impl.hpp"
#include "kernels/simd_avx2.hpp"

namespace crush {
namespace {

struct ProductAvx2 {
    using I = SimdAvx2;
    static constexpr int ROWS = 2;  // of which sums fit into the registers

    struct W {
        __m256i a, b;
    };

    static W zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static W load(const uint8_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
    }
    static W low_halves(W x) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
    }
    static W high_halves(W x) { return low_halves({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
    static W add(W x, W y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
    static I::V to_float(W x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

    static W byte_products(W w, const int8_t* x) {
        const __m256i y = four(x);
        return {_mm256_maddubs_epi16(w.a, y), _mm256_maddubs_epi16(w.b, y)};
    }
    static W add_words(W x, W y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
    static W pair_sums(W x, short factor) {
        const __m256i y = _mm256_set1_epi16(factor);
        return {_mm256_madd_epi16(x.a, y), _mm256_madd_epi16(x.b, y)};
    }

    // Into the L1 cache: the processor's own prefetching ends with each page.
    __attribute__((always_inline)) static void prefetch_ahead(const uint8_t* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0);
    }

protected:
    static __m256i four(const int8_t* x) {
        int32_t dword;
        __builtin_memcpy(&dword, x, sizeof(dword));
        return _mm256_set1_epi32(dword);
    }
};

struct ProductAvxVnni : ProductAvx2 {
    static void add_products(W& sum, W w, const int8_t* x) {
        const __m256i y = four(x);
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.a) : "x"(w.a), "x"(y));
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.b) : "x"(w.b), "x"(y));
    }
};

}  // namespace
}  // namespace crush
