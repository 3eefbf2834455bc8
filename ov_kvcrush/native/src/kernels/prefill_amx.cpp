// Attention of a prompt's rows over the blocks that they were staged in, with AMX bf16 products. Query rows are
// columns, so maxima, sums and factors of rows are vectors, and nothing is reduced across lanes:
//   logits [tokens, rows] = keys [tokens, D] . queries [D, rows]
//   out [D, rows] += values [D, tokens] . powers of the logits [tokens, rows]
// Keys are a factor as they lie in their blocks; values are transposed once for all rows of a call.
// Cost for 128 tokens and 32 rows: 64 products of 16 cycles, and 256 registers of powers, some 11 instructions each.
// The products for the rows before and the rows after are interleaved with the powers.
#include "kernels/amx_tiles.hpp"
#include "kernels/visibility.hpp"

namespace crush {

void prefill_amx(const Prefill&);

namespace {

using I = SimdAvx512;
using V = I::V;

constexpr int COLUMNS = PREFILL_COLUMNS;  // query rows of a pass
constexpr int STEP = PREFILL_STEP;        // tokens that they see at a time
constexpr int STEP_BLOCKS = STEP / TILE;
constexpr int PAIRS = 4;              // of tokens, whose powers are computed in a row
constexpr int PRODUCT = 256;          // floats of a tile register
constexpr float FLOOR = -1e30f;       // the reference of a row that saw nothing so far
constexpr float TOO_LARGE = 0x1p80f;  // for a sum of powers: then a row gets another reference
// 2^x on [0, 1), relative error 7.5e-5 (minimax): powers are rounded to bf16, which takes 2e-3
constexpr float SHORT_EXP2_POLY[4] = {0.9999251962f, 0.6958335042f, 0.2260671705f, 0.07802452147f};

// Tile registers: sums of two by two tiles, and the factors.
enum { SUM_00, SUM_01, SUM_10, SUM_11, LEFT, LEFT_2, RIGHT, RIGHT_2 };

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

// Products of a pass with values, then those of another pass with keys, interleaved with other work.
class Products {
public:
    struct Keys {
        const uint8_t* const* blocks;
        const uint32_t* queries;
        float* logits;  // [tokens][COLUMNS], to be written
    };
    struct Values {
        const uint32_t *values, *powers;
        float* out;  // [D][COLUMNS], to be added to
    };
    Products(int head_size, int blocks) : size_(head_size), blocks_(blocks), parts_(head_size / 32) {}

    void add_values(const Values& values) {
        values_ = values;
        left_values_ = 2 * parts_ * blocks_;
        count();
    }
    void add_keys(const Keys& keys) {
        keys_ = keys;
        left_keys_ = 2 * parts_ * blocks_;
        count();
    }
    // Call once for every 2 * PAIRS tokens of 16 rows: all products are made after the tokens of all blocks.
    void interleave() {
        for (due_ += total_; due_ >= calls_; due_ -= calls_) step();
    }
    void finish() {
        while (left_values_ + left_keys_ > 0) step();
        total_ = due_ = 0;
    }

private:
    void count() {
        total_ = left_values_ + left_keys_;
        calls_ = 2 * blocks_ * TILE / (2 * PAIRS);
        due_ = 0;
    }
    void step() {
        if (left_values_ > 0)
            step_values(2 * parts_ * blocks_ - left_values_--);
        else if (left_keys_ > 0)
            step_keys(2 * parts_ * blocks_ - left_keys_--);
    }
    // 32 channels of the sums, over all tokens, a block at a time, 16 channels at a time.
    void step_values(int i) {
        const int c = i / 2 / blocks_ * 32, block = i / 2 % blocks_;
        float* out = values_.out + c * COLUMNS;
        const uint32_t* values = values_.values + c * (STEP / 2) + block * 16;
        if (i % 2 == 0) {
            const uint32_t* powers = values_.powers + block * 16 * COLUMNS;
            if (block == 0) {
                tile_load<SUM_00>(out, 4 * COLUMNS);
                tile_load<SUM_01>(out + 16, 4 * COLUMNS);
                tile_load<SUM_10>(out + 16 * COLUMNS, 4 * COLUMNS);
                tile_load<SUM_11>(out + 16 * COLUMNS + 16, 4 * COLUMNS);
            }
            tile_load<LEFT>(values, 2 * STEP);
            tile_load<RIGHT>(powers, 4 * COLUMNS);
            tile_load<RIGHT_2>(powers + 16, 4 * COLUMNS);
            multiply_upper();
        } else {
            tile_load<LEFT_2>(values + 16 * (STEP / 2), 2 * STEP);
            multiply_lower();
            if (block + 1 == blocks_) store_sums(out);
        }
    }
    // A block, over all channels, 32 at a time, 16 tokens at a time.
    void step_keys(int i) {
        const int block = i / 2 / parts_, part = i / 2 % parts_, row_bytes = 2 * size_;
        const uint8_t* keys = keys_.blocks[block] + 64 * part;
        if (i % 2 == 0) {
            const uint32_t* queries = keys_.queries + 2 * PRODUCT * part;
            if (part == 0) {
                tile_zero<SUM_00>();
                tile_zero<SUM_01>();
                tile_zero<SUM_10>();
                tile_zero<SUM_11>();
            }
            tile_load<LEFT>(keys, row_bytes);
            tile_load<RIGHT>(queries, 64);
            tile_load<RIGHT_2>(queries + PRODUCT, 64);
            multiply_upper();
        } else {
            tile_load<LEFT_2>(keys + 16 * row_bytes, row_bytes);
            multiply_lower();
            if (part + 1 == parts_) store_sums(keys_.logits + block * TILE * COLUMNS);
        }
    }
    static void multiply_upper() {
        multiply_bf16<SUM_00, LEFT, RIGHT>();
        multiply_bf16<SUM_01, LEFT, RIGHT_2>();
    }
    static void multiply_lower() {
        multiply_bf16<SUM_10, LEFT_2, RIGHT>();
        multiply_bf16<SUM_11, LEFT_2, RIGHT_2>();
    }
    static void store_sums(float* to) {
        tile_store<SUM_00>(to, 4 * COLUMNS);
        tile_store<SUM_01>(to + 16, 4 * COLUMNS);
        tile_store<SUM_10>(to + 16 * COLUMNS, 4 * COLUMNS);
        tile_store<SUM_11>(to + 16 * COLUMNS + 16, 4 * COLUMNS);
    }

    const int size_, blocks_, parts_;
    Keys keys_{};
    Values values_{};
    int left_values_ = 0, left_keys_ = 0;  // steps
    int total_ = 0, calls_ = 1, due_ = 0;
};

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
        const TileSetup setup(whole_tiles());
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
        uint32_t* to = queries_ + pass * size_ * COLUMNS / 2;
        for (int c = 0; c < size_; c += 32)
            for (int half = 0; half < 2; ++half, to += PRODUCT) {
                __m512i rows[16];
                for (int i = 0; i < 16; ++i) {
                    const int column = pass * COLUMNS + 16 * half + i;
                    const float* q = args_.q + (column < num_columns_ ? offset(column) + static_cast<size_t>(c) : 0);
                    rows[i] = column < num_columns_ ? to_bf16(I::load(q), I::load(q + 16)) : _mm512_setzero_si512();
                }
                transpose(rows);
                for (int i = 0; i < 16; ++i) _mm512_store_si512(to + 16 * i, rows[i]);
            }
    }

    // values_: [D][STEP] bf16; zeros for tokens that are not there (what lies in their place may be no number)
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
        Products products(size_, blocks);
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
    int last_column(int pass) const {
        const int end = (pass + 1) * COLUMNS;
        return (end < num_columns_ ? end : num_columns_) - 1;
    }
    Products::Keys keys_of(int pass, int64_t token) const {
        return {args_.keys + token / TILE, queries_ + pass * size_ * COLUMNS / 2, logits(pass)};
    }
    Products::Values values_of(int pass) const { return {values_, powers(pass), out_ + pass * size_ * COLUMNS}; }
    float* logits(int pass) const { return logits_ + pass % 2 * STEP * COLUMNS; }
    uint32_t* powers(int pass) const { return powers_ + pass % 2 * STEP / 2 * COLUMNS; }

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
    void take_powers(int pass, int64_t token, int blocks, Products& products) {
        const int column = pass * COLUMNS, n = blocks * TILE;
        const bool is_masked = token + n - 1 > position(column) ||
                               (args_.window > 0 && token <= position(last_column(pass)) - args_.window);
        for (int half = 0; half < 2; ++half) {
            float* s = logits(pass) + 16 * half;
            uint32_t* p = powers(pass) + 16 * half;
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
    V power_pairs(const float* s, uint32_t* p, int n, V shift, Products& products) const {
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
            const V factor = I::div(I::set1(1), I::load(sum_ + first));
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

    const Prefill& args_;
    const int size_, num_columns_, num_passes_;
    const V scale_;
    float *out_, *reference_, *sum_, *logits_;
    uint32_t *powers_, *values_, *queries_;
};

}  // namespace

void prefill_amx(const Prefill& args) { Prefiller(args).run(); }

}  // namespace crush
