#include "kernels/sampling_impl.hpp"
#include "kernels/simd_avx2.hpp"

namespace crush {

extern const SamplingKernels SAMPLING_AVX2;
const SamplingKernels SAMPLING_AVX2 = make_sampling_kernels<SimdAvx2>();

}  // namespace crush
