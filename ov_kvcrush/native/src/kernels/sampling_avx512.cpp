#include "kernels/sampling_impl.hpp"
#include "kernels/simd_avx512.hpp"

namespace crush {

extern const SamplingKernels SAMPLING_AVX512;
const SamplingKernels SAMPLING_AVX512 = make_sampling_kernels<SimdAvx512>();

}  // namespace crush
