// Scores of a staged prompt with AMX bf16 products. One factor is keys as they lie in their blocks, 16 tokens by 32
// channels. The other is 16 query rows, each number split into up to three bf16 parts with the same sum, so that logits
// are as precise as with float32. Tokens are rows of a product and query rows its lanes: powers and sums run down the
// tokens without shuffles; only the last step, over the query rows, crosses lanes.
//
// Products are interleaved with the powers of the block before: one after the other, they took 1.3 times as long. (For
// some 100 cycles after a tile instruction port 5 does no multiplications of 512 bits. Powers from a table, which avoid
// them, are not worth it: 1.03 times.) The powers of 16 rows are kept until their sum over all tokens is known: 512 KB
// for 8192 tokens, which stay in the L2 cache. Computing products and powers a second time instead, one range of tokens
// after the other, takes 1.3 times as long there (1.6 times where queries have three parts), but 0.7 times for 32768
// tokens.
#include "kernels/amx_tiles.hpp"
#include "kernels/visibility.hpp"

namespace crush {

void staged_scores_amx(const StagedScores&);

namespace {

using I = SimdAvx512;
using V = I::V;

constexpr int LANES = STAGED_LANES;
constexpr int MAX_STEPS = 8;             // of 32 channels
constexpr int MAX_PARTS = 3;             // bf16 parts of a number of a query
constexpr int GROUPS = TILE / 4;         // of four tokens, in a block
constexpr size_t POWERS = TILE * LANES;  // of a block
constexpr float FLOOR = -1e30f;          // the maximum of a row that saw nothing so far

// Tile registers: the products of 16 tokens, and of the next 16; their factors.
enum { PRODUCTS, PRODUCTS_2, KEYS, KEYS_2, QUERIES };

// 16 query rows as factors of products.
class Queries {
public:
    explicit Queries(int head_size) : size_(head_size), steps_((head_size + 31) / 32) {}

    int steps() const { return steps_; }
    int parts() const { return parts_; }
    int row_bytes() const { return 2 * size_; }
    // The first channel of a step. The last step may overlap the one before; queries of shared channels are 0 in it.
    int channel(int step) const { return 32 * step + 32 <= size_ ? 32 * step : size_ - 32; }
    const uint32_t* factor(int step, int part) const { return factors_[step][part]; }

    // Sets row `lane` to q * sign, or to zeros where q is null. Call for lane 0 first.
    void set(int lane, const float* q, float sign) {
        const __m512i pairs = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        if (lane == 0) parts_ = 1;
        for (int step = 0; step < steps_; ++step) {
            V low = I::set1(0), high = I::set1(0);
            if (q && channel(step) == 32 * step) low = I::mul(I::load(q + channel(step)), I::set1(sign));
            if (q) high = I::mul(I::load(q + channel(step) + 16), I::set1(sign));
            for (int part = 0; part < MAX_PARTS; ++part) {
                const __m512i left = _mm512_castps_si512(_mm512_or_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
                if (part >= parts_ && _mm512_test_epi32_mask(left, left)) parts_ = part + 1;
                const __m256i first = take_bf16(low), second = take_bf16(high);
                _mm512_i32scatter_epi32(factors_[step][part] + lane, _mm512_slli_epi32(pairs, 4),
                                        _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1), 4);
            }
        }
    }

private:
    // Returns the nearest bf16 numbers and subtracts them from x.
    static __m256i take_bf16(V& x) {
        const __m512i taken = I::nearest_bf16(x);
        x = I::sub(x, _mm512_castsi512_ps(_mm512_slli_epi32(taken, 16)));
        return _mm512_cvtepi32_epi16(taken);
    }

    const int size_, steps_;
    int parts_ = 1;
    alignas(ALIGNMENT) uint32_t factors_[MAX_STEPS][MAX_PARTS][16 * LANES];  // [pair of channels][lane]
};

// The products of a block with 16 query rows, interleaved with other work.
class Products {
public:
    explicit Products(const Queries& queries) : queries_(queries), num_products_(queries.steps() * queries.parts()) {}

    // Of the block at `keys`, or of none (null). The block at `next_keys` is prefetched meanwhile.
    void begin(const uint8_t* keys, const uint8_t* next_keys) {
        keys_ = keys;
        next_keys_ = next_keys;
        step_ = keys ? 0 : queries_.steps();
        part_ = due_ = 0;
        tile_zero<PRODUCTS>();
        tile_zero<PRODUCTS_2>();
    }
    // Prefetches and multiplies a share: all of it after GROUPS calls.
    void interleave() {
        const int lines = queries_.row_bytes() / 16;
        for (int i = 0; i < lines; ++i, next_keys_ += ALIGNMENT)
            _mm_prefetch(reinterpret_cast<const char*>(next_keys_), _MM_HINT_T0);
        for (due_ += num_products_; due_ >= GROUPS; due_ -= GROUPS) multiply_next();
    }
    // logits: [32 tokens][16 rows]
    void finish(float* logits) {
        if (!keys_) return;
        while (step_ < queries_.steps()) multiply_next();
        tile_store<PRODUCTS>(logits);
        tile_store<PRODUCTS_2>(logits + 16 * LANES);
    }

private:
    void multiply_next() {
        if (step_ == queries_.steps()) return;
        if (part_ == 0) {
            const uint8_t* keys = keys_ + 2 * queries_.channel(step_);
            tile_load<KEYS>(keys, queries_.row_bytes());
            tile_load<KEYS_2>(keys + 16 * queries_.row_bytes(), queries_.row_bytes());
        }
        tile_load<QUERIES>(queries_.factor(step_, part_), 64);
        multiply_bf16<PRODUCTS, KEYS, QUERIES>();
        multiply_bf16<PRODUCTS_2, KEYS_2, QUERIES>();
        if (++part_ == queries_.parts()) {
            part_ = 0;
            ++step_;
        }
    }

    const Queries& queries_;
    const int num_products_;
    const uint8_t *keys_ = nullptr, *next_keys_ = nullptr;
    int step_ = 0, part_ = 0, due_ = 0;
};

struct NoProducts {
    void interleave() {}
};

// Sums (or maxima) over groups of 4 lanes, of 4 tokens: token t of group g in lane 4 g + t.
template <class F>
inline V reduce_groups(const V* x, F f) {
    const __m512d a = _mm512_castps_pd(f(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1])));
    const __m512d b = _mm512_castps_pd(f(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3])));
    return f(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}
// Those of 16 tokens by token, to registers of one group each.
inline void transpose_groups(V* x) {
    const V a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
    const V c = _mm512_shuffle_f32x4(x[2], x[3], 0x44), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_f32x4(a, c, 0x88);
    x[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
    x[2] = _mm512_shuffle_f32x4(b, d, 0x88);
    x[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

// How the probabilities of the rows of a head are reduced.
struct Mean : Add {
    static V of(V p) { return p; }
};
struct Greatest : Max {
    static V of(V p) { return p; }
};
struct SumSquares : Add {
    static V of(V p) { return I::mul(p, p); }
};

class Scorer {
public:
    explicit Scorer(const StagedScores& args)
        : args_(args), queries_(args.head_size), tokens_(static_cast<int64_t>(args.num_tokens)) {
        const float scale = args.scale * LOG2E;
        sign_ = scale < 0 ? -1.f : scale > 0 ? 1.f : 0.f;  // to the queries: the largest logit has the largest power
        scale_ = scale == 0 ? 1.f : scale * sign_;
        const auto at = reinterpret_cast<uintptr_t>(args.scratch);
        powers_ = args.scratch + (ALIGNMENT - at % ALIGNMENT) % ALIGNMENT / sizeof(float);
        references_ = powers_ + (args.num_tokens + TILE - 1) / TILE * POWERS;
    }

    void run() {
        const int lanes = args_.num_heads * staged_lanes(args_.num_rows);
        for (int first = 0; first < lanes; first += LANES) {
            load_rows(first);
            if (first_block_ == end_block_) continue;
            const V factor = collect_powers();
            if (args_.reduce == Reduce::mean) reduce_rows<Mean>(factor);
            if (args_.reduce == Reduce::max) reduce_rows<Greatest>(factor);
            if (args_.reduce == Reduce::sum_squares) reduce_rows<SumSquares>(factor);
        }
    }

private:
    // Lane i is row first + i, where the rows of each head are padded to a multiple of 4.
    void load_rows(int first) {
        const int padded = staged_lanes(args_.num_rows);
        min_low_ = min_high_ = INT32_MAX;
        max_low_ = max_high_ = INT32_MIN;
        rows_ = 0;
        for (int lane = 0; lane < LANES; ++lane) {
            const int head = (first + lane) / padded, row = (first + lane) % padded;
            const bool is_row = head < args_.num_heads && row < args_.num_rows;
            if (lane % 4 == 0) head_[lane / 4] = is_row ? head : -1;
            low_[lane] = INT32_MIN;
            high_[lane] = INT32_MAX;
            if (is_row) set_bounds(lane, args_.row_position[row]);
            const size_t at = static_cast<size_t>(row) * args_.q_stride + static_cast<size_t>(head * args_.head_size);
            queries_.set(lane, is_row ? args_.q + at : nullptr, sign_);
        }
        first_block_ = end_block_ = 0;
        if (max_high_ < 0 || min_low_ >= tokens_ - 1) return;
        first_block_ = min_low_ < 0 ? 0 : static_cast<size_t>(min_low_ + 1) / TILE;
        end_block_ = static_cast<size_t>(max_high_ < tokens_ ? max_high_ : tokens_ - 1) / TILE + 1;
    }
    void set_bounds(int lane, int32_t position) {
        const int32_t high = position < INT32_MAX ? position : INT32_MAX - 1;
        const int32_t low = args_.window > 0 && high >= INT32_MIN + args_.window ? high - args_.window : INT32_MIN;
        rows_ |= 1u << lane;
        low_[lane] = low;
        high_[lane] = high;
        min_low_ = low < min_low_ ? low : min_low_;
        max_low_ = low > max_low_ ? low : max_low_;
        min_high_ = high < min_high_ ? high : min_high_;
        max_high_ = high > max_high_ ? high : max_high_;
    }

    // Fills powers_, 2^((logit - reference) * scale), and references_ of each block. Returns the factor that turns
    // powers with reference top_ into probabilities (for a mean: into their share of it).
    V collect_powers() {
        const TileSetup setup(whole_tiles());
        Products products(queries_);
        top_ = I::set1(FLOOR);
        V total = I::set1(0);
        for (size_t i = first_block_; i <= end_block_; ++i) {
            const size_t after = i + 1 < end_block_ ? i + 1 : end_block_ - 1;
            products.begin(i < end_block_ ? args_.blocks[i] : nullptr, args_.blocks[after]);
            if (i > first_block_) total = add_block(i - 1, logits_[(i - 1) % 2], total, products);
            products.finish(logits_[i % 2]);
        }
        const V share = I::set1(args_.reduce == Reduce::mean ? 1.f / static_cast<float>(args_.num_rows) : 1.f);
        const __mmask16 sees = _mm512_cmp_ps_mask(total, I::set1(0), _CMP_GT_OQ);
        return _mm512_maskz_div_ps(static_cast<__mmask16>(rows_) & sees, share, total);
    }

    V add_block(size_t block, float* s, V total, Products& products) {
        mask(block, s);
        float* to = powers_ + block * POWERS;
        V sum = I::add(total, take_powers(s, to, products));
        // Any reference works that keeps the powers finite: mostly it stays the maximum of the first block.
        if (_mm512_cmp_ps_mask(sum, I::set1(0x1p80f), _CMP_LT_OQ) != 0xffff) {
            const V before = top_;
            for (int t = 0; t < TILE; ++t) top_ = I::max(I::load(s + t * LANES), top_);
            sum = I::fma(total, ratio(before), take_powers(s, to, NoProducts()));
        }
        I::store(references_ + block * LANES, top_);
        return sum;
    }
    template <class Work>
    V take_powers(const float* s, float* to, Work&& work) const {
        const V scale = I::set1(scale_), shift = I::mul(top_, scale);
        V sum[4] = {I::set1(0), I::set1(0), I::set1(0), I::set1(0)};
#pragma GCC unroll 8
        for (int group = 0; group < GROUPS; ++group, s += 4 * LANES, to += 4 * LANES) {
#pragma GCC unroll 4
            for (int t = 0; t < 4; ++t) {
                const V e = I::exp2(_mm512_fmsub_ps(I::load(s + t * LANES), scale, shift), EXP2_POLY);
                I::store(to + t * LANES, e);
                sum[t] = I::add(e, sum[t]);
            }
            work.interleave();
        }
        return I::add(I::add(sum[0], sum[1]), I::add(sum[2], sum[3]));
    }
    void mask(size_t block, float* s) const {
        const auto begin = static_cast<int32_t>(block) * TILE;
        if (begin > max_low_ && begin + TILE - 1 <= min_high_ && begin + TILE <= tokens_) return;
        const __m512i low = _mm512_load_si512(low_), high = _mm512_load_si512(high_);
        for (int t = 0; t < TILE; ++t, s += LANES) {
            const __m512i at = _mm512_set1_epi32(begin + t);
            const __mmask16 seen = _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask(at, low), at, high);
            I::store(s, _mm512_mask_blend_ps(begin + t < tokens_ ? seen : 0, I::set1(-INF), I::load(s)));
        }
    }
    // The factor that takes powers from this reference to top_.
    V ratio(V reference) const { return I::exp2(I::mul(I::sub(reference, top_), I::set1(scale_)), EXP2_POLY); }

    template <class Reduction>
    void reduce_rows(V factor) const {
        const Reduction f;
        const bool is_one_head = head_[0] == head_[1] && head_[0] == head_[2] && head_[0] == head_[3];
        for (size_t block = first_block_; block < end_block_; ++block) {
            const V reference = I::load(references_ + block * LANES);
            V scaled = factor;
            if (_mm512_cmp_ps_mask(reference, top_, _CMP_NEQ_UQ)) scaled = I::mul(factor, ratio(reference));
            for (size_t at = block * TILE; at < (block + 1) * TILE && at < args_.num_tokens; at += 16) {
                const float* e = powers_ + at * LANES;
                V x[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    V p[4];
#pragma GCC unroll 4
                    for (int t = 0; t < 4; ++t) p[t] = Reduction::of(I::mul(I::load(e + (4 * i + t) * LANES), scaled));
                    x[i] = reduce_groups(p, f);
                }
                transpose_groups(x);
                if (is_one_head) {
                    add(head_[0], at, f(f(x[0], x[1]), f(x[2], x[3])), f);
                    continue;
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
                    if (head_[i] >= 0) add(head_[i], at, x[i], f);
            }
        }
    }
    template <class F>
    void add(int head, size_t at, V x, F f) const {
        float* out = args_.out + static_cast<size_t>(head) * args_.num_tokens + at;
        const size_t left = args_.num_tokens - at;
        const __mmask16 slots = left >= LANES ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        _mm512_mask_storeu_ps(out, slots, f(x, _mm512_maskz_loadu_ps(slots, out)));
    }

    const StagedScores& args_;
    Queries queries_;
    const int64_t tokens_;
    float sign_, scale_;  // of queries, of logits as exponents of 2
    float *powers_, *references_;
    unsigned rows_ = 0;    // which lanes are rows
    int head_[LANES / 4];  // of each 4 lanes, -1: none
    int32_t min_low_ = 0, max_low_ = 0, min_high_ = 0, max_high_ = 0;
    size_t first_block_ = 0, end_block_ = 0;  // what some row sees
    V top_;
    alignas(ALIGNMENT) int32_t low_[LANES], high_[LANES];  // lane i sees positions low < position <= high
    alignas(ALIGNMENT) float logits_[2][POWERS];
};

}  // namespace

void staged_scores_amx(const StagedScores& args) { Scorer(args).run(); }

}  // namespace crush
