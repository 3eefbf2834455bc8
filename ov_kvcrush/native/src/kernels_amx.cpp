// Attention over quantised tiles with AMX int8 products. The codes are multiplied as they lie in memory; the other
// factor (q * key scale, p * value scale) becomes a 24-bit integer, three bytes of which are three rows of the product.
// So the sums are exact and the result is as precise as with float32, at a fraction of the arithmetic: decoding runs at
// memory speed. Float tiles and tiny heads go to the AVX-512 kernels.
#include "amx_tiles.hpp"
#include "visibility.hpp"

namespace crush {

extern const Kernels KERNELS_AVX512, KERNELS_AMX;
void staged_scores_amx(const StagedScores&);  // scores_amx.cpp

namespace {

class AmxAttend {
    using I = SimdAvx512;
    using V = I::V;
    static constexpr int MAX_HEAD = 256, BLOCKS = MAX_HEAD / TILE, RING = 3;
    // |q * scale| as an integer is below 2^22 (stored plus 2^22), p * scale below 2^23.
    static constexpr float KEY_MAGIC = 12582912.f, KEY_RANGE = 4.19e6f, VALUE_MAGIC = 8388608.f, VALUE_RANGE = 8.38e6f;
    static constexpr float FLOOR = -1e30f;

public:
    static bool takes(const TileLayout& l) {
        return is_quantised(l.key) && is_quantised(l.value) && l.head_size >= TILE;
    }

    AmxAttend(const AttendArgs& a, int head_size)
        : a_(a), rows_(a.rows), size_(head_size), setup_(digits_config(a.rows)) {
        for (int r = 0; r < rows_; ++r)
            for (int c = 0; c < size_; c += 16)
                I::store(q_[r] + c, I::mul(I::load(a.q + r * size_ + c), I::set1(LOG2E)));
        for (int r = 0; r < rows_; ++r)  // may be used beyond the head size
            for (int c = size_; c < size_ + 16; c += 16) {
                I::store(q_[r] + c, I::set1(0));
                I::store(scaled_q_[r] + c, I::set1(0));
            }
    }

    // Tiles of one layout.
    void run(const Visible* tiles, int n, const Rows& rows, Ahead<I>& ahead) {
        scale_queries(tiles, n);
        // Three tiles are on their way at a time: the tile unit and the vector units work side by side, and a tile load
        // comes long after the stores of what it loads (it cannot take it from the store buffer).
        for (int i = 0; i < n + 2; ++i) {
            if (i < n) split_queries(tiles[i], i % RING, ahead);
            if (i > 1) combine_scores(s_[0] + (i - 2) * TILE, (i - 2) % RING);
            if (i > 0 && i <= n) multiply_keys((i - 1) % RING);
        }
        for (int i = 0; i < n; ++i)
            if (tiles[i].masked) mask<I>(tiles[i], rows, rows_, s_[0] + i * TILE);
        softmax(n * TILE);
        add_values(tiles, n, ahead);
    }

private:
    static V f16_at(const uint8_t* p) { return I::load_f16(reinterpret_cast<const uint16_t*>(p)); }

    // Each row of q in units of a step of its own, so that its products with the largest scales of these tiles are in
    // KEY_RANGE.
    void scale_queries(const Visible* tiles, int n) {
        V bound[MAX_ROWS];
        for (int r = 0; r < MAX_ROWS; ++r) bound[r] = I::set1(0);
        for (int c = 0; c < size_; c += 16) {
            V scale = I::set1(0);
            for (int i = 0; i < n; ++i)
                scale = I::max(f16_at(tiles[i].tile + tiles[i].layout->key_scale + 2 * c), scale);
            for (int r = 0; r < rows_; ++r)
                bound[r] = I::max(I::mul(_mm512_abs_ps(I::load(q_[r] + c)), scale), bound[r]);
        }
        const __m256 most = reduce8(bound, Max()), range = _mm256_set1_ps(KEY_RANGE);
        const __mmask8 positive = _mm256_cmp_ps_mask(most, _mm256_setzero_ps(), _CMP_GT_OQ);
        alignas(ALIGNMENT) float inverses[MAX_ROWS];
        _mm256_store_ps(inverses, _mm256_maskz_div_ps(positive, range, most));
        _mm256_store_ps(step_, _mm256_div_ps(most, range));
        for (int r = 0; r < rows_; ++r) {
            const V inverse = I::set1(inverses[r]);
            for (int c = 0; c < size_; c += 16) I::store(scaled_q_[r] + c, I::mul(I::load(q_[r] + c), inverse));
        }
    }

    // key_digits_[side]: q * scale; bias_[side]: q . min; key_codes_[side]: where the codes are as bytes
    void split_queries(const Visible& v, int side, Ahead<I>& ahead) {
        const TileLayout& l = *v.layout;
        const Cutter cutter;
        const V magic = I::set1(KEY_MAGIC), none = I::set1(0);
        const __m256i offset = _mm256_set1_epi8(0x40);  // 2^22 of KEY_MAGIC
        V dot[MAX_ROWS];
        for (int r = 0; r < MAX_ROWS; ++r) dot[r] = none;
        for (int c = 0; c < size_; c += TILE) {
            const uint8_t *scale_at = v.tile + l.key_scale + 2 * c, *min_at = v.tile + l.key_min + 2 * c;
            const bool both = c + 16 < size_;
            const V scale0 = f16_at(scale_at), scale1 = both ? f16_at(scale_at + 32) : none;
            const V min0 = f16_at(min_at), min1 = both ? f16_at(min_at + 32) : none;
            Digits& digits = key_digits_[side][c / TILE];
#pragma GCC unroll 1
            for (int r = 0; r < rows_; ++r) {
                const float *q = q_[r] + c, *scaled = scaled_q_[r] + c;
                dot[r] = I::fma(I::load(q), min0, I::fma(I::load(q + 16), min1, dot[r]));
                cutter.cut(I::fma(I::load(scaled), scale0, magic), I::fma(I::load(scaled + 16), scale1, magic),
                           digits.low[2 * r], digits.high[r], offset);
                if (r % 2 == 0) ahead.step();
            }
        }
        _mm256_store_ps(bias_[side], reduce8(dot, Add()));
        key_codes_[side] = key_bytes(v, side);
    }

    // sums_[side]: key_digits_[side] times key_codes_[side]
    void multiply_keys(int side) {
        const uint8_t* codes = key_codes_[side];
        tile_zero<LOW_SUMS>();
        tile_zero<HIGH_SUMS>();
        tile_zero<LOW_SUMS_2>();
        tile_zero<HIGH_SUMS_2>();
        for (int c = 0; c < size_; c += TILE, codes += TILE * TILE) {
            const Digits& digits = key_digits_[side][c / TILE];
            tile_load<LOW>(digits.low, TILE);
            tile_load<HIGH>(digits.high, TILE);
            tile_load<CODES>(codes, 4 * TILE);
            multiply_unsigned<LOW_SUMS, LOW, CODES>();
            multiply_signed<HIGH_SUMS, HIGH, CODES>();
            tile_load<CODES_2>(codes + 64, 4 * TILE);
            multiply_unsigned<LOW_SUMS_2, LOW, CODES_2>();
            multiply_signed<HIGH_SUMS_2, HIGH, CODES_2>();
        }
        store_sums(sums_[side], true);
    }

    static void store_sums(Sums* sums, bool both) {
        tile_store<LOW_SUMS>(sums[0].low);
        tile_store<HIGH_SUMS>(sums[0].high);
        if (!both) return;
        tile_store<LOW_SUMS_2>(sums[1].low);
        tile_store<HIGH_SUMS_2>(sums[1].high);
    }

    static V combined(const Sums& sums, int r) {
        const V byte1 = _mm512_cvtepi32_ps(_mm512_load_si512(sums.low[2 * r]));
        const V byte0 = _mm512_cvtepi32_ps(_mm512_load_si512(sums.low[2 * r + 1]));
        const V byte2 = _mm512_cvtepi32_ps(_mm512_load_si512(sums.high[r]));
        return I::fma(byte2, I::set1(65536.f), I::fma(byte1, I::set1(256.f), byte0));
    }

    void combine_scores(float* s, int side) {
        for (int r = 0; r < rows_; ++r) {
            const V step = I::set1(step_[r]), bias = I::set1(bias_[side][r]);
            for (int unit = 0; unit < 2; ++unit)
                I::store(s + r * STRIDE + 16 * unit, I::fma(combined(sums_[side][unit], r), step, bias));
        }
    }

    // s = 2^(s - the row's maximum): what was summed before is to be multiplied by keep_, these n tokens by weight_. A
    // row that sees none of them has maximum FLOOR, so all its powers are 0.
    void softmax(int n) {
        V top[MAX_ROWS], total[MAX_ROWS];
        for (int r = 0; r < MAX_ROWS; ++r) top[r] = total[r] = I::set1(0);
        for (int r = 0; r < rows_; ++r) {
            V a = I::load(s_[r]), b = I::load(s_[r] + 16);
            for (int t = 32; t < n; t += 32) {
                a = I::max(I::load(s_[r] + t), a);
                b = I::max(I::load(s_[r] + t + 16), b);
            }
            top[r] = I::max(a, b);
        }
        const __mmask8 rows = static_cast<__mmask8>((1u << rows_) - 1);
        const __m256 floor = _mm256_set1_ps(FLOOR), log2e = _mm256_set1_ps(LOG2E);
        const __m256 seen = reduce8(top, Max()), max = _mm256_max_ps(seen, floor);
        const __m256 old_max = _mm256_max_ps(_mm256_mul_ps(_mm256_maskz_loadu_ps(rows, a_.max), log2e), floor);
        const __m256 new_max = _mm256_max_ps(max, old_max);
        alignas(ALIGNMENT) float shift[MAX_ROWS];
        _mm256_store_ps(shift, max);
        for (int r = 0; r < rows_; ++r) {
            const V row_max = I::set1(shift[r]);
            V sums[2] = {I::set1(0), I::set1(0)};
            for (int t = 0; t < n; t += 32)
                for (int unit = 0; unit < 2; ++unit) {
                    const V e = I::exp2(I::sub(I::load(s_[r] + t + 16 * unit), row_max), EXP2_POLY);
                    I::store(s_[r] + t + 16 * unit, e);
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
            _mm256_fmadd_ps(reduce8(total, Add()), weight, _mm256_mul_ps(_mm256_maskz_loadu_ps(rows, a_.sum), keep));
        _mm256_mask_storeu_ps(a_.sum, rows, sum);
        const __mmask8 raised = rows & _mm256_cmp_ps_mask(seen, old_max, _CMP_GT_OQ);
        _mm256_mask_storeu_ps(a_.max, raised, _mm256_div_ps(seen, log2e));
    }

    void add_values(const Visible* tiles, int n, Ahead<I>& ahead) {
        const TileLayout& l = *tiles[0].layout;
        const uint8_t* codes[CHUNK];
        for (int i = 0; i < n; ++i) codes[i] = value_bytes(tiles[i], i);
        for (int first = 0; first < size_; first += l.group_size) {
            const size_t group = static_cast<size_t>(first / l.group_size) * TILE * 2;
            const float step = weight_step(tiles, n, group);
            V dot[MAX_ROWS];
            for (int r = 0; r < MAX_ROWS; ++r) dot[r] = I::set1(0);
            for (int c = first; c < first + l.group_size; c += 32) {
                const bool both = c + 16 < first + l.group_size;
                tile_zero<LOW_SUMS>();
                tile_zero<HIGH_SUMS>();
                tile_zero<LOW_SUMS_2>();
                tile_zero<HIGH_SUMS_2>();
                for (int i = 0; i <= n; ++i) {
                    if (i < n && c == first) split_weights(tiles[i], i, group, 1 / step, dot, ahead);
                    if (i > 0) multiply_values(value_digits_[i - 1], codes[i - 1] + 4 * c, both);
                }
                store_sums(sums_[0], both);
                if (c == first) _mm256_store_ps(min_sum_, reduce8(dot, Add()));
                for (int r = 0; r < rows_; ++r)
                    for (int unit = 0; unit <= both; ++unit) {
                        float* acc = a_.acc + r * size_ + c + 16 * unit;
                        const V sum = I::fma(combined(sums_[0][unit], r), I::set1(step), I::set1(min_sum_[r]));
                        I::store(acc, I::fma(sum, I::set1(weight_[r]), I::mul(I::load(acc), I::set1(keep_[r]))));
                    }
            }
        }
    }

    // What the integers of p * scale count, for a group of channels at an offset.
    static float weight_step(const Visible* tiles, int n, size_t group) {
        V most = I::set1(0);
        for (int i = 0; i < n; ++i)
            for (int t = 0; t < TILE; t += 16)
                most = I::max(f16_at(tiles[i].tile + tiles[i].layout->value_scale + group + 2 * t), most);
        return I::reduce_max(most) / VALUE_RANGE;
    }

    // value_digits_[i]: p * scale; dot += p * min
    void split_weights(const Visible& v, int i, size_t group, float inverse_step, V* dot, Ahead<I>& ahead) {
        const TileLayout& l = *v.layout;
        const Cutter cutter;
        const V magic = I::set1(VALUE_MAGIC), inverse = I::set1(inverse_step);
        const uint8_t *scale_at = v.tile + l.value_scale + group, *min_at = v.tile + l.value_min + group;
        const V scale0 = I::mul(f16_at(scale_at), inverse), scale1 = I::mul(f16_at(scale_at + 32), inverse);
        const V min0 = f16_at(min_at), min1 = f16_at(min_at + 32);
        Digits& digits = value_digits_[i];
#pragma GCC unroll 1
        for (int r = 0; r < rows_; ++r) {
            const V p0 = I::load(s_[r] + i * TILE), p1 = I::load(s_[r] + i * TILE + 16);
            dot[r] = I::fma(p0, min0, I::fma(p1, min1, dot[r]));
            cutter.cut(I::fma(p0, scale0, magic), I::fma(p1, scale1, magic), digits.low[2 * r], digits.high[r],
                       _mm256_setzero_si256());
            if (r % 2 == 0) ahead.step();
        }
    }

    void multiply_values(const Digits& digits, const uint8_t* codes, bool both) const {
        tile_load<LOW>(digits.low, TILE);
        tile_load<HIGH>(digits.high, TILE);
        tile_load<CODES>(codes, 4 * size_);
        multiply_unsigned<LOW_SUMS, LOW, CODES>();
        multiply_signed<HIGH_SUMS, HIGH, CODES>();
        if (!both) return;
        tile_load<CODES_2>(codes + 64, 4 * size_);
        multiply_unsigned<LOW_SUMS_2, LOW, CODES_2>();
        multiply_signed<HIGH_SUMS_2, HIGH, CODES_2>();
    }

    // The codes as bytes, a dword per 4 channels (tokens): where they lie, or unpacked. The last product may read 16
    // channels beyond (times zero), so keys are copied if that would be beyond the tile.
    const uint8_t* key_bytes(const Visible& v, int side) {
        const TileLayout& l = *v.layout;
        const uint8_t* codes = v.tile + l.key_codes;
        if (l.key == Codec::u8 && l.key_codes + static_cast<uint32_t>((size_ + 16) * TILE) <= l.bytes) return codes;
        unpack(l.key, codes, TILE, size_, key_bytes_[side]);
        return key_bytes_[side];
    }
    const uint8_t* value_bytes(const Visible& v, int i) {
        const TileLayout& l = *v.layout;
        if (l.value == Codec::u8) return v.tile + l.value_codes;
        unpack(l.value, v.tile + l.value_codes, size_, TILE, value_bytes_ + i * TILE * size_);
        return value_bytes_ + i * TILE * size_;
    }
    // A code matrix of `rows` rows and `columns` columns.
    static void unpack(Codec codec, const uint8_t* codes, int columns, int rows, uint8_t* to) {
        if (codec == Codec::u8) std::memcpy(to, codes, static_cast<size_t>(columns * rows));
        if (codec == Codec::u4) unpack_bits<4>(codes, columns, rows, to);
        if (codec == Codec::u2) unpack_bits<2>(codes, columns, rows, to);
    }
    template <int BITS>
    static void unpack_bits(const uint8_t* codes, int columns, int rows, uint8_t* to) {
        constexpr int QUADS = 8 / BITS;
        const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
        for (int row = 0; row < rows; row += 4 * QUADS, to += QUADS * columns * 4)
            for (int c = 0; c < columns; c += 16, codes += 64) {
                const __m512i x = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
                for (int j = 0; j < QUADS; ++j)
                    _mm512_store_si512(to + (j * columns + c) * 4,
                                       _mm512_and_si512(_mm512_srli_epi32(x, BITS * j), mask));
            }
    }

    const AttendArgs& a_;
    const int rows_, size_;
    TileSetup setup_;
    alignas(ALIGNMENT) float step_[MAX_ROWS], keep_[MAX_ROWS], weight_[MAX_ROWS], bias_[RING][MAX_ROWS],
        min_sum_[MAX_ROWS];
    alignas(ALIGNMENT) float q_[MAX_ROWS][STRIDE];
    alignas(ALIGNMENT) float scaled_q_[MAX_ROWS][STRIDE];
    alignas(ALIGNMENT) float s_[MAX_ROWS][STRIDE];
    const uint8_t* key_codes_[RING];
    Sums sums_[RING][2];
    Digits key_digits_[RING][BLOCKS], value_digits_[CHUNK];
    alignas(ALIGNMENT) uint8_t key_bytes_[RING][(MAX_HEAD + 16) * TILE];
    alignas(ALIGNMENT) uint8_t value_bytes_[CHUNK * MAX_HEAD * TILE];
};

void attend_float(const AttendArgs& a, const Visible* chunk, int n, const Visible* after, int num_after) {
    const uint8_t *tiles[CHUNK], *next[CHUNK];
    for (int i = 0; i < n; ++i) tiles[i] = chunk[i].tile;
    for (int i = 0; i < num_after; ++i) next[i] = after[i].tile;
    AttendArgs args = a;
    args.tiles = tiles;
    args.num_tiles = static_cast<size_t>(n);
    args.next_tiles = next;
    args.num_next = static_cast<size_t>(num_after);
    KERNELS_AVX512.attend(args);
}

void attend(const AttendArgs& a) {
    const Rows rows(a);
    Visible chunks[2][CHUNK];
    size_t next = 0;
    int n = collect<SimdAvx512>(a, rows, next, chunks[0]);
    if (n == 0) return;
    AmxAttend amx(a, chunks[0][0].layout->head_size);
    for (int side = 0; n > 0; side ^= 1) {
        const Visible* chunk = chunks[side];
        const int num_next = collect<SimdAvx512>(a, rows, next, chunks[side ^ 1]);
        const int num_ahead = num_next > 0 ? num_next : peek<SimdAvx512>(a, chunks[side ^ 1]);
        const TileLayout& l = *chunk[0].layout;
        const int groups = is_quantised(l.value) ? l.head_size / l.group_size : 1;
        Ahead<SimdAvx512> ahead(chunks[side ^ 1], num_ahead,
                                n * ((a.rows + 1) / 2) * ((l.head_size + 31) / 32 + groups));
        for (int i = 0, end; i < n; i = end) {
            for (end = i + 1; end < n && chunk[end].layout == chunk[i].layout;) ++end;
            if (AmxAttend::takes(*chunk[i].layout))
                amx.run(chunk + i, end - i, rows, ahead);
            else
                attend_float(a, chunk + i, end - i, chunks[side ^ 1], num_ahead);
        }
        n = num_next;
    }
}

// The rest is not worth tiles. (Forwarded by functions: another file's constants may be initialised later.)
void scores(const uint8_t* const* tiles, size_t num_tiles, const float* q, int rows, float* s, size_t stride) {
    KERNELS_AVX512.scores(tiles, num_tiles, q, rows, s, stride);
}
void softmax(float* s, size_t n) { KERNELS_AVX512.softmax(s, n); }
void encode(uint8_t* tile, const float* k, size_t k_stride, const float* v, size_t v_stride, int count) {
    KERNELS_AVX512.encode(tile, k, k_stride, v, v_stride, count);
}
void decode(const uint8_t* tile, float* k, float* v) { KERNELS_AVX512.decode(tile, k, v); }
void put(uint8_t* tile, int slot, const float* k, const float* v) { KERNELS_AVX512.put(tile, slot, k, v); }

}  // namespace

const Kernels KERNELS_AMX = {"amx", &attend, &scores, &softmax, &encode, &decode, &put, &staged_scores_amx};

}  // namespace crush
