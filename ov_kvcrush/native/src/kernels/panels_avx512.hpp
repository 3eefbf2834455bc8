// Panels of bf16 products in AVX-512 registers: see prefill_products.hpp
// Register blocking: 8 rows by 32 columns, so 16 sums, two registers of the right factor and one of the left, a pair
// that is broadcast: 19 of 32. 4 pairs take 111 instructions (GCC 12, -O3): 64 products, 8 loads, 32 broadcasts and 7 of
// the loop. So a panel takes 1776 for 16 pairs, 1024 of them products, beside 64 stores. A product takes some 6 cycles
// and at most two begin in one: 16 sums keep them busy. For 128 tokens and 32 rows 256 D products.
#pragma once

#include "kernels/prefill_products.hpp"

namespace crush {
namespace {

// Dot::add(sum, x, y): sum + the products of the pairs of bf16 numbers in each dword.
template <class Dot>
struct PanelsAvx512 {
    using V = SimdAvx512::V;
    struct Setup {};
    static constexpr bool OVERLAPS = false;  // products take the units that powers need
    static constexpr int ROWS = 8;           // of a step
    static constexpr int UNROLL = 4;         // pairs

    static int steps(int) { return PANEL_ROWS / ROWS; }
    static void step(const Panel& p, int i) {
        const auto stride = static_cast<ptrdiff_t>(p.left_stride);
        const uint8_t* upper = p.left + i * ROWS * stride;
        const uint8_t* lower = upper + ROWS / 2 * stride;
        float* sums = p.sums + i * ROWS * COLUMNS;
        V sum[ROWS][2];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            sum[r][0] = p.adds ? _mm512_load_ps(sums + r * COLUMNS) : _mm512_setzero_ps();
            sum[r][1] = p.adds ? _mm512_load_ps(sums + r * COLUMNS + 16) : _mm512_setzero_ps();
        }
        const uint32_t *right = p.right, *end = right + p.parts * 16 * COLUMNS;
        for (; right != end; right += UNROLL * COLUMNS, upper += 4 * UNROLL, lower += 4 * UNROLL)
#pragma GCC unroll 4
            for (int k = 0; k < UNROLL; ++k) {
                const __m512i first = _mm512_load_si512(right + k * COLUMNS);
                const __m512i second = _mm512_load_si512(right + k * COLUMNS + 16);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) {
                    const uint8_t* row = r < ROWS / 2 ? upper + r * stride : lower + (r - ROWS / 2) * stride;
                    const __m512i pair = broadcast(row + 4 * k);
                    sum[r][0] = Dot::add(sum[r][0], first, pair);
                    sum[r][1] = Dot::add(sum[r][1], second, pair);
                }
            }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            _mm512_store_ps(sums + r * COLUMNS, sum[r][0]);
            _mm512_store_ps(sums + r * COLUMNS + 16, sum[r][1]);
        }
    }

private:
    static __m512i broadcast(const uint8_t* p) {
        int32_t pair;
        std::memcpy(&pair, p, sizeof(pair));
        return _mm512_set1_epi32(pair);
    }
};

}  // namespace
}  // namespace crush
