// Recall: the mean key of a tile, and how queries rank tiles by it. Once for all instruction sets, as attend_impl.hpp.
#pragma once

#include "kernels/attend_impl.hpp"

namespace crush {
namespace {

template <class I>
struct RecallImpl {
    using V = typename I::V;
    using A = AttendImpl<I>;
    static constexpr int AHEAD = 8;  // tiles

    template <Codec C>
    static void mean_of(uint8_t* tile, const TileLayout& l) {
        const uint8_t* codes = tile + l.key_codes;
        auto* to = reinterpret_cast<uint16_t*>(tile + l.mean);
        for (int c = 0; c < l.head_size; c += 16) {
            alignas(ALIGNMENT) float sum[16];
            for (int i = 0; i < 16; i += A::template ROWS<C>, codes += A::template step_bytes<C>(TILE)) {
                A::template for_codes<C, 2>(codes, TILE, [&](int row, const V* k) __attribute__((always_inline)) {
                    sum[i + row] = I::reduce_add(I::add(k[0], k[1]));
                });
            }
            V mean = I::mul(I::load(sum), I::set1(1.f / TILE));
            if constexpr (is_quantised(C))
                mean = I::fma(mean, A::f16_at(tile + l.key_scale + 2 * c), A::f16_at(tile + l.key_min + 2 * c));
            constexpr float most = 65504.f;
            mean = I::min(I::max(mean, I::set1(-most)), I::set1(most));
            I::template store_f16<Rounding::nearest>(to + c, mean);
        }
    }

    static void write_mean(uint8_t* tile) {
        using F = void (*)(uint8_t*, const TileLayout&);
        constexpr F of[] = {&mean_of<Codec::f32>, &mean_of<Codec::bf16>, &mean_of<Codec::f16>,
                            &mean_of<Codec::u8>,  &mean_of<Codec::u4>,   &mean_of<Codec::u2>};
        const TileLayout& l = layout(tile);
        if (l.mean) of[static_cast<int>(l.key)](tile, l);
    }

    // A tile costs its mean, 2 D bytes, instead of all of it (71 lines of 64 bytes with u8/u8 and D = 64, of which
    // these are 2), and R * D / 16 products of 16 numbers instead of 4 R * D.
    template <int R>
    static void rank_rows(const uint8_t* const* tiles, size_t num_tiles, const float* q, float* s, size_t stride) {
        if (num_tiles == 0) return;
        const int size = layout(tiles[0]).head_size;
        const uint32_t at = layout(tiles[0]).mean;  // behind the header in every layout
        for (size_t i = 0; i < num_tiles; ++i) {
            if (i + AHEAD < num_tiles)
                for (int c = 0; c < 2 * size; c += ALIGNMENT) I::prefetch(tiles[i + AHEAD] + at + c);
            const auto* mean = reinterpret_cast<const uint16_t*>(tiles[i] + at);
            V sum[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r] = I::set1(0);
            for (int c = 0; c < size; c += 16) {
                const V k = I::load_f16(mean + c);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sum[r] = I::fma(I::load(q + r * size + c), k, sum[r]);
            }
            for (int r = 0; r < R; ++r) {
                const float x = I::reduce_add(sum[r]);
                s[r * stride + i] =
                    x > -RANK_BOUND ? x < RANK_BOUND ? x : RANK_BOUND : -RANK_BOUND;  // NaN is the least
            }
        }
    }

    static void rank(const uint8_t* const* tiles, size_t num_tiles, const float* q, int rows, float* s, size_t stride) {
        using F = void (*)(const uint8_t* const*, size_t, const float*, float*, size_t);
        constexpr F of[] = {&rank_rows<1>, &rank_rows<2>, &rank_rows<3>, &rank_rows<4>,
                            &rank_rows<5>, &rank_rows<6>, &rank_rows<7>, &rank_rows<8>};
        of[rows - 1](tiles, num_tiles, q, s, stride);
    }
};

}  // namespace
}  // namespace crush
