// What AVX512-VNNI has, and attention of prompts with the products of AVX512-BF16.
#include "kernels/forward.hpp"
#include "kernels/panels_avx512.hpp"
#include "kernels/prefill_impl.hpp"

namespace crush {

extern const Kernels KERNELS_AVX512VNNI, KERNELS_AVX512BF16;

namespace {

struct DotBf16 {
    static V add(V sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
};

void prefill(const Prefill& args) { Prefiller<PanelsAvx512<DotBf16>>(args).run(); }

}  // namespace

const Kernels KERNELS_AVX512BF16 =
    forward<KERNELS_AVX512VNNI>("avx512bf16", &Forward<KERNELS_AVX512VNNI>::attend, nullptr, &prefill);

}  // namespace crush
