// Products of 16-bit integers with codes: an integer is two bytes, which are two rows of the left factor of an AMX
// product. (No standard library: see attend_impl.hpp)
#pragma once

#include "kernels/amx_tiles.hpp"

namespace crush {
namespace {

constexpr int DEPTH = 64;                 // channels that one product sums over
constexpr int DIGIT_ROWS = 2 * MAX_ROWS;  // 2 r: the high bytes of the integers of row r, 2 r + 1: the low bytes

// Tile registers. Keys are multiplied DEPTH channels at a time, values TILE tokens at a time; two times 16 columns.
enum { SUMS, SUMS_2, KEY_DIGITS, KEY_CODES, KEY_CODES_2, VALUE_DIGITS, VALUE_CODES, VALUE_CODES_2 };

inline TileConfig digits_config(int rows) {
    TileConfig config;
    const auto set = [&config](int tile, int num_rows, int row_bytes) {
        config.rows[tile] = static_cast<uint8_t>(num_rows);
        config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
    };
    for (int i = 0; i < 2; ++i) {
        set(SUMS + i, 2 * rows, 64);
        set(KEY_CODES + i, DEPTH / 4, 64);
        set(VALUE_CODES + i, TILE / 4, 64);
    }
    set(KEY_DIGITS, 2 * rows, DEPTH);
    set(VALUE_DIGITS, 2 * rows, TILE);
    return config;
}

// Bytes of 16-bit integers, WIDTH of each row: queries of DEPTH channels, or weights of TILE tokens.
template <int WIDTH>
struct Digits {
    alignas(ALIGNMENT) uint8_t bytes[DIGIT_ROWS][WIDTH];
};
using KeyDigits = Digits<DEPTH>;
using ValueDigits = Digits<TILE>;

// Sums of products with 16 columns of codes, of high and low bytes separately.
struct Sums {
    alignas(ALIGNMENT) int32_t of[DIGIT_ROWS][16];

    // Sums of the 16-bit integers of row r, as the nearest floats.
    __m512 row(int r) const {
        const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(of[2 * r]));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(of[2 * r + 1]));
        return _mm512_fmadd_ps(high, _mm512_set1_ps(256.f), low);
    }
};
// The sums of 16 columns, or 32 (both). Clear them right before use: idle in between they cost time.
inline void clear_sums(bool both) {
    tile_zero<SUMS>();
    if (both) tile_zero<SUMS_2>();
}
inline void store_sums(Sums* sums, bool both) {
    tile_store<SUMS>(sums[0].of);
    if (both) tile_store<SUMS_2>(sums[1].of);
}

// Adds the products of digits with codes, a few instructions at a time between other work.
template <int WIDTH, int DIGITS, int CODES, bool IS_SIGNED>
class Products {
public:
    // `blocks` Digits times 16 columns of codes, or 32 (both); rows of dwords of 4 codes are `stride` bytes apart.
    void start(const Digits<WIDTH>* digits, const uint8_t* codes, int stride, bool both, int blocks = 1) {
        digits_ = digits;
        codes_ = codes;
        stride_ = stride;
        both_ = both;
        steps_ = 2 * blocks;
    }
    void step() {
        if (steps_ == 0) return;
        if (--steps_ % 2) {
            tile_load<DIGITS>(digits_->bytes, WIDTH);
            multiply<SUMS, CODES>(codes_);
        } else {
            if (both_) multiply<SUMS_2, CODES + 1>(codes_ + 64);
            ++digits_;
            codes_ += WIDTH / 4 * stride_;
        }
    }
    void finish() {
        while (steps_ > 0) step();
    }

private:
    template <int TO, int FROM>
    void multiply(const uint8_t* codes) const {
        tile_load<FROM>(codes, stride_);
        if constexpr (IS_SIGNED)
            multiply_signed<TO, DIGITS, FROM>();
        else
            multiply_unsigned<TO, DIGITS, FROM>();
    }

    const Digits<WIDTH>* digits_ = nullptr;
    const uint8_t* codes_ = nullptr;
    int stride_ = 0, steps_ = 0;
    bool both_ = false;
};
using KeyProducts = Products<DEPTH, KEY_DIGITS, KEY_CODES, true>;
using ValueProducts = Products<TILE, VALUE_DIGITS, VALUE_CODES, false>;

// Splits 16-bit integers, which are the ends of the mantissas of floats, into their bytes.
class DigitSplitter {
public:
    // 16 channels each. Both bytes are signed, so the caller has added 128 to each integer.
    void split(__m512 a, __m512 b, __m512 c, __m512 d, KeyDigits& digits, int row) const {
        const __m512i ab = words(a, b), cd = words(c, d);
        const __m512i high = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(high_, ab), UPPER, high_, cd);
        const __m512i low = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(low_, ab), UPPER, low_, cd);
        _mm512_store_si512(digits.bytes[2 * row], high);
        _mm512_store_si512(digits.bytes[2 * row + 1], _mm512_xor_si512(low, _mm512_set1_epi8(-128)));
    }
    // 16 tokens each, unsigned.
    void split(__m512 a, __m512 b, ValueDigits& digits, int row) const {
        _mm512_store_si512(digits.bytes[2 * row], _mm512_permutexvar_epi8(high_low_, words(a, b)));
    }

private:
    static constexpr __mmask64 UPPER = 0xffffffff00000000u;

    // Dword i: the integers of a_i (low half) and b_i (high half).
    static __m512i words(__m512 a, __m512 b) {
        const __m512i upper = _mm512_slli_epi32(_mm512_castps_si512(b), 16);
        return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_castps_si512(a), upper);
    }
    // Byte indices into words(a, b): byte `lower` of every a, then of every b; behind them byte `upper` likewise.
    static __m512i index(int lower, int upper) {
        const __m128i a = _mm_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
        const __m256i both = _mm256_set_m128i(_mm_add_epi8(a, _mm_set1_epi8(2)), a);
        const __m256i x = _mm256_add_epi8(both, _mm256_set1_epi8(static_cast<char>(lower)));
        const __m256i y = _mm256_add_epi8(both, _mm256_set1_epi8(static_cast<char>(upper)));
        return _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
    }
    const __m512i high_ = index(1, 1), low_ = index(0, 0), high_low_ = index(1, 0);
};

}  // namespace
}  // namespace crush
