// AMX tile registers and their instructions, and reductions of eight registers at a time. (No standard library: see
// attend_impl.hpp)
#pragma once

#include "kernels/kernels.hpp"
#include "kernels/simd_avx512.hpp"

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

// Configures the tile registers, and restores the configuration of other code of this thread on destruction.
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

// All registers with 16 rows of 64 bytes, for bf16 products.
inline TileConfig whole_tiles() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.rows[i] = 16;
        config.row_bytes[i] = 64;
    }
    return config;
}

struct Add {
    __m512 operator()(__m512 x, __m512 y) const { return _mm512_add_ps(x, y); }
};
struct Max {
    __m512 operator()(__m512 x, __m512 y) const { return _mm512_max_ps(x, y); }
};

// Reduces the lanes of each of 8 registers by f: lane i of the result is of register i.
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
