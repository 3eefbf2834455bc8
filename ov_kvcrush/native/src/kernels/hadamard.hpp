// The orthonormal Walsh-Hadamard transform of each block of channels of a row: its own inverse. Values of 2 bits are
// stored rotated by it (QuaRot, arXiv 2404.00456): it spreads a large number over its block, so four levels over the
// range of a group leave less error. (No standard library: see attend_impl.hpp)
//
// Cost of a row: D log2(block) additions and D products, without memory between them. A row of sums is rotated back
// once for each run of rotated tiles, most often 32 or more, each of which takes 64 products a channel.
#pragma once

#include "kernels/kernels.hpp"

namespace crush {
namespace {

template <class I>
struct Hadamard {
    using V = typename I::V;

    template <int H>
    struct Signs {
        float of[16] = {};
        constexpr Signs() {
            for (int i = 0; i < 16; ++i) of[i] = i & H ? -1.f : 1.f;
        }
    };
    // Sums and differences of channels i and i ^ H.
    template <int H>
    static V within(V x) {
        static constexpr Signs<H> signs;
        return I::fma(x, I::load(signs.of), I::template swap_lanes<H>(x));
    }

    // A block of 16 U channels. Additions in an order that the numpy reference has, too: codes are the same everywhere.
    template <int U>
    static void block(float* p, float factor) {
        V x[U];
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) x[u] = within<8>(within<4>(within<2>(within<1>(I::load(p + 16 * u)))));
#pragma GCC unroll 4
        for (int h = 1; h < U; h *= 2)
#pragma GCC unroll 16
            for (int u = 0; u < U; ++u) {
                if (u & h) continue;
                const V sum = I::add(x[u], x[u + h]), difference = I::sub(x[u], x[u + h]);
                x[u] = sum;
                x[u + h] = difference;
            }
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) I::store(p + 16 * u, I::mul(x[u], I::set1(factor)));
    }

    // Rows [num_rows, head_size] in place, in blocks of so many channels. (Not inlined: its products must be rounded
    // before what comes next.)
    __attribute__((noinline)) static void rotate(float* rows, int num_rows, int head_size, int channels) {
        for (float* const end = rows + num_rows * head_size; rows < end; rows += channels) switch (channels) {
                case 16:
                    block<1>(rows, 0.25f);
                    break;
                case 32:
                    block<2>(rows, 0.17677669529663687f);
                    break;
                case 64:
                    block<4>(rows, 0.125f);
                    break;
                case 128:
                    block<8>(rows, 0.08838834764831845f);
                    break;
                case 256:
                    block<16>(rows, 0.0625f);
                    break;
            }
    }

    // Makes the sums of these rows ready for values of tiles of this layout.
    static void turn_sums(const AttendArgs& a, const TileLayout& l) {
        if (*a.rotation == l.rotation) return;
        if (*a.rotation != ANY_ROTATION) rotate(a.acc, a.rows, l.head_size, l.rotation + *a.rotation);  // one is 0
        *a.rotation = l.rotation;
    }
};

}  // namespace
}  // namespace crush
