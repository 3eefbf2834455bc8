// Attention of a few query rows over quantised tiles by products of pairs of 16-bit integers (vpmaddwd or vpdpwssd):
// codes are one factor; the other (q * key scale, p * value scale) is rounded to 16 bits. docs/kv_store.md bounds the
// error. N is a Pairs* struct: pairs_avx2.hpp, pairs_avx512.hpp. (No standard library: see attend_impl.hpp)
//
// Cost of a tile for 7 rows of 64 channels, u8: 896 products of zmm registers, 128 instructions that part the bytes,
// 400 that prepare the integers and take powers. At two a cycle they would take 300 ns; it is 470 (Xeon of the Cascade
// Lake family, 2.4 GHz, L2 cache), and 840 with the kernels of attend_impl.hpp, which convert each code and multiply
// one number at a time; from memory 670 and 920, without prefetches 1100. docs/kv_store.md has more figures.
#pragma once

#include "kernels/hadamard.hpp"
#include "kernels/pair_sums.hpp"
#include "kernels/visibility.hpp"

namespace crush {
namespace {

template <class N>
class PairAttend {
    using I = typename N::I;
    using V = typename I::V;
    static constexpr int MAX_HEAD = 256;
    // Adding it leaves the nearest integer, in two's complement, at the end of the mantissa.
    static constexpr float MAGIC = 0xc00000p0f, RANGE = 32766.f;
    static constexpr float FLOOR = -1e30f;
    static constexpr float MAX_INVERSE = 1e25f;  // of a step: keeps q . min finite
    template <int M>
    struct Int {
        static constexpr int value = M;
    };

public:
    static bool supports(const TileLayout& l) { return is_quantised(l.key) && is_quantised(l.value); }

    PairAttend(const AttendArgs& args, int head_size) : args_(args), rows_(args.rows), size_(head_size) {
        const V log2e = I::set1(LOG2E);
        for (int r = 0; r < rows_; ++r)
            for (int c = 0; c < size_; c += TILE) {
                const float* q = args.q + r * size_ + c;
                const V x = I::mul(I::load(q), log2e), y = c + 16 < size_ ? I::mul(I::load(q + 16), log2e) : I::set1(0);
                store_split(log2_q_[r] + c, x, y);
            }
    }

    // Tiles of one layout. `after`: tiles to prefetch meanwhile.
    void run(const VisibleTile* tiles, int n, const RowBounds& rows, const VisibleTile* after, int num_after) {
        for (int i = 0; i < n; ++i) ahead_[i] = i < num_after ? address(after[i].tile) - address(tiles[i].tile) : 0;
        scale_queries(tiles, n);
        for_codec(tiles[0].layout->key, [&](auto bits) {
            for (int i = 0; i < n; ++i)
                for_row_blocks([&](auto m, int first) {
                    add_keys<decltype(m)::value, decltype(bits)::value>(tiles[i], i, first);
                });
        });
        for (int i = 0; adjusts(args_) && i < n; ++i) adjust<I>(tiles[i], args_, LOG2E, scores_[0] + i * TILE);
        for (int i = 0; i < n; ++i)
            if (tiles[i].masked) mask<I>(tiles[i], rows, rows_, scores_[0] + i * TILE);
        softmax(n * TILE);
        Hadamard<I>::turn_sums(args_, *tiles[0].layout);
        for_codec(tiles[0].layout->value, [&](auto bits) {
            for_row_blocks(
                [&](auto m, int first) { add_groups<decltype(m)::value, decltype(bits)::value>(tiles, n, first); });
        });
    }

private:
    // f(Int<bits of the codes>)
    template <class F>
    static void for_codec(Codec codec, F f) {
        if (codec == Codec::u8) f(Int<8>());
        if (codec == Codec::u4) f(Int<4>());
        if (codec == Codec::u2) f(Int<2>());
    }
    // f(Int<rows of the block>, its first row), blocks as even as can be.
    template <class F>
    void for_row_blocks(F f) const {
        const int blocks = (rows_ + N::BLOCK_ROWS - 1) / N::BLOCK_ROWS;
        for (int b = 0; b < blocks; ++b) {
            const int first = rows_ * b / blocks;
            for_rows<N::BLOCK_ROWS>(rows_ * (b + 1) / blocks - first, first, f);
        }
    }
    template <int M, class F>
    static void for_rows(int rows, int first, F& f) {
        if (rows == M) return f(Int<M>(), first);
        if constexpr (M > 1) for_rows<M - 1>(rows, first, f);
    }

    // 32 numbers, of 16 neighbours each in x and y: first those of the first halves of quads, then those of the second
    // halves. Quads alternate between x and y.
    static void store_split(float* to, V x, V y) {
        V low, high;
        N::split(x, y, low, high);
        I::store(to, low);
        I::store(to + 16, high);
    }
    // The same of f16 numbers. Those beyond the first 16 are zero unless `whole`.
    static void load_split(const uint8_t* p, bool whole, V& low, V& high) {
        const auto* from = reinterpret_cast<const uint16_t*>(p);
        N::split(I::load_f16(from), whole ? I::load_f16(from + 16) : I::set1(0), low, high);
    }

    // q_in_steps_: each row of q in units of a step of its own, chosen so that its products with the largest scales of
    // these tiles are within RANGE.
    void scale_queries(const VisibleTile* tiles, int n) {
        V bound[MAX_ROWS];
        for (int r = 0; r < rows_; ++r) bound[r] = I::set1(0);
        for (int c = 0; c < size_; c += TILE) {
            V low = I::set1(0), high = I::set1(0);
            for (int i = 0; i < n; ++i) {
                V x, y;
                load_split(tiles[i].tile + tiles[i].layout->key_scale + 2 * c, c + 16 < size_, x, y);
                low = I::max(x, low);
                high = I::max(y, high);
            }
            for (int r = 0; r < rows_; ++r) {
                bound[r] = I::max(I::mul(I::abs(I::load(log2_q_[r] + c)), low), bound[r]);
                bound[r] = I::max(I::mul(I::abs(I::load(log2_q_[r] + c + 16)), high), bound[r]);
            }
        }
        for (int r = 0; r < rows_; ++r) {
            const float inverse = inverse_step(I::reduce_max(bound[r]));
            step_[r] = 1 / inverse;
            for (int c = 0; c < size_; c += TILE)
                for (int unit = 0; unit < TILE; unit += 16)
                    I::store(q_in_steps_[r] + c + unit, I::mul(I::load(log2_q_[r] + c + unit), I::set1(inverse)));
        }
    }
    static float inverse_step(float most) { return most * MAX_INVERSE > RANGE ? RANGE / most : MAX_INVERSE; }

    // scores_ of M rows with a tile
    template <int M, int BITS>
    __attribute__((noinline)) void add_keys(const VisibleTile& v, int i, int row) {
        constexpr int U = N::BLOCK_UNITS;
        const TileLayout& l = *v.layout;
        const uintptr_t ahead = row == 0 ? ahead_[i] : 0;
        PairBlock q[MAX_HEAD / TILE];
        float bias[MAX_ROWS];
        split_queries<M>(v, row, ahead, q, bias);
        for (int unit = 0; unit < TILE / 16; unit += U) {
            PairSums<N, M, U> sums;
            sums.template add<BITS>(v.tile + l.key_codes + 64 * unit, 4 * TILE, q, size_ / 16, ahead);
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u)
                    I::store(scores_[row + r] + i * TILE + 16 * (unit + u),
                             I::fma(sums.total(r, u), I::set1(step_[row + r]), I::set1(bias[r])));
        }
    }
    // The integers q * scale; bias: q . min
    template <int M>
    __attribute__((always_inline)) void split_queries(const VisibleTile& v, int row, uintptr_t ahead, PairBlock* to,
                                                      float* bias) const {
        const TileLayout& l = *v.layout;
        const V magic = I::set1(MAGIC);
        V dot[(M + 3) / 4 * 4];
#pragma GCC unroll 8
        for (V& x : dot) x = I::set1(0);
        for (int c = 0; c < size_; c += TILE, ++to) {
            V scale[2], min[2];
            prefetch_ahead<I>(v.tile + l.key_scale + 2 * c, ahead);
            prefetch_ahead<I>(v.tile + l.key_min + 2 * c, ahead);
            load_split(v.tile + l.key_scale + 2 * c, c + 16 < size_, scale[0], scale[1]);
            load_split(v.tile + l.key_min + 2 * c, c + 16 < size_, min[0], min[1]);
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r) {
                const V x = I::load(q_in_steps_[row + r] + c), y = I::load(q_in_steps_[row + r] + c + 16);
                N::store_pairs(to->of[r], I::fma(x, scale[0], magic), I::fma(y, scale[1], magic));
                dot[r] = I::fma(x, min[0], I::fma(y, min[1], dot[r]));
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < M; r += 4) N::reduce4(dot + r, bias + r);
        for (int r = 0; r < M; ++r) bias[r] *= step_[row + r];
    }

    // scores_[r] = 2^(score - the row's maximum over these n tokens), split tile by tile. Sets keep_, the factor of all
    // earlier sums, and weight_, the factor of these tokens. A row that sees none of them has maximum FLOOR, so all its
    // powers are 0.
    void softmax(int n) {
        float shift[MAX_ROWS];
        for (int r = 0; r < rows_; ++r) {
            V top[4];
            for (int k = 0; k < 4; ++k) top[k] = I::load(scores_[r] + 16 * (k % 2));
            int t = 0;
            for (; t + 64 <= n; t += 64)
                for (int k = 0; k < 4; ++k) top[k] = I::max(I::load(scores_[r] + t + 16 * k), top[k]);
            for (; t < n; t += 16) top[0] = I::max(I::load(scores_[r] + t), top[0]);
            shift[r] = I::reduce_max(I::max(I::max(top[0], top[1]), I::max(top[2], top[3])));
        }
        alignas(ALIGNMENT) float factors[16] = {};
        for (int r = 0; r < rows_; ++r) {
            const float max = shift[r] > FLOOR ? shift[r] : FLOOR;
            const float old_max = args_.max[r] * LOG2E > FLOOR ? args_.max[r] * LOG2E : FLOOR;
            const float new_max = max > old_max ? max : old_max;
            if (shift[r] > old_max) args_.max[r] = shift[r] / LOG2E;
            factors[r] = old_max - new_max;
            factors[8 + r] = max - new_max;
            shift[r] = max;
        }
        I::store(factors, I::exp2(I::load(factors), EXP2_POLY));
        for (int r = 0; r < rows_; ++r) {
            const V max = I::set1(shift[r]);
            V total = I::set1(0);
            for (int t = 0; t < n; t += TILE) {
                const V x = I::exp2(I::sub(I::load(scores_[r] + t), max), EXP2_POLY);
                const V y = I::exp2(I::sub(I::load(scores_[r] + t + 16), max), EXP2_POLY);
                total = I::add(total, I::add(x, y));
                store_split(scores_[r] + t, x, y);
            }
            keep_[r] = factors[r];
            weight_[r] = factors[8 + r];
            args_.sum[r] = args_.sum[r] * keep_[r] + I::reduce_add(total) * weight_[r];
        }
    }

    template <int M, int BITS>
    void add_groups(const VisibleTile* tiles, int n, int row) {
        constexpr int U = N::BLOCK_UNITS;
        const TileLayout& l = *tiles[0].layout;
        for (int first = 0, c = 0; first < size_; first += l.group_size) {
            const int end = first + l.group_size;
            split_weights<M>(tiles, n, row, static_cast<size_t>(first / l.group_size) * TILE * 2);
            for (; c + 16 * U <= end; c += 16 * U) add_values<M, U, BITS>(tiles, n, row, c);
            if constexpr (U > 1)
                for (; c < end; c += 16) add_values<M, 1, BITS>(tiles, n, row, c);
        }
    }
    // weights_: the integers p * scale, in units of weight_step_; min_sum_: p . min. For the group of channels whose
    // scales lie at offset `group`.
    template <int M>
    __attribute__((noinline)) void split_weights(const VisibleTile* tiles, int n, int row, size_t group) {
        const TileLayout& l = *tiles[0].layout;
        V most = I::set1(0);
        for (int i = 0; i < n; ++i)
            for (int t = 0; t < TILE; t += 16)
                most = I::max(I::load_f16(reinterpret_cast<const uint16_t*>(tiles[i].tile + l.value_scale + group) + t),
                              most);
        const float inverse = inverse_step(I::reduce_max(most));
        weight_step_ = 1 / inverse;
        const V magic = I::set1(MAGIC), factor = I::set1(inverse);
        V dot[(M + 3) / 4 * 4];
#pragma GCC unroll 8
        for (V& x : dot) x = I::set1(0);
        for (int i = 0; i < n; ++i) {
            V scale[2], min[2];
            prefetch_ahead<I>(tiles[i].tile + l.value_scale + group, row == 0 ? ahead_[i] : 0);
            prefetch_ahead<I>(tiles[i].tile + l.value_min + group, row == 0 ? ahead_[i] : 0);
            load_split(tiles[i].tile + l.value_scale + group, true, scale[0], scale[1]);
            load_split(tiles[i].tile + l.value_min + group, true, min[0], min[1]);
            for (V& x : scale) x = I::mul(x, factor);
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r) {
                const float* p = scores_[row + r] + i * TILE;
                const V x = I::load(p), y = I::load(p + 16);
                N::store_pairs(weights_[i].of[r], I::fma(x, scale[0], magic), I::fma(y, scale[1], magic));
                dot[r] = I::fma(x, min[0], I::fma(y, min[1], dot[r]));
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < M; r += 4) N::reduce4(dot + r, min_sum_ + r);
    }
    // acc of U units of channels from c on
    template <int M, int U, int BITS>
    __attribute__((noinline)) void add_values(const VisibleTile* tiles, int n, int row, int c) {
        constexpr int AT_ONCE = BITS == 8 ? MAX_PRODUCTS / TILE : CHUNK;
        const TileLayout& l = *tiles[0].layout;
        for (int i = 0; i < n;) {
            const bool starts = i == 0;
            PairSums<N, M, U> sums;
            for (const int end = i + AT_ONCE < n ? i + AT_ONCE : n; i < end; ++i)
                sums.template add<BITS>(tiles[i].tile + l.value_codes + 4 * c, 4 * size_, &weights_[i], 2,
                                        row == 0 ? ahead_[i] : 0);
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r) {
                const float weight = weight_[row + r];
                const V factor = I::set1(weight_step_ * weight), keep = I::set1(starts ? keep_[row + r] : 1.f),
                        mins = I::set1(starts ? min_sum_[r] * weight : 0.f);
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) {
                    float* acc = args_.acc + (row + r) * size_ + c + 16 * u;
                    I::store(acc, I::fma(sums.total(r, u), factor, I::fma(I::load(acc), keep, mins)));
                }
            }
        }
    }

    const AttendArgs& args_;
    const int rows_, size_;
    float step_[MAX_ROWS];                     // unit of a row of q_in_steps_
    float keep_[MAX_ROWS], weight_[MAX_ROWS];  // see softmax
    float min_sum_[MAX_ROWS], weight_step_;
    uintptr_t ahead_[CHUNK];                               // from the bytes of a tile to those to prefetch
    alignas(ALIGNMENT) float log2_q_[MAX_ROWS][MAX_HEAD];  // q * softmax scale * log2(e), split
    alignas(ALIGNMENT) float q_in_steps_[MAX_ROWS][MAX_HEAD];
    alignas(ALIGNMENT) float scores_[MAX_ROWS][STRIDE];
    PairBlock weights_[CHUNK];
};

// Tiles of float codecs go to FLOAT.
template <class N, void (*FLOAT)(const AttendArgs&)>
void attend_pairs(const AttendArgs& a) {
    using I = typename N::I;
    const RowBounds rows(a);
    VisibleTile chunks[2][CHUNK];
    size_t next = 0;
    int n = collect_visible<I>(a, rows, next, chunks[0]);
    if (n == 0) return;
    PairAttend<N> pairs(a, chunks[0][0].layout->head_size);
    for (int side = 0; n > 0; side ^= 1) {
        const VisibleTile *chunk = chunks[side], *after = chunks[side ^ 1];
        const int num_next = collect_visible<I>(a, rows, next, chunks[side ^ 1]);
        const int num_after = num_next > 0 ? num_next : collect_next<I>(a, chunks[side ^ 1]);
        for (int i = 0, end; i < n; i = end) {
            for (end = i + 1; end < n && chunk[end].layout == chunk[i].layout;) ++end;
            if (PairAttend<N>::supports(*chunk[i].layout))
                pairs.run(chunk + i, end - i, rows, after + i, num_after - i);
            else
                attend_visible(FLOAT, a, chunk + i, end - i, after, num_after);
        }
        n = num_next;
    }
}

}  // namespace
}  // namespace crush
