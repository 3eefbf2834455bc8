// What AVX-512 has, and the prompt kernel of AVX512-BF16 with its products made of others: any CPU with AVX-512 can
// test it. A product takes two FMAs and what unpacks its pairs, so nothing but a test asks for these kernels.
#include "kernels/forward.hpp"
#include "kernels/panels_avx512.hpp"
#include "kernels/prefill_impl.hpp"

namespace crush {

extern const Kernels KERNELS_AVX512, KERNELS_BF16_EMULATED;

namespace {

// In the order of the instruction: the upper numbers, then the lower ones, each product added with one rounding. (The
// instruction takes numbers below 2^-126 for 0.)
struct DotEmulated {
    static V add(V sum, __m512i x, __m512i y) {
        return I::fma(lower(x), lower(y), I::fma(upper(x), upper(y), sum));
    }

private:
    static V lower(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
    static V upper(__m512i x) {
        return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
};

void prefill(const Prefill& args) { Prefiller<PanelsAvx512<DotEmulated>>(args).run(); }

}  // namespace

const Kernels KERNELS_BF16_EMULATED =
    forward<KERNELS_AVX512>("avx512", &Forward<KERNELS_AVX512>::attend, nullptr, &prefill);

}  // namespace crush
