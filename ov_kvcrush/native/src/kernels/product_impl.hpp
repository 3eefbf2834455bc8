// The product kernels of one instruction set. N has registers of 16 dwords and how bytes are multiplied: product_*.cpp.
// (No standard library: see attend_impl.hpp)
#pragma once

#include "kernels/product.hpp"
#include "kernels/visibility.hpp"

namespace crush {
namespace {

// Sums of products of 16 outputs' codes with those of up to four rows, by instructions that add four products of a dword:
// R::add_products(sum, unsigned bytes, signed bytes).
template <class R>
struct ByDwords : R {
    using W = typename R::W;

    template <int BITS, int A, int M>
    __attribute__((always_inline)) static void dots(const uint8_t* p, const int8_t* const* x, W* sums) {
        // Two sums for each row, else the next product waits for the last.
        W even[M], odd[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) even[m] = odd[m] = R::zero();
#pragma GCC unroll 8
        for (int i = 0; i < A * BITS / 32; ++i, p += 64) {
            const W w = R::load(p);
            R::prefetch_ahead(p);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                if constexpr (BITS == 8) {
                    R::add_products(i % 2 ? odd[m] : even[m], w, x[m] + 4 * i);
                } else {
                    R::add_products(even[m], R::low_halves(w), x[m] + 8 * i);
                    R::add_products(odd[m], R::high_halves(w), x[m] + 8 * i + 4);
                }
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sums[m] = R::add(even[m], odd[m]);
    }
};

// The same where products of bytes become 16-bit sums (vpmaddubsw): halves of codes, so that 32 inputs fit in,
// 16 * 15 * 127 = 30480.
template <class R>
struct ByWords : R {
    using W = typename R::W;

    template <int BITS, int A, int M>
    __attribute__((always_inline)) static void dots(const uint8_t* p, const int8_t* const* x, W* sums) {
        W low[M], high[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) low[m] = high[m] = R::zero();
#pragma GCC unroll 8
        for (int i = 0; i < A * BITS / 32; ++i, p += 64) {
            const W w = R::load(p);
            R::prefetch_ahead(p);
            const W l = R::low_halves(w), h = R::high_halves(w);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                const int8_t* at = x[m] + (BITS == 8 ? 4 : 8) * i;
                low[m] = R::add_words(low[m], R::byte_products(l, at));
                high[m] = R::add_words(high[m], R::byte_products(h, BITS == 8 ? at : at + 4));
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
            sums[m] = R::add(R::pair_sums(low[m], 1), R::pair_sums(high[m], BITS == 8 ? 16 : 1));
    }
};

template <class N>
struct ProductImpl {
    using I = typename N::I;
    using V = typename I::V;

    // x . w = scale * (sum of a's scale * (codes of a . codes of w) - zero point * sum of x), group by group.
    template <int BITS, int A, int M>
    __attribute__((noinline)) static void block(const BlockProduct& b, int first) {
        const size_t num_inputs = b.num_groups * b.group, num_scales = num_inputs / A;
        const int8_t* codes[M];
        const float *scales[M], *sums[M];
        V total[M];
        for (int m = 0; m < M; ++m) {
            const size_t row = static_cast<size_t>(first + m);
            codes[m] = b.codes + row * num_inputs;
            scales[m] = b.scales + row * num_scales;
            sums[m] = b.group_sums + row * b.num_groups;
            total[m] = I::set1(0);
        }
        const uint8_t* p = b.block;
        for (size_t g = 0; g < b.num_groups; ++g) {
            const V scale = I::load_f16(reinterpret_cast<const uint16_t*>(p));
            const V zero = I::load_f16(reinterpret_cast<const uint16_t*>(p) + PRODUCT_COLUMNS);
            N::prefetch_ahead(p);
            p += PRODUCT_HEADER;
            V sum[M];
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) sum[m] = I::mul(zero, I::set1(-sums[m][g]));
            for (size_t a = 0; a < b.group; a += A, p += A * 2 * BITS) {
                typename N::W dots[M];
                N::template dots<BITS, A, M>(p, codes, dots);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    sum[m] = I::fma(N::to_float(dots[m]), I::set1(*scales[m]++), sum[m]);
                    codes[m] += A;
                }
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) total[m] = I::fma(sum[m], scale, total[m]);
        }
        for (int m = 0; m < M; ++m) I::store(b.out + (first + m) * PRODUCT_COLUMNS, total[m]);
    }

    template <int BITS, int A>
    static void rows(const BlockProduct& b) {
        for (int first = 0; first < b.rows;) {
            const int left = b.rows - first;
            if (N::ROWS >= 4 && left >= 4) {
                block<BITS, A, N::ROWS >= 4 ? 4 : 1>(b, first);
                first += 4;
            } else if (N::ROWS >= 3 && left == 3) {
                block<BITS, A, N::ROWS >= 3 ? 3 : 1>(b, first);
                first += 3;
            } else if (N::ROWS >= 2 && left >= 2) {
                block<BITS, A, N::ROWS >= 2 ? 2 : 1>(b, first);
                first += 2;
            } else {
                block<BITS, A, 1>(b, first);
                ++first;
            }
        }
    }

    static void multiply(const BlockProduct& b) {
        const bool small = b.input_group == SMALL_INPUT_GROUP;
        if (b.bits == 8) return small ? rows<8, SMALL_INPUT_GROUP>(b) : rows<8, INPUT_GROUP>(b);
        return small ? rows<4, SMALL_INPUT_GROUP>(b) : rows<4, INPUT_GROUP>(b);
    }

    static void quantise(const float* x, size_t num_groups, size_t input_group, int8_t* codes, float* scales,
                         float* sums) {
        for (size_t g = 0; g < num_groups; ++g, x += input_group, codes += input_group) {
            const V low = I::load(x), high = input_group > 16 ? I::load(x + 16) : I::set1(0);
            const float largest = I::reduce_max(I::max(I::abs(low), I::abs(high)));
            const float zero = I::reduce_add(I::mul(I::add(I::abs(low), I::abs(high)), I::set1(0)));  // or NaN
            if (zero != 0 || !(largest >= SMALLEST)) {  // zero is NaN, or all are as good as 0
                for (size_t i = 0; i < input_group; ++i) codes[i] = 0;
                scales[g] = sums[g] = zero;
                continue;
            }
            const float inverse = 127 / largest;
            uint8_t bytes[INPUT_GROUP];
            store(bytes, low, inverse);
            store(bytes + 16, high, inverse);
            int sum = 0;
            for (size_t i = 0; i < input_group; ++i) {
                const int code = bytes[i] - 128;
                codes[i] = static_cast<int8_t>(code);
                sum += code;
            }
            scales[g] = largest / 127;
            sums[g] = scales[g] * static_cast<float>(sum);
        }
    }

    static void gate(Activation activation, float* gate, const float* up) {
        for (int i = 0; i < GATE_COLUMNS; i += 16) {
            const V x = I::load(gate + i);
            V y = x;  // x * sigmoid(y)
            if (activation == Activation::gelu_tanh) {
                // tanh(z) = 2 * sigmoid(2 * z) - 1
                const V inner = I::fma(I::mul(x, x), I::set1(0.044715f), I::set1(1));
                y = I::mul(I::mul(x, inner), I::set1(1.5957691216f));
            }
            I::store(gate + i, I::mul(I::mul(x, sigmoid(y)), I::load(up + i)));
        }
    }

private:
    static constexpr float SMALLEST = 1e-30f;  // 127 over it is finite

    // codes + 128
    static void store(uint8_t* to, V x, float inverse) {
        I::store_bytes(to, I::to_dwords(I::fma(x, I::set1(inverse), I::set1(128))));
    }
    static V sigmoid(V y) {
        const V one = I::set1(1), zero = I::set1(0);
        // Of -|y| and of the negative part of y: no overflow. (zero first: max gives the second where one is NaN)
        const V all = I::exp2(I::mul(I::abs(y), I::set1(-1.44269504f)), EXP2_POLY);
        const V numerator = I::exp2(I::mul(I::min(zero, y), I::set1(1.44269504f)), EXP2_POLY);
        return I::div(numerator, I::add(one, all));
    }
};

template <class N>
constexpr ProductKernels make_product_kernels() {
    using P = ProductImpl<N>;
    return {&P::multiply, &P::quantise, &P::gate};
}

}  // namespace
}  // namespace crush
