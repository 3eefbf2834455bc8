// 16 dwords as one AVX-512 register, for products: see product_impl.hpp
#pragma once

#include "kernels/product_impl.hpp"
#include "kernels/simd_avx512.hpp"

namespace crush {
namespace {

struct ProductAvx512 {
    using I = SimdAvx512;
    using W = __m512i;
    static constexpr int ROWS = 4;  // of which sums fit into the registers

    static W zero() { return _mm512_setzero_si512(); }
    static W load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static W low_halves(W x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static W high_halves(W x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
    static W add(W x, W y) { return _mm512_add_epi32(x, y); }
    static I::V to_float(W x) { return _mm512_cvtepi32_ps(x); }

    static W byte_products(W w, const int8_t* x) { return _mm512_maddubs_epi16(w, four(x)); }
    static W add_words(W x, W y) { return _mm512_add_epi16(x, y); }
    static W pair_sums(W x, short factor) { return _mm512_madd_epi16(x, _mm512_set1_epi16(factor)); }

    // Into the L1 cache: the processor's own prefetching ends with each page.
    __attribute__((always_inline)) static void prefetch_ahead(const uint8_t* p) {
        _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0);
    }

protected:
    static W four(const int8_t* x) {
        int32_t dword;
        __builtin_memcpy(&dword, x, sizeof(dword));
        return _mm512_set1_epi32(dword);
    }
};

struct ProductAvx512Vnni : ProductAvx512 {
    static void add_products(W& sum, W w, const int8_t* x) {
        __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const int8_t(*)[4]>(x)));
    }
};

}  // namespace
}  // namespace crush
