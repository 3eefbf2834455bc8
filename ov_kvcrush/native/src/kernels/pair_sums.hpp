// Sums of products of 16-bit integers with codes, two at a time. N is a Pairs* struct: pairs_avx2.hpp,
// pairs_avx512.hpp. (No standard library: see attend_impl.hpp)
//
// The four codes of one byte each in a dword (a quad: neighbouring channels of a key, tokens of a value) are two
// products of pairs: of bytes 0 and 2, which one mask leaves in the words of the dword, and of bytes 1 and 3, which one
// shift does.
//
// Sums are exact. Integers are at most 32767 and codes at most 255, so those over 256 channels or tokens are at most
// 256 * 255 * 32767 = 2139029760 < 2^31.
#pragma once

#include "kernels/kernels.hpp"

namespace crush {
namespace {

constexpr int MAX_PRODUCTS = 256;  // with codes of 8 bits, that a sum can take

// Integers of some rows for 32 channels or tokens, 16 pairs each. Quads of the first 16 and of the second alternate; a
// quad has the pair for bytes 0 and 2 of its codes, and behind it that for bytes 1 and 3.
struct PairBlock {
    alignas(ALIGNMENT) uint32_t of[MAX_ROWS][TILE / 2];

    // The pairs of quad i of 16 channels or tokens, the first or second 16.
    const uint32_t* quad(int half, int i) const { return of[0] + 2 * half + 4 * i; }
};

static inline uintptr_t address(const uint8_t* p) { return reinterpret_cast<uintptr_t>(p); }
// Prefetches what lies `ahead` bytes behind p, in another tile.
template <class I>
__attribute__((always_inline)) inline void prefetch_ahead(const uint8_t* p, uintptr_t ahead) {
    I::prefetch(reinterpret_cast<const uint8_t*>(address(p) + ahead));
}

// Of M rows of integers and U units of 16 columns of codes.
template <class N, int M, int U>
class PairSums {
    using W = typename N::W;

public:
    __attribute__((always_inline)) PairSums() {
#pragma GCC unroll 2
        for (int k = 0; k < SPLIT; ++k)
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) sums_[k][r][u] = N::zero();
    }
    // Adds the products over 16 * units channels or tokens, with codes whose rows of dwords are `stride` bytes apart.
    template <int BITS>
    __attribute__((always_inline)) void add(const uint8_t* codes, int stride, const PairBlock* blocks, int units,
                                            uintptr_t ahead) {
        constexpr int QUADS = 8 / BITS;  // in a dword
        for (int unit = 0; unit < units; ++unit) {
            const PairBlock& block = blocks[unit / 2];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i += QUADS, codes += stride) {
                W dwords[U];
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) {
                    dwords[u] = N::load(codes + 64 * u);
                    prefetch_ahead<typename N::I>(codes + 64 * u, ahead);
                }
                add_quad<BITS, 0>(dwords, block.quad(unit % 2, i));
                if constexpr (QUADS > 1) add_quad<BITS, 1>(dwords, block.quad(unit % 2, i + 1));
                if constexpr (QUADS > 2) add_quad<BITS, 2>(dwords, block.quad(unit % 2, i + 2));
                if constexpr (QUADS > 2) add_quad<BITS, 3>(dwords, block.quad(unit % 2, i + 3));
            }
        }
    }
    // Of row r and the columns of unit u, as the nearest floats.
    typename N::V total(int r, int u) const {
        return N::to_float(SPLIT == 2 ? N::add(sums_[0][r][u], sums_[SPLIT - 1][r][u]) : sums_[0][r][u]);
    }

private:
    // In two parts where there are too few of them to take products as fast as they come.
    static constexpr int SPLIT = N::SUMS_PER_UNIT * M * U < N::MIN_SUMS ? 2 : 1;

    template <int BITS, int QUAD>
    __attribute__((always_inline)) void add_quad(const W (&dwords)[U], const uint32_t* pairs) {
        W codes[2][U];
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) {
            codes[0][u] = N::template field<BITS, BITS * QUAD>(dwords[u]);
            codes[1][u] = N::template field<BITS, BITS * QUAD + 8>(dwords[u]);
        }
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k)
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r) {
                const W x = N::pair(pairs[r * (TILE / 2) + k]);
#pragma GCC unroll 2
                for (int u = 0; u < U; ++u) {
                    W& sum = sums_[k % SPLIT][r][u];
                    sum = N::add_products(sum, codes[k][u], x);
                }
            }
    }

    W sums_[SPLIT][M][U];
};

}  // namespace
}  // namespace crush
