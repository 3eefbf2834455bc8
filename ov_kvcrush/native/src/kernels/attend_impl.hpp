// Attention over tiles, once for all instruction sets: I is a Simd* struct. No standard library here: its inline
// functions would be compiled for this instruction set and might be linked into code for others.
#pragma once

#include "kernels/hadamard.hpp"
#include "kernels/visibility.hpp"

namespace crush {
namespace {

template <class I>
struct AttendImpl {
    using V = typename I::V;
    static constexpr int SCALED_STRIDE = TILE + 16;

    // ROW: how many rows of a code matrix one step of a loop takes: those of one dword, or 4 of floats.
    template <Codec C>
    static constexpr int ROWS = is_quantised(C) ? codes_per_dword(C) : 4;

    // The next ROWS<C> rows of a code matrix with `width` columns, for U units of 16 columns: calls use(i, v) with V
    // v[U] for row i.
    template <Codec C, int U, class F>
    static void for_codes(const uint8_t* codes, int width, F use) {
        if constexpr (is_quantised(C)) {
            typename I::Dwords d[U];
#pragma GCC unroll 2
            for (int u = 0; u < U; ++u) d[u] = I::load_dwords(codes + 64 * u);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS<C>; ++i) {
                V v[U];
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) v[u] = I::template code<code_bits(C)>(d[u], code_shift(C, i));
                use(i, v);
            }
        } else {
            constexpr int item = code_bits(C) / 8;
#pragma GCC unroll 4
            for (int i = 0; i < ROWS<C>; ++i, codes += width * item) {
                V v[U];
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) v[u] = floats<C>(codes + 16 * u * item);
                use(i, v);
            }
        }
    }
    template <Codec C>
    static V floats(const uint8_t* p) {
        if constexpr (C == Codec::f32) return I::load(reinterpret_cast<const float*>(p));
        if constexpr (C == Codec::bf16) return I::load_bf16(reinterpret_cast<const uint16_t*>(p));
        if constexpr (C == Codec::f16) return I::load_f16(reinterpret_cast<const uint16_t*>(p));
    }
    // Bytes of 16 columns, and of ROWS<C> rows of `width` columns.
    template <Codec C>
    static constexpr int unit_bytes() {
        return is_quantised(C) ? 64 : 2 * code_bits(C);
    }
    template <Codec C>
    static constexpr int step_bytes(int width) {
        return ROWS<C> * width * code_bits(C) / 8;
    }
    static V f16_at(const uint8_t* p) { return I::load_f16(reinterpret_cast<const uint16_t*>(p)); }

    // RowBounds of one register block: the rest is split evenly.
    static constexpr int block_rows(int rest) {
        const int blocks = (rest + I::BLOCK_ROWS - 1) / I::BLOCK_ROWS;
        return (rest + blocks - 1) / blocks;
    }

    // ---- scores of a tile: s[r][t] = bias[r] + sum over channels of q[r][c] * code[c][t] ----

    template <int R, Codec C>
    static void score_block(const uint8_t* codes, int head_size, const float* q, const float* bias, float* s,
                            TilePrefetcher<I>& prefetcher) {
        constexpr int U = I::BLOCK_UNITS;
        for (int unit = 0; unit < TILE / 16; unit += U) {
            V acc[R][U];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) acc[r][u] = I::set1(bias[r]);
            const uint8_t* p = codes + unit * unit_bytes<C>();
            for (int c = 0; c < head_size; c += ROWS<C>, p += step_bytes<C>(TILE)) {
                for_codes<C, U>(p, TILE, [&](int i, const V* k) __attribute__((always_inline)) {
                    if (i % 4 == 0) prefetcher.step();
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const V x = I::set1(q[r * STRIDE + c + i]);
#pragma GCC unroll 2
                        for (int u = 0; u < U; ++u) acc[r][u] = I::fma(x, k[u], acc[r][u]);
                    }
                });
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) I::store(s + r * STRIDE + (unit + u) * 16, acc[r][u]);
        }
    }

    template <int R, Codec C>
    static void score_blocks(const uint8_t* codes, int head_size, const float* q, const float* bias, float* s,
                             TilePrefetcher<I>& prefetcher) {
        constexpr int B = block_rows(R);
        score_block<B, C>(codes, head_size, q, bias, s, prefetcher);
        if constexpr (R > B)
            score_blocks<R - B, C>(codes, head_size, q + B * STRIDE, bias + B, s + B * STRIDE, prefetcher);
    }

    template <int R, Codec C>
    static void score_tile(const uint8_t* tile, const TileLayout& l, const float* q, float* s,
                           TilePrefetcher<I>& prefetcher) {
        float bias[R] = {};
        if constexpr (is_quantised(C)) {
            // q . (min + code * scale) = q . min + (q * scale) . code
            alignas(ALIGNMENT) float scaled[R * STRIDE];
            V dot[R];
            for (int r = 0; r < R; ++r) dot[r] = I::set1(0);
            for (int c = 0; c < l.head_size; c += 16) {
                const V scale = f16_at(tile + l.key_scale + 2 * c), min = f16_at(tile + l.key_min + 2 * c);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const V x = I::load(q + r * STRIDE + c);
                    I::store(scaled + r * STRIDE + c, I::mul(x, scale));
                    dot[r] = I::fma(x, min, dot[r]);
                }
            }
            for (int r = 0; r < R; ++r) bias[r] = I::reduce_add(dot[r]);
            score_blocks<R, C>(tile + l.key_codes, l.head_size, scaled, bias, s, prefetcher);
        } else {
            score_blocks<R, C>(tile + l.key_codes, l.head_size, q, bias, s, prefetcher);
        }
    }

    // ---- values: acc[r][c] += sum over the tokens of tiles of p[r][t] * value[t][c], for U units of channels from c
    // on ----

    template <int R, Codec C, int U>
    static void value_block(const VisibleTile* tiles, int num_tiles, int c, const float* p, const float* keep,
                            float* acc, TilePrefetcher<I>& prefetcher) {
        const TileLayout& l = *tiles[0].layout;
        V sum[R][U], min_sum[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            min_sum[r] = I::set1(0);
#pragma GCC unroll 2
            for (int u = 0; u < U; ++u)
                sum[r][u] = I::mul(I::load(acc + r * l.head_size + c + 16 * u), I::set1(keep[r]));
        }
        for (int i = 0; i < num_tiles; ++i, p += TILE) {
            const uint8_t* tile = tiles[i].tile;
            const uint8_t* codes = tile + l.value_codes + c / 16 * unit_bytes<C>();
            const float* weight = p;
            constexpr int S = is_quantised(C) ? SCALED_STRIDE : STRIDE;
            alignas(ALIGNMENT) float scaled[is_quantised(C) ? R * SCALED_STRIDE : 1];
            if constexpr (is_quantised(C)) {
                // p . (min + code * scale) = p . min + (p * scale) . code
                const size_t group = static_cast<size_t>(c / l.group_size) * TILE * 2;
#pragma GCC unroll 2
                for (int t = 0; t < TILE; t += 16) {
                    const V scale = f16_at(tile + l.value_scale + group + 2 * t);
                    const V min = f16_at(tile + l.value_min + group + 2 * t);
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const V x = I::load(p + r * STRIDE + t);
                        I::store(scaled + r * SCALED_STRIDE + t, I::mul(x, scale));
                        min_sum[r] = I::fma(x, min, min_sum[r]);
                    }
                }
                weight = scaled;
            }
            for (int t = 0; t < TILE; t += ROWS<C>, codes += step_bytes<C>(l.head_size)) {
                for_codes<C, U>(codes, l.head_size, [&](int j, const V* v) __attribute__((always_inline)) {
                    if (j % 4 == 0) prefetcher.step();
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const V x = I::set1(weight[r * S + t + j]);
#pragma GCC unroll 2
                        for (int u = 0; u < U; ++u) sum[r][u] = I::fma(x, v[u], sum[r][u]);
                    }
                });
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const V mins = I::set1(is_quantised(C) ? I::reduce_add(min_sum[r]) : 0.f);
#pragma GCC unroll 2
            for (int u = 0; u < U; ++u) I::store(acc + r * l.head_size + c + 16 * u, I::add(sum[r][u], mins));
        }
    }

    template <int R, Codec C>
    static void value_blocks(const VisibleTile* tiles, int num_tiles, const float* p, const float* keep, float* acc,
                             TilePrefetcher<I>& prefetcher) {
        constexpr int B = block_rows(R), U = I::BLOCK_UNITS;
        const TileLayout& l = *tiles[0].layout;
        const bool whole = !is_quantised(C) || l.group_size % (16 * U) == 0;  // a block lies in one group
        int c = 0;
        if (whole)
            for (; c + 16 * U <= l.head_size; c += 16 * U)
                value_block<B, C, U>(tiles, num_tiles, c, p, keep, acc, prefetcher);
        if constexpr (U > 1)
            for (; c < l.head_size; c += 16) value_block<B, C, 1>(tiles, num_tiles, c, p, keep, acc, prefetcher);
        if constexpr (R > B)
            value_blocks<R - B, C>(tiles, num_tiles, p + B * STRIDE, keep + B, acc + B * l.head_size, prefetcher);
    }

    // s = exp(s - max) of n scores; keep = by what to multiply what was summed before.
    static void softmax_step(float* s, int n, float& max, float& sum, float& keep) {
        V top = I::set1(max);
        for (int t = 0; t < n; t += 16) top = I::max(I::load(s + t), top);
        const float new_max = I::reduce_max(top);
        keep = 1.f;
        if (!(new_max > -INF)) {
            for (int t = 0; t < n; t += 16) I::store(s + t, I::set1(0));
            return;
        }
        if (new_max > max) {
            alignas(ALIGNMENT) float factor[16];
            I::store(factor, I::exp2(I::set1((max - new_max) * LOG2E), EXP2_POLY));
            keep = factor[0];
        }
        V total = I::set1(0);
        const V shift = I::set1(new_max), log2e = I::set1(LOG2E);
        for (int t = 0; t < n; t += 16) {
            const V e = I::exp2(I::mul(I::sub(I::load(s + t), shift), log2e), EXP2_POLY);
            I::store(s + t, e);
            total = I::add(total, e);
        }
        max = new_max;
        sum = sum * keep + I::reduce_add(total);
    }

    // ---- the whole ----

    template <int R, Codec... C>
    static constexpr auto score_table() {
        using F = void (*)(const uint8_t*, const TileLayout&, const float*, float*, TilePrefetcher<I>&);
        struct Table {
            F of[sizeof...(C)];
        };
        return Table{{&score_tile<R, C>...}};
    }
    template <int R, Codec... C>
    static constexpr auto value_table() {
        using F = void (*)(const VisibleTile*, int, const float*, const float*, float*, TilePrefetcher<I>&);
        struct Table {
            F of[sizeof...(C)];
        };
        return Table{{&value_blocks<R, C>...}};
    }
    template <int R>
    static void score(const uint8_t* tile, const TileLayout& l, const float* q, float* s,
                      TilePrefetcher<I>& prefetcher) {
        constexpr auto table = score_table<R, Codec::f32, Codec::bf16, Codec::f16, Codec::u8, Codec::u4, Codec::u2>();
        table.of[static_cast<int>(l.key)](tile, l, q, s, prefetcher);
    }
    template <int R>
    static void values(const VisibleTile* tiles, int n, const float* p, const float* keep, float* acc,
                       TilePrefetcher<I>& prefetcher) {
        constexpr auto table = value_table<R, Codec::f32, Codec::bf16, Codec::f16, Codec::u8, Codec::u4, Codec::u2>();
        table.of[static_cast<int>(tiles[0].layout->value)](tiles, n, p, keep, acc, prefetcher);
    }

    static void copy_rows(const float* q, int rows, int head_size, float* to) {
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < head_size; c += 16) I::store(to + r * STRIDE + c, I::load(q + r * head_size + c));
    }

    template <int R>
    static void attend_rows(const AttendArgs& a) {
        alignas(ALIGNMENT) float q[R * STRIDE], s[R * STRIDE];
        const RowBounds rows(a);
        VisibleTile chunks[2][CHUNK];
        size_t next = 0;
        int n = collect_visible<I>(a, rows, next, chunks[0]);
        if (n == 0) return;
        copy_rows(a.q, R, chunks[0][0].layout->head_size, q);
        for (int side = 0; n > 0; side ^= 1) {
            const VisibleTile *chunk = chunks[side], *after = chunks[side ^ 1];
            const int num_next = collect_visible<I>(a, rows, next, chunks[side ^ 1]);
            const int num_prefetched = num_next > 0 ? num_next : collect_next<I>(a, chunks[side ^ 1]);
            // Steps of a tile: one per 4 channels and one per 4 tokens and block of channels.
            const int steps_per_tile = chunk[0].layout->head_size / 4;
            TilePrefetcher<I> prefetcher(after, num_prefetched, n * steps_per_tile);
            for (int i = 0; i < n; ++i) {
                score<R>(chunk[i].tile, *chunk[i].layout, q, s + i * TILE, prefetcher);
                if (adjusts(a)) adjust<I>(chunk[i], a, 1, s + i * TILE);
                if (chunk[i].masked) mask<I>(chunk[i], rows, R, s + i * TILE);
            }
            float keep[R], one[R];
            for (int r = 0; r < R; ++r) {
                softmax_step(s + r * STRIDE, n * TILE, a.max[r], a.sum[r], keep[r]);
                one[r] = 1.f;
            }
            for (int i = 0, end; i < n; i = end) {
                for (end = i + 1; end < n && chunk[end].layout == chunk[i].layout;) ++end;
                Hadamard<I>::turn_sums(a, *chunk[i].layout);
                values<R>(chunk + i, end - i, s + i * TILE, i == 0 ? keep : one, a.acc, prefetcher);
            }
            n = num_next;
        }
    }

    static void attend(const AttendArgs& a) {
        switch (a.rows) {
            case 1:
                return attend_rows<1>(a);
            case 2:
                return attend_rows<2>(a);
            case 3:
                return attend_rows<3>(a);
            case 4:
                return attend_rows<4>(a);
            case 5:
                return attend_rows<5>(a);
            case 6:
                return attend_rows<6>(a);
            case 7:
                return attend_rows<7>(a);
            case 8:
                return attend_rows<8>(a);
        }
    }

    template <int R>
    static void scores_rows(const uint8_t* const* tiles, size_t num_tiles, const float* q, float* s, size_t stride) {
        alignas(ALIGNMENT) float rows[R * STRIDE], part[R * STRIDE];
        if (num_tiles == 0) return;
        copy_rows(q, R, layout(tiles[0]).head_size, rows);
        for (size_t i = 0; i < num_tiles; ++i, s += TILE) {
            const int count = header(tiles[i]).count;
            const TileLayout& l = layout(tiles[i]);
            const VisibleTile after{tiles[i + 1 < num_tiles ? i + 1 : i], &l, false};
            TilePrefetcher<I> prefetcher(&after, i + 1 < num_tiles, l.head_size / 2);
            score<R>(tiles[i], l, rows, part, prefetcher);
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < TILE; ++t) s[r * stride + t] = t < count ? part[r * STRIDE + t] : 0.f;
        }
    }

    static void scores(const uint8_t* const* tiles, size_t num_tiles, const float* q, int rows, float* s,
                       size_t stride) {
        switch (rows) {
            case 1:
                return scores_rows<1>(tiles, num_tiles, q, s, stride);
            case 2:
                return scores_rows<2>(tiles, num_tiles, q, s, stride);
            case 3:
                return scores_rows<3>(tiles, num_tiles, q, s, stride);
            case 4:
                return scores_rows<4>(tiles, num_tiles, q, s, stride);
            case 5:
                return scores_rows<5>(tiles, num_tiles, q, s, stride);
            case 6:
                return scores_rows<6>(tiles, num_tiles, q, s, stride);
            case 7:
                return scores_rows<7>(tiles, num_tiles, q, s, stride);
            case 8:
                return scores_rows<8>(tiles, num_tiles, q, s, stride);
        }
    }

    static void softmax(float* s, size_t n) {
        const size_t whole = n / 16 * 16;
        alignas(ALIGNMENT) float tail[16];
        for (size_t i = 0; i < 16; ++i) tail[i] = whole + i < n ? s[whole + i] : -INF;
        V top = I::load(tail);
        for (size_t i = 0; i < whole; i += 16) top = I::max(I::load(s + i), top);
        const float max = I::reduce_max(top);
        if (!(max > -INF)) {
            for (size_t i = 0; i < n; ++i) s[i] = 0.f;
            return;
        }
        const V shift = I::set1(max), log2e = I::set1(LOG2E);
        const auto exp = [&](const float* p) { return I::exp2(I::mul(I::sub(I::load(p), shift), log2e), EXP2_POLY); };
        const V last = exp(tail);
        V total = last;
        for (size_t i = 0; i < whole; i += 16) {
            const V e = exp(s + i);
            I::store(s + i, e);
            total = I::add(total, e);
        }
        const V factor = I::set1(1.f / I::reduce_add(total));
        for (size_t i = 0; i < whole; i += 16) I::store(s + i, I::mul(I::load(s + i), factor));
        I::store(tail, I::mul(last, factor));
        for (size_t i = whole; i < n; ++i) s[i] = tail[i - whole];
    }

    static void cap(float* s, size_t n, float cap) {
        const size_t whole = n / 16 * 16;
        for (size_t i = 0; i < whole; i += 16) I::store(s + i, soft_capped<I>(I::load(s + i), cap));
        alignas(ALIGNMENT) float tail[16] = {};
        for (size_t i = whole; i < n; ++i) tail[i - whole] = s[i];
        I::store(tail, soft_capped<I>(I::load(tail), cap));
        for (size_t i = whole; i < n; ++i) s[i] = tail[i - whole];
    }
};

}  // namespace
}  // namespace crush
