// Attention over quantised tiles with AMX int8 products. The codes are multiplied as they lie in memory; the other
// factor (q * key scale, p * value scale) becomes a 16-bit integer, whose two bytes are two rows of the product.
// docs/kv_store.md bounds the rounding error. Float tiles and heads below 32 channels go to the AVX-512 kernels.
//
// Cost of a tile for 7 rows of 64 channels: 6 products of 16 cycles, 10 loads of their factors, some 100 vector
// instructions a row. From the L2 cache 700 to 740 cycles, 590 without the products. Three bytes, and values copied for
// products over 64 tokens, took 1.3 times as long. Codes in the L1 cache would save 0.1 of it, but to prefetch them
// there costs more.
#include "kernels/amx_digits.hpp"
#include "kernels/forward.hpp"
#include "kernels/hadamard.hpp"
#include "kernels/visibility.hpp"

namespace crush {

extern const Kernels KERNELS_AVX512, KERNELS_AMX;
void staged_scores_amx(const StagedScores&);  // scores_amx.cpp
void prefill_amx(const Prefill&);             // prefill_amx.cpp

namespace {

class AmxAttend {
    using I = SimdAvx512;
    using V = I::V;
    static constexpr int MAX_HEAD = 256, BLOCKS = MAX_HEAD / DEPTH, RING = 2;
    // Adding one of these leaves the nearest integer at the end of the mantissa: q * scale + 128 signed, p * scale
    // unsigned.
    static constexpr float KEY_MAGIC = 0xc00080p0f, KEY_RANGE = 32639.f, VALUE_MAGIC = 0x800000p0f,
                           VALUE_RANGE = 65534.f;
    static constexpr float FLOOR = -1e30f;
    static constexpr int UNPACKED = 4 * TILE;    // bytes of a row of 32 columns
    static constexpr float MAX_INVERSE = 1e25f;  // of a step: keeps q . min finite

public:
    static bool supports(const TileLayout& l) {
        return is_quantised(l.key) && is_quantised(l.value) && l.head_size >= TILE;
    }

    AmxAttend(const AttendArgs& args, int head_size)
        : args_(args),
          rows_(args.rows),
          size_(head_size),
          blocks_((head_size + DEPTH - 1) / DEPTH),
          setup_(digits_config(args.rows)) {
        for (int r = 0; r < rows_; ++r)
            for (int c = 0; c < blocks_ * DEPTH; c += 16)
                I::store(scaled_log2_q_[r] + c,
                         c < size_ ? I::mul(I::load(args.q + r * size_ + c), I::set1(LOG2E)) : I::set1(0));
    }

    // Tiles of one layout.
    void run(const VisibleTile* tiles, int n, const RowBounds& rows, TilePrefetcher<I>& prefetcher) {
        scale_queries(tiles, n);
        // Three tiles are in flight at a time: the products of one are interleaved with the vector instructions that
        // prepare the next. Tile instructions in one block would stall these.
        for (int i = 0; i < n + 2; ++i) {
            if (i > 1) combine_scores(scores_[0] + (i - 2) * TILE, bias_[i - 2]);
            if (i > 0 && i <= n) {
                key_products_.start(key_digits_[(i - 1) % RING], key_codes_[i - 1], 4 * TILE, true, blocks_);
                clear_sums(true);
            }
            if (i < n) split_queries(tiles[i], i, prefetcher);
            if (i > 0 && i <= n) {
                key_products_.finish();
                store_sums(sums_, true);
            }
        }
        for (int i = 0; adjusts(args_) && i < n; ++i) adjust<I>(tiles[i], args_, LOG2E, scores_[0] + i * TILE);
        for (int i = 0; i < n; ++i)
            if (tiles[i].masked) mask<I>(tiles[i], rows, rows_, scores_[0] + i * TILE);
        softmax(n * TILE);
        Hadamard<I>::turn_sums(args_, *tiles[0].layout);
        add_values(tiles, n, prefetcher);
    }

private:
    static V f16_at(const uint8_t* p) { return I::load_f16(reinterpret_cast<const uint16_t*>(p)); }

    // q_in_steps_: each row of q in units of a step of its own, chosen so that its products with the largest scales of
    // these tiles are within KEY_RANGE.
    void scale_queries(const VisibleTile* tiles, int n) {
        V bound[MAX_ROWS];
        for (int r = 0; r < MAX_ROWS; ++r) bound[r] = I::set1(0);
        for (int c = 0; c < size_; c += 16) {
            V scale = I::set1(0);
            for (int i = 0; i < n; ++i)
                scale = I::max(f16_at(tiles[i].tile + tiles[i].layout->key_scale + 2 * c), scale);
            for (int r = 0; r < rows_; ++r)
                bound[r] = I::max(I::mul(_mm512_abs_ps(I::load(scaled_log2_q_[r] + c)), scale), bound[r]);
        }
        const __m256 range = _mm256_set1_ps(KEY_RANGE), most = reduce8(bound, Max());
        const __m256 inverse8 = _mm256_min_ps(_mm256_div_ps(range, most), _mm256_set1_ps(MAX_INVERSE));
        alignas(ALIGNMENT) float inverses[MAX_ROWS];
        _mm256_store_ps(inverses, inverse8);
        _mm256_store_ps(step_, _mm256_div_ps(_mm256_set1_ps(1), inverse8));
        for (int r = 0; r < rows_; ++r) {
            const V inverse = I::set1(inverses[r]);
            for (int c = 0; c < blocks_ * DEPTH; c += 16)
                I::store(q_in_steps_[r] + c, I::mul(I::load(scaled_log2_q_[r] + c), inverse));
        }
    }

    // key_digits_[i % RING]: q * scale; bias_[i]: q . min; key_codes_[i]: where the codes are as bytes
    void split_queries(const VisibleTile& v, int i, TilePrefetcher<I>& prefetcher) {
        const TileLayout& l = *v.layout;
        const DigitSplitter splitter;
        const V magic = I::set1(KEY_MAGIC), none = I::set1(0);
        V dot[MAX_ROWS];
        for (int r = 0; r < MAX_ROWS; ++r) dot[r] = none;
        for (int block = 0; block < blocks_; ++block) {
            const int first = block * DEPTH;
            V scale[4], min[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                const int c = first + 16 * k;
                scale[k] = c < size_ ? f16_at(v.tile + l.key_scale + 2 * c) : none;
                min[k] = c < size_ ? f16_at(v.tile + l.key_min + 2 * c) : none;
            }
            KeyDigits& digits = key_digits_[i % RING][block];
#pragma GCC unroll 1
            for (int r = 0; r < rows_; ++r) {
                const float* q = q_in_steps_[r] + first;
                const V x0 = I::load(q), x1 = I::load(q + 16), x2 = I::load(q + 32), x3 = I::load(q + 48);
                splitter.split(I::fma(x0, scale[0], magic), I::fma(x1, scale[1], magic), I::fma(x2, scale[2], magic),
                               I::fma(x3, scale[3], magic), digits, r);
                const V sum = I::fma(x0, min[0], I::fma(x1, min[1], dot[r]));
                dot[r] = I::add(I::fma(x2, min[2], I::mul(x3, min[3])), sum);
                prefetcher.step();
                key_products_.step();
            }
        }
        _mm256_store_ps(bias_[i], _mm256_mul_ps(reduce8(dot, Add()), _mm256_load_ps(step_)));
        key_codes_[i] = key_bytes(v, i % RING);
    }

    void combine_scores(float* s, const float* biases) const {
        for (int r = 0; r < rows_; ++r) {
            const V step = I::set1(step_[r]), bias = I::set1(biases[r]);
            for (int unit = 0; unit < 2; ++unit)
                I::store(s + r * STRIDE + 16 * unit, I::fma(sums_[unit].row(r), step, bias));
        }
    }

    // scores_ = 2^(score - the row's maximum over these n tokens). Sets keep_, the factor of all earlier sums, and
    // weight_, the factor of these tokens. A row that sees none of them has maximum FLOOR, so all its powers are 0.
    void softmax(int n) {
        V top[MAX_ROWS], total[MAX_ROWS];
        for (int r = 0; r < MAX_ROWS; ++r) top[r] = total[r] = I::set1(0);
        for (int r = 0; r < rows_; ++r) {
            V a = I::load(scores_[r]), b = I::load(scores_[r] + 16);
            for (int t = 32; t < n; t += 32) {
                a = I::max(I::load(scores_[r] + t), a);
                b = I::max(I::load(scores_[r] + t + 16), b);
            }
            top[r] = I::max(a, b);
        }
        const __mmask8 rows = static_cast<__mmask8>((1u << rows_) - 1);
        const __m256 floor = _mm256_set1_ps(FLOOR), log2e = _mm256_set1_ps(LOG2E);
        const __m256 seen = reduce8(top, Max()), max = _mm256_max_ps(seen, floor);
        const __m256 old_max = _mm256_max_ps(_mm256_mul_ps(_mm256_maskz_loadu_ps(rows, args_.max), log2e), floor);
        const __m256 new_max = _mm256_max_ps(max, old_max);
        alignas(ALIGNMENT) float shift[MAX_ROWS];
        _mm256_store_ps(shift, max);
        for (int r = 0; r < rows_; ++r) {
            const V row_max = I::set1(shift[r]);
            V sums[2] = {I::set1(0), I::set1(0)};
            for (int t = 0; t < n; t += 32)
                for (int unit = 0; unit < 2; ++unit) {
                    const V e = I::exp2(I::sub(I::load(scores_[r] + t + 16 * unit), row_max), EXP2_POLY);
                    I::store(scores_[r] + t + 16 * unit, e);
                    sums[unit] = I::add(sums[unit], e);
                }
            total[r] = I::add(sums[0], sums[1]);
        }
        const __m512 below =
            _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_sub_ps(old_max, new_max)), _mm256_sub_ps(max, new_max), 1);
        const V factors = I::exp2(below, EXP2_POLY);
        const __m256 keep = _mm512_castps512_ps256(factors), weight = _mm512_extractf32x8_ps(factors, 1);
        _mm256_store_ps(keep_, keep);
        _mm256_store_ps(weight_, weight);
        const __m256 sum =
            _mm256_fmadd_ps(reduce8(total, Add()), weight, _mm256_mul_ps(_mm256_maskz_loadu_ps(rows, args_.sum), keep));
        _mm256_mask_storeu_ps(args_.sum, rows, sum);
        const __mmask8 raised = rows & _mm256_cmp_ps_mask(seen, old_max, _CMP_GT_OQ);
        _mm256_mask_storeu_ps(args_.max, raised, _mm256_div_ps(seen, log2e));
    }

    void add_values(const VisibleTile* tiles, int n, TilePrefetcher<I>& prefetcher) {
        const TileLayout& l = *tiles[0].layout;
        for (int first = 0; first < size_; first += l.group_size) {
            const size_t group = static_cast<size_t>(first / l.group_size) * TILE * 2;
            const float step = weight_step(tiles, n, group);
            V dot[MAX_ROWS];
            for (int r = 0; r < MAX_ROWS; ++r) dot[r] = I::set1(0);
            for (int c = first; c < first + l.group_size; c += 32) {
                const bool both = c + 16 < first + l.group_size;
                clear_sums(both);
                for (int i = 0; i <= n; ++i) {
                    if (i > 0) start_values(tiles[i - 1], i - 1, c, both);
                    if (i < n && c == first) split_weights(tiles[i], i, group, 1 / step, dot, prefetcher);
                    value_products_.finish();
                }
                store_sums(sums_, both);
                if (c == first) _mm256_store_ps(min_sum_, reduce8(dot, Add()));
                for (int r = 0; r < rows_; ++r)
                    for (int unit = 0; unit <= both; ++unit) {
                        float* acc = args_.acc + r * size_ + c + 16 * unit;
                        const V sum = I::fma(sums_[unit].row(r), I::set1(step), I::set1(min_sum_[r]));
                        I::store(acc, I::fma(sum, I::set1(weight_[r]), I::mul(I::load(acc), I::set1(keep_[r]))));
                    }
            }
        }
    }

    // The unit of the integers p * scale, for the group of channels whose scales lie at offset `group`.
    static float weight_step(const VisibleTile* tiles, int n, size_t group) {
        V most = I::set1(0);
        for (int i = 0; i < n; ++i)
            for (int t = 0; t < TILE; t += 16)
                most = I::max(f16_at(tiles[i].tile + tiles[i].layout->value_scale + group + 2 * t), most);
        return I::reduce_max(most) / VALUE_RANGE;
    }

    // value_digits_[i]: p * scale; dot += p * min
    void split_weights(const VisibleTile& v, int i, size_t group, float inverse_step, V* dot,
                       TilePrefetcher<I>& prefetcher) {
        const TileLayout& l = *v.layout;
        const DigitSplitter splitter;
        const V magic = I::set1(VALUE_MAGIC), inverse = I::set1(inverse_step);
        const uint8_t *scale_at = v.tile + l.value_scale + group, *min_at = v.tile + l.value_min + group;
        const V scale0 = I::mul(f16_at(scale_at), inverse), scale1 = I::mul(f16_at(scale_at + 32), inverse);
        const V min0 = f16_at(min_at), min1 = f16_at(min_at + 32);
#pragma GCC unroll 1
        for (int r = 0; r < rows_; ++r) {
            const V p0 = I::load(scores_[r] + i * TILE), p1 = I::load(scores_[r] + i * TILE + 16);
            dot[r] = I::fma(p0, min0, I::fma(p1, min1, dot[r]));
            splitter.split(I::fma(p0, scale0, magic), I::fma(p1, scale1, magic), value_digits_[i], r);
            if (r % 2 == 0) {
                prefetcher.step();
                value_products_.step();
            }
        }
    }

    // The codes as bytes, a dword per 4 channels: in place, or unpacked. The last product may read up to 48 channels
    // beyond the last one (times zero), so the codes are copied where that would be beyond the tile.
    const uint8_t* key_bytes(const VisibleTile& v, int side) {
        const TileLayout& l = *v.layout;
        const uint8_t* codes = v.tile + l.key_codes;
        if (l.key == Codec::u8 && l.key_codes + static_cast<uint32_t>(blocks_ * DEPTH * TILE) <= l.bytes) return codes;
        unpack(l.key, codes, 4 * TILE, size_, true, key_bytes_[side]);
        return key_bytes_[side];
    }
    // Starts the products of 16 or 32 channels, with codes in place or unpacked.
    void start_values(const VisibleTile& v, int i, int channel, bool both) {
        const TileLayout& l = *v.layout;
        const uint8_t* codes = v.tile + l.value_codes + 4 * channel;
        if (l.value == Codec::u8) return value_products_.start(&value_digits_[i], codes, 4 * size_, both);
        unpack(l.value, codes, 4 * size_, TILE, both, value_bytes_);
        value_products_.start(&value_digits_[i], value_bytes_, UNPACKED, both);
    }
    // 16 or 32 columns of a code matrix of `rows` rows, whose rows of dwords are `stride` bytes apart.
    static void unpack(Codec codec, const uint8_t* codes, int stride, int rows, bool both, uint8_t* to) {
        if (codec == Codec::u8) unpack_bits<8>(codes, stride, rows, both, to);
        if (codec == Codec::u4) unpack_bits<4>(codes, stride, rows, both, to);
        if (codec == Codec::u2) unpack_bits<2>(codes, stride, rows, both, to);
    }
    template <int BITS>
    static void unpack_bits(const uint8_t* codes, int stride, int rows, bool both, uint8_t* to) {
        constexpr int QUADS = 8 / BITS;
        const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
        for (int row = 0; row < rows; row += 4 * QUADS, to += QUADS * UNPACKED, codes += stride)
            for (int unit = 0; unit <= both; ++unit) {
                const __m512i x = _mm512_loadu_si512(codes + 64 * unit);
#pragma GCC unroll 4
                for (int j = 0; j < QUADS; ++j)
                    _mm512_store_si512(to + j * UNPACKED + 64 * unit,
                                       QUADS == 1 ? x : _mm512_and_si512(_mm512_srli_epi32(x, BITS * j), mask));
            }
    }

    const AttendArgs& args_;
    const int rows_, size_, blocks_;
    TileSetup setup_;
    KeyProducts key_products_;
    ValueProducts value_products_;
    alignas(ALIGNMENT) float step_[MAX_ROWS];                     // unit of a row of q_in_steps_
    alignas(ALIGNMENT) float keep_[MAX_ROWS], weight_[MAX_ROWS];  // see softmax
    alignas(ALIGNMENT) float bias_[CHUNK][MAX_ROWS];              // q . key min, per tile
    alignas(ALIGNMENT) float min_sum_[MAX_ROWS];                  // p . value min
    alignas(ALIGNMENT) float scaled_log2_q_[MAX_ROWS][STRIDE];    // q * softmax scale * log2(e)
    alignas(ALIGNMENT) float q_in_steps_[MAX_ROWS][STRIDE];
    alignas(ALIGNMENT) float scores_[MAX_ROWS][STRIDE];
    const uint8_t* key_codes_[CHUNK];
    Sums sums_[2];
    KeyDigits key_digits_[RING][BLOCKS];
    ValueDigits value_digits_[CHUNK];
    alignas(ALIGNMENT) uint8_t key_bytes_[RING][MAX_HEAD * TILE];
    alignas(ALIGNMENT) uint8_t value_bytes_[TILE * TILE];  // of 32 channels
};

void attend(const AttendArgs& a) {
    const RowBounds rows(a);
    VisibleTile chunks[2][CHUNK];
    size_t next = 0;
    int n = collect_visible<SimdAvx512>(a, rows, next, chunks[0]);
    if (n == 0) return;
    AmxAttend amx(a, chunks[0][0].layout->head_size);
    for (int side = 0; n > 0; side ^= 1) {
        const VisibleTile* chunk = chunks[side];
        const int num_next = collect_visible<SimdAvx512>(a, rows, next, chunks[side ^ 1]);
        const int num_prefetched = num_next > 0 ? num_next : collect_next<SimdAvx512>(a, chunks[side ^ 1]);
        const TileLayout& l = *chunk[0].layout;
        const int groups = is_quantised(l.value) ? l.head_size / l.group_size : 1;
        TilePrefetcher<SimdAvx512> prefetcher(chunks[side ^ 1], num_prefetched,
                                              n * ((a.rows + 1) / 2) * ((l.head_size + 31) / 32 + groups));
        for (int i = 0, end; i < n; i = end) {
            for (end = i + 1; end < n && chunk[end].layout == chunk[i].layout;) ++end;
            if (AmxAttend::supports(*chunk[i].layout))
                amx.run(chunk + i, end - i, rows, prefetcher);
            else
                attend_visible(KERNELS_AVX512.attend, a, chunk + i, end - i, chunks[side ^ 1], num_prefetched);
        }
        n = num_next;
    }
}

}  // namespace

// The rest gains nothing from tile registers.
const Kernels KERNELS_AMX = forward<KERNELS_AVX512>("amx", &attend, &staged_scores_amx, &prefill_amx);

}  // namespace crush
