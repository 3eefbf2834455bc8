// AMX tile registers, and what prepares their contents. (No standard library: see attend_impl.hpp)
#pragma once

#include "kernels.hpp"
#include "simd_avx512.hpp"

namespace crush {
namespace {

struct alignas(ALIGNMENT) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// The tile instructions as functions of register numbers. (GCC's own do not tell the compiler that they read and write
// memory.)
template <int REGISTER>
inline void tile_load(const void* from, int stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(static_cast<long>(stride)), "i"(REGISTER)
                     : "memory");
}
template <int REGISTER>
inline void tile_store(void* to, int stride = 64) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(static_cast<long>(stride)), "i"(REGISTER)
                     : "memory");
}
template <int REGISTER>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}
// sums += left * codes, of bytes into int32: left is unsigned or signed.
template <int SUMS, int LEFT, int CODES>
inline void multiply_unsigned() {
    __asm__ volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(CODES));
}
template <int SUMS, int LEFT, int CODES>
inline void multiply_signed() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(CODES));
}

// sums += left * codes, of pairs of bf16 into float32.
template <int SUMS, int LEFT, int CODES>
inline void multiply_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(CODES));
}

// Tile registers. A 24-bit integer is three bytes: 1 and 0 are two rows (2r, 2r + 1) of a low left factor, 2 one of a
// high one.
enum { LOW_SUMS, LOW_SUMS_2, HIGH_SUMS, HIGH_SUMS_2, LOW, HIGH, CODES, CODES_2 };

// What one product sums over: channels of a key, or tokens of two tiles. A product takes as long for half of it.
constexpr int DEPTH = 64;

// Sets the tile registers up, and puts back on destruction what other code of this thread had set.
class TileSetup {
public:
    explicit TileSetup(const TileConfig& config) {
        __asm__ volatile("sttilecfg %0" : "=m"(before_));
        __asm__ volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileSetup() {
        if (before_.palette == 0)
            __asm__ volatile("tilerelease");
        else
            __asm__ volatile("ldtilecfg %0" ::"m"(before_));
    }
    TileSetup(const TileSetup&) = delete;
    TileSetup& operator=(const TileSetup&) = delete;

private:
    TileConfig before_;
};

// All registers of 16 rows of 64 bytes, as products of bf16 have them.
inline TileConfig whole_tiles() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.rows[i] = 16;
        config.row_bytes[i] = 64;
    }
    return config;
}

// For products of `rows` rows of integers with codes.
inline TileConfig digits_config(int rows) {
    TileConfig config;
    const auto set = [&config](int tile, int num_rows, int row_bytes) {
        config.rows[tile] = static_cast<uint8_t>(num_rows);
        config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
    };
    for (int i = 0; i < 2; ++i) {
        set(LOW_SUMS + i, 2 * rows, 64);
        set(HIGH_SUMS + i, rows, 64);
        set(CODES + i, DEPTH / 4, 64);
    }
    set(LOW, 2 * rows, DEPTH);
    set(HIGH, rows, DEPTH);
    return config;
}

// Integers of DEPTH channels (tokens) for each row, cut into bytes.
struct Digits {
    alignas(ALIGNMENT) uint8_t low[2 * MAX_ROWS][DEPTH], high[MAX_ROWS][DEPTH];
};
// Products of them with 16 columns of codes.
struct Sums {
    alignas(ALIGNMENT) int32_t low[2 * MAX_ROWS][16], high[MAX_ROWS][16];
};

// Sums of products of digits with 16 columns of codes, or 32 (both), a few instructions at a time.
class DigitProducts {
public:
    // Products of `blocks` Digits with DEPTH rows of codes each; dwords of 4 rows are `stride` bytes apart. Sums are
    // cleared here and not earlier: idle in between they cost time.
    void start(const Digits* digits, const uint8_t* codes, int stride, bool both, bool clear, int blocks = 1) {
        digits_ = digits;
        codes_ = codes;
        stride_ = stride;
        both_ = both;
        steps_ = 3 * blocks;
        if (!clear) return;
        tile_zero<LOW_SUMS>();
        tile_zero<HIGH_SUMS>();
        tile_zero<LOW_SUMS_2>();
        tile_zero<HIGH_SUMS_2>();
    }
    void step() {
        if (steps_ == 0) return;
        switch (steps_-- % 3) {
            case 0:
                tile_load<LOW>(digits_->low, DEPTH);
                tile_load<CODES>(codes_, stride_);
                multiply_unsigned<LOW_SUMS, LOW, CODES>();
                return;
            case 2:
                tile_load<HIGH>(digits_->high, DEPTH);
                multiply_signed<HIGH_SUMS, HIGH, CODES>();
                if (both_) tile_load<CODES_2>(codes_ + 64, stride_);
                return;
            default:
                if (both_) {
                    multiply_unsigned<LOW_SUMS_2, LOW, CODES_2>();
                    multiply_signed<HIGH_SUMS_2, HIGH, CODES_2>();
                }
                ++digits_;
                codes_ += DEPTH / 4 * stride_;
        }
    }
    void finish() {
        while (steps_ > 0) step();
    }
    static void store(Sums* sums, bool both) {
        tile_store<LOW_SUMS>(sums[0].low);
        tile_store<HIGH_SUMS>(sums[0].high);
        if (!both) return;
        tile_store<LOW_SUMS_2>(sums[1].low);
        tile_store<HIGH_SUMS_2>(sums[1].high);
    }

private:
    const Digits* digits_ = nullptr;
    const uint8_t* codes_ = nullptr;
    int stride_ = 0, steps_ = 0;
    bool both_ = false;
};

// Cuts floats of [2^23, 2^24) - their mantissas are the integers - into bytes: four byte permutations for 32 of them.
class Cutter {
public:
    // The half of the integers of `row`.
    void cut(__m512 x, __m512 y, Digits& digits, int row, int half, __m256i high_offset) const {
        const __m512i a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
        const __m512i low =
            _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(low_, a), 0xffff0000ffff0000u, low_, b);
        const __m512i top = _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(high_, a), 0xffff0000u, high_, b);
        const auto store = [half](uint8_t* to, __m256i bytes) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(to) + half, bytes);
        };
        store(digits.low[2 * row], _mm512_castsi512_si256(low));
        store(digits.low[2 * row + 1], _mm512_extracti64x4_epi64(low, 1));
        store(digits.high[row], _mm256_sub_epi8(_mm512_castsi512_si256(top), high_offset));
    }

private:
    static __m512i index(int lower, int upper) {
        const __m128i first = _mm_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
        const __m256i x = _mm256_broadcastsi128_si256(_mm_add_epi8(first, _mm_set1_epi8(static_cast<char>(lower))));
        const __m256i y = _mm256_broadcastsi128_si256(_mm_add_epi8(first, _mm_set1_epi8(static_cast<char>(upper))));
        return _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
    }
    const __m512i low_ = index(1, 0), high_ = index(2, 2);
};

struct Add {
    __m512 operator()(__m512 x, __m512 y) const { return _mm512_add_ps(x, y); }
};
struct Max {
    __m512 operator()(__m512 x, __m512 y) const { return _mm512_max_ps(x, y); }
};

// Over the lanes of each of 8 registers.
template <class F>
inline __m256 reduce8(const __m512* x, F f) {
    __m512 four[4], two[2];
    for (int i = 0; i < 4; ++i)
        four[i] = f(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 2; ++i) {
        const __m512d a = _mm512_castps_pd(four[2 * i]), b = _mm512_castps_pd(four[2 * i + 1]);
        two[i] = f(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 one = f(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
    const __m512 all = f(one, _mm512_shuffle_f32x4(one, one, 0xb1));  // 128-bit lanes 0 and 2 are complete
    return _mm256_set_m128(_mm512_extractf32x4_ps(all, 2), _mm512_castps512_ps128(all));
}

}  // namespace
}  // namespace crush
