// The passes over logits of one instruction set, from its Simd* struct. No templates of the standard library here: what
// is compiled for one instruction set must not be linked for all.
#pragma once

#include "kernels/sampling.hpp"
#include "kernels/visibility.hpp"

namespace crush {
namespace {

template <class I>
struct SamplingImpl {
    using V = typename I::V;
    static constexpr size_t LANES = 16;

    static float maxima(const float* x, size_t num_blocks, float* block_max) {
        const V lowest = I::set1(-__builtin_inff());
        V top = lowest;
        for (size_t b = 0; b < num_blocks; ++b, x += LOGIT_BLOCK) {
            const V low = I::max(I::load(x), I::max(I::load(x + LANES), lowest));
            const V high = I::max(I::load(x + 2 * LANES), I::max(I::load(x + 3 * LANES), low));
            block_max[b] = I::reduce_max(high);
            top = I::max(high, top);
        }
        return I::reduce_max(top);
    }

    static double exp_sum(const float* x, size_t num_blocks, float max, float scale) {
        constexpr size_t flush = 16;  // blocks whose float sums are added as doubles: keeps the error at 1e-7
        double total = 0;
        for (size_t b = 0; b < num_blocks;) {
            V sum[4] = {I::set1(0), I::set1(0), I::set1(0), I::set1(0)};
            for (const size_t end = b + flush < num_blocks ? b + flush : num_blocks; b < end; ++b, x += LOGIT_BLOCK) {
                for (size_t i = 0; i < 4; ++i) sum[i] = I::add(sum[i], exp(x + i * LANES, max, scale));
            }
            total += static_cast<double>(I::reduce_add(I::add(I::add(sum[0], sum[1]), I::add(sum[2], sum[3]))));
        }
        return total;
    }

    static void exp_block(const float* x, float max, float scale, float* e) {
        for (size_t i = 0; i < LOGIT_BLOCK; i += LANES) I::store(e + i, exp(x + i, max, scale));
    }

    // An exponential time -log(u) / e before `bound` needs 1 - u < bound * e; the first 31 bits of 1 - u are at most
    // it.
    static bool any_early(const float* e, uint64_t key, uint64_t token, float bound) {
        int early = 0;
        const float unit = bound * 2147483648.f;
        for (size_t i = 0; i < LOGIT_BLOCK; ++i) {
            const auto late = static_cast<float>(static_cast<int32_t>(~noise_bits(key, token + i) >> 33));
            early |= late <= unit * e[i];
        }
        return early != 0;
    }

    static float mass_above(const float* x, const float* e, float least) {
        // (Summed in the same loop, GCC 12 loses lanes with AVX2.)
        float kept[LOGIT_BLOCK];
        for (size_t i = 0; i < LOGIT_BLOCK; ++i) kept[i] = x[i] > least ? e[i] : 0.f;
        const V low = I::add(I::load(kept), I::load(kept + LANES));
        return I::reduce_add(I::add(low, I::add(I::load(kept + 2 * LANES), I::load(kept + 3 * LANES))));
    }

private:
    static V exp(const float* x, float max, float scale) {
        return I::exp2(I::mul(I::sub(I::load(x), I::set1(max)), I::set1(scale * 1.44269504f)), EXP2_POLY);
    }
};

template <class I>
constexpr SamplingKernels make_sampling_kernels() {
    using S = SamplingImpl<I>;
    return {&S::maxima, &S::exp_sum, &S::exp_block, &S::any_early, &S::mass_above};
}

}  // namespace
}  // namespace crush
