// Attention of a prompt's rows over the blocks that they were staged in, with products of bf16. Query rows are columns,
// so maxima, sums and factors of rows are vectors, and nothing is reduced across lanes:
//   logits [tokens, rows] = keys [tokens, D] . queries [D, rows]
//   out [D, rows] += values [D, tokens] . powers of the logits [tokens, rows]
// Keys are a factor as they lie in their blocks; values are transposed once for all rows of a call.
// Cost for 128 tokens and 32 rows: 8192 D multiplications in panels, which state theirs, and 256 registers of powers,
// some 11 instructions each. A soft cap takes some 20 more, one of them a division, slopes 3. Where powers rise along the
// tokens by 2^80 and more, as with steep slopes, a step takes them twice.
// P: how a panel of products is computed, see prefill_products.hpp. (No standard library: see attend_impl.hpp)
#pragma once

#include "kernels/prefill_products.hpp"
#include "kernels/visibility.hpp"

namespace crush {
namespace {

using I = SimdAvx512;
using V = I::V;

constexpr int STEP = PREFILL_STEP;  // tokens that rows see at a time
constexpr int STEP_BLOCKS = STEP / TILE;
constexpr int PAIRS = 4;              // of tokens, whose powers are computed in a row
constexpr float FLOOR = -1e30f;       // the reference of a row that saw nothing so far
constexpr float TOO_LARGE = 0x1p80f;  // for a sum of powers: then a row gets another reference
// 2^x on [0, 1), relative error 7.5e-5 (minimax): powers are rounded to bf16, which takes 2e-3
constexpr float SHORT_EXP2_POLY[4] = {0.9999251962f, 0.6958335042f, 0.2260671705f, 0.07802452147f};

// Transposes 16 rows of 16 dwords.
inline void transpose(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // lane l of r[4 i + j]: column 4 l + j of rows 4 i ..
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

inline __m512i to_bf16(V low, V high) {
    const __m256i first = _mm512_cvtepi32_epi16(I::nearest_bf16(low));
    const __m256i second = _mm512_cvtepi32_epi16(I::nearest_bf16(high));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}
// 2^t of t <= 80, 0 for -inf
inline V power(V t) {
    const V f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    V p = I::fma(I::set1(SHORT_EXP2_POLY[3]), f, I::set1(SHORT_EXP2_POLY[2]));
    p = I::fma(p, f, I::set1(SHORT_EXP2_POLY[1]));
    p = I::fma(p, f, I::set1(SHORT_EXP2_POLY[0]));
    return _mm512_scalef_ps(p, t);
}

template <class P>
class Prefiller {
public:
    explicit Prefiller(const Prefill& args)
        : args_(args),
          size_(args.head_size),
          num_columns_(args.num_rows * args.group),
          num_passes_((num_columns_ + COLUMNS - 1) / COLUMNS),
          scale_(I::set1(args.scale * LOG2E)) {
        const auto at = reinterpret_cast<uintptr_t>(args.scratch);
        out_ = args.scratch + (ALIGNMENT - at % ALIGNMENT) % ALIGNMENT / sizeof(float);
        reference_ = out_ + num_passes_ * size_ * COLUMNS;
        sum_ = reference_ + num_passes_ * COLUMNS;
        logits_ = sum_ + num_passes_ * COLUMNS;
        powers_ = reinterpret_cast<uint32_t*>(logits_ + 2 * STEP * COLUMNS);
        values_ = powers_ + STEP * COLUMNS;
        queries_ = values_ + size_ * STEP / 2;
    }

    void run() {
        [[maybe_unused]] const typename P::Setup setup{};
        for (int pass = 0; pass < num_passes_; ++pass) begin(pass);
        const int64_t last = int64_t{args_.first_position} + args_.num_rows - 1;
        const int64_t first = args_.window > 0 ? int64_t{args_.first_position} - args_.window + 1 : 0;
        for (int64_t token = (first > 0 ? first : 0) / STEP * STEP; token <= last; token += STEP) {
            const int64_t left = (last - token) / TILE + 1;
            const int blocks = left < STEP_BLOCKS ? static_cast<int>(left) : STEP_BLOCKS;
            transpose_values(token, blocks);
            attend_step(token, blocks);
        }
        for (int pass = 0; pass < num_passes_; ++pass) finish(pass);
    }

private:
    int64_t position(int column) const { return int64_t{args_.first_position} + column / args_.group; }
    size_t offset(int column) const {
        return static_cast<size_t>(column / args_.group) * args_.stride +
               static_cast<size_t>(column % args_.group * size_);
    }

    // Columns beyond the last are queries of zeros, and are not written.
    void begin(int pass) {
        float* out = out_ + pass * size_ * COLUMNS;
        for (int i = 0; i < size_ * COLUMNS; i += 16) I::store(out + i, I::set1(0));
        for (int i = 0; i < COLUMNS; i += 16) {
            I::store(reference_ + pass * COLUMNS + i, I::set1(FLOOR));
            I::store(sum_ + pass * COLUMNS + i, I::set1(0));
        }
        uint32_t* to = queries_ + pass * size_ * COLUMNS / 2;  // pairs of channels: [D / 2][COLUMNS]
        for (int c = 0; c < size_; c += 32, to += 16 * COLUMNS)
            for (int half = 0; half < 2; ++half) {
                __m512i rows[16];
                for (int i = 0; i < 16; ++i) {
                    const int column = pass * COLUMNS + 16 * half + i;
                    const float* q = args_.q + (column < num_columns_ ? offset(column) + static_cast<size_t>(c) : 0);
                    rows[i] = column < num_columns_ ? to_bf16(I::load(q), I::load(q + 16)) : _mm512_setzero_si512();
                }
                transpose(rows);
                for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * COLUMNS + 16 * half, rows[i]);
            }
    }

    // values_: [D][STEP] bf16, so pairs of tokens; zeros for tokens that are not there (what lies in their place may be
    // no number)
    void transpose_values(int64_t token, int blocks) {
        for (int block = 0; block < blocks; ++block) {
            const uint8_t* from = args_.values[token / TILE + block];
            const int64_t count = static_cast<int64_t>(args_.num_tokens) - token - block * TILE;
            for (int c = 0; c < size_; c += 16) {
                const auto row = [&](int t) {
                    const uint8_t* at =
                        from + 2 * (static_cast<size_t>(t) * static_cast<size_t>(size_) + static_cast<size_t>(c));
                    return t < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))
                                     : _mm512_setzero_si512();
                };
                __m512i pairs[16];
                for (int i = 0; i < 16; ++i)
                    pairs[i] = _mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16));
                transpose(pairs);
                for (int i = 0; i < 16; ++i) _mm512_store_si512(values_ + (c + i) * (STEP / 2) + block * 16, pairs[i]);
            }
        }
    }

    // All rows that see some of these tokens.
    void attend_step(int64_t token, int blocks) {
        int begin = 0, end = num_passes_;
        while (begin < end && position(last_column(begin)) < token) ++begin;
        if (args_.window > 0)
            while (end > begin && position((end - 1) * COLUMNS) - args_.window >= token + blocks * TILE - 1) --end;
        if (begin == end) return;
        Products<P> products(size_, blocks, calls_in(blocks));
        products.add_keys(keys_of(begin, token));
        products.finish();
        for (int pass = begin; pass < end; ++pass) {
            if (pass > begin) products.add_values(values_of(pass - 1));
            if (pass + 1 < end) products.add_keys(keys_of(pass + 1, token));
            take_powers(pass, token, blocks, products);
            products.finish();
        }
        products.add_values(values_of(end - 1));
        products.finish();
    }
    static constexpr int calls_in(int blocks) { return 2 * blocks * TILE / (2 * PAIRS); }  // of interleave in a pass
    int last_column(int pass) const {
        const int end = (pass + 1) * COLUMNS;
        return (end < num_columns_ ? end : num_columns_) - 1;
    }
    typename Products<P>::Keys keys_of(int pass, int64_t token) const {
        return {args_.keys + token / TILE, queries_ + pass * size_ * COLUMNS / 2, logits(pass)};
    }
    typename Products<P>::Values values_of(int pass) const {
        return {values_, powers(pass), out_ + pass * size_ * COLUMNS};
    }
    float* logits(int pass) const { return logits_ + pass % 2 * STEP * COLUMNS; }
    uint32_t* powers(int pass) const { return powers_ + pass % 2 * STEP / 2 * COLUMNS; }

    float of_column(const float* of_heads, int column) const { return of_heads[column % args_.group]; }

    // What some models make of the scores of 16 columns, which are still to be multiplied by the scale.
    void adjust(int column, int64_t token, int n, float* s) const {
        alignas(ALIGNMENT) float slope[16] = {}, behind[16];
        for (int i = 0; i < 16; ++i) {
            if (args_.slopes) slope[i] = of_column(args_.slopes, column + i) / args_.scale;
            behind[i] = static_cast<float>(token - position(column + i));
        }
        const V slopes = I::load(slope), one = I::set1(1);
        V distance = I::load(behind);
        for (int t = 0; t < n; ++t, s += COLUMNS, distance = I::add(distance, one)) {
            V x = I::load(s);
            if (args_.soft_cap > 0) x = soft_capped<I>(x, args_.soft_cap / args_.scale);
            I::store(s, I::fma(slopes, distance, x));
        }
    }

    // -inf where one of 16 columns does not see a token
    void mask(int column, int64_t token, int n, float* s) const {
        alignas(ALIGNMENT) int32_t high[16], low[16];
        for (int i = 0; i < 16; ++i) {
            const int64_t at = position(column + i);
            high[i] = static_cast<int32_t>(at);
            low[i] = args_.window > 0 ? static_cast<int32_t>(at - args_.window) : -1;
        }
        const __m512i highs = _mm512_load_si512(high), lows = _mm512_load_si512(low);
        for (int t = 0; t < n; ++t, s += COLUMNS) {
            const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(token) + t);
            const __mmask16 seen = _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask(at, lows), at, highs);
            I::store(s, _mm512_mask_blend_ps(seen, I::set1(-INF), I::load(s)));
        }
    }

    // powers_: 2^((logit - reference) * scale), pairs of tokens as bf16; sum_ is added to. A row's reference is the
    // maximum of the first step that it sees anything of, and stays as long as its powers are not too large. No column
    // depends on its neighbours: how a prompt is cut into steps of the engine changes no result.
    void take_powers(int pass, int64_t token, int blocks, Products<P>& products) {
        const int column = pass * COLUMNS, n = blocks * TILE;
        const bool is_masked = token + n - 1 > position(column) ||
                               (args_.window > 0 && token <= position(last_column(pass)) - args_.window);
        const bool is_adjusted = args_.soft_cap > 0 || args_.slopes;
        for (int half = 0; half < 2; ++half) {
            float* s = logits(pass) + 16 * half;
            uint32_t* p = powers(pass) + 16 * half;
            if (is_adjusted) adjust(column + 16 * half, token, n, s);
            if (is_masked) mask(column + 16 * half, token, n, s);
            float *reference = reference_ + column + 16 * half, *sum = sum_ + column + 16 * half;
            V top = I::load(reference), total = I::load(sum);
            const __mmask16 fresh = _mm512_cmp_ps_mask(top, I::set1(FLOOR), _CMP_EQ_OQ);
            if (fresh) top = _mm512_mask_mov_ps(top, fresh, maximum(s, n));
            V added = power_pairs(s, p, n, I::mul(top, scale_), products);
            const __mmask16 large = _mm512_cmp_ps_mask(I::add(total, added), I::set1(TOO_LARGE), _CMP_NLT_UQ);
            if (large) {
                products.finish();  // of `out`, if the pass before is this one
                const V before = top;
                top = _mm512_mask_mov_ps(top, large, I::max(maximum(s, n), top));
                const V factor = power(I::mul(I::sub(before, top), scale_));
                total = _mm512_mask_mul_ps(total, large, total, factor);
                float* out = out_ + pass * size_ * COLUMNS + 16 * half;
                for (int c = 0; c < size_; ++c, out += COLUMNS)
                    I::store(out, _mm512_mask_mul_ps(I::load(out), large, I::load(out), factor));
                added = power_pairs(s, p, n, I::mul(top, scale_), products);
            }
            I::store(reference, top);
            I::store(sum, I::add(total, added));
        }
    }
    static V maximum(const float* s, int n) {
        V top[2] = {I::set1(FLOOR), I::set1(FLOOR)};
        for (int t = 0; t < n; t += 2)
            for (int i = 0; i < 2; ++i) top[i] = I::max(I::load(s + (t + i) * COLUMNS), top[i]);
        return I::max(top[0], top[1]);
    }
    V power_pairs(const float* s, uint32_t* p, int n, V shift, Products<P>& products) const {
        V sum[2] = {I::set1(0), I::set1(0)};
        const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        for (int t = 0; t < n; t += PAIRS * 2) {
#pragma GCC unroll 4
            for (int i = 0; i < PAIRS; ++i, s += 2 * COLUMNS, p += COLUMNS) {
                const V x = power(_mm512_fmsub_ps(I::load(s), scale_, shift));
                const V y = power(_mm512_fmsub_ps(I::load(s + COLUMNS), scale_, shift));
                sum[0] = I::add(sum[0], x);
                sum[1] = I::add(sum[1], y);
                const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), half), 16);
                const __m512i high = _mm512_add_epi32(_mm512_castps_si512(y), half);
                _mm512_store_si512(p, _mm512_ternarylogic_epi32(upper, high, low, 0xca));  // upper ? high : low
            }
            products.interleave();
        }
        return I::add(sum[0], sum[1]);
    }

    void finish(int pass) const {
        for (int half = 0; half < 2; ++half) {
            const int first = pass * COLUMNS + 16 * half;
            const V factor = I::div(I::set1(1), I::add(I::load(sum_ + first), sinks(first)));
            for (int c = 0; c < size_; c += 16) {
                __m512i rows[16];
                for (int i = 0; i < 16; ++i)
                    rows[i] = _mm512_castps_si512(
                        I::mul(I::load(out_ + (pass * size_ + c + i) * COLUMNS + 16 * half), factor));
                transpose(rows);
                for (int i = 0; i < 16 && first + i < num_columns_; ++i)
                    I::store(args_.out + offset(first + i) + c, _mm512_castsi512_ps(rows[i]));
            }
        }
    }

    // What the sinks of 16 columns add to their sums: 0 without them.
    V sinks(int column) const {
        if (!args_.sinks) return I::set1(0);
        alignas(ALIGNMENT) float sink[16];
        for (int i = 0; i < 16; ++i) sink[i] = of_column(args_.sinks, column + i) * LOG2E;
        return power(I::sub(I::load(sink), I::mul(I::load(reference_ + column), scale_)));
    }

    const Prefill& args_;
    const int size_, num_columns_, num_passes_;
    const V scale_;
    float *out_, *reference_, *sum_, *logits_;
    uint32_t *powers_, *values_, *queries_;
};

}  // namespace
}  // namespace crush
