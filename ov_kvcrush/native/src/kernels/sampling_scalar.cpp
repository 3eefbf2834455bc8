#include "kernels/sampling_impl.hpp"
#include "kernels/simd_scalar.hpp"

namespace crush {

extern const SamplingKernels SAMPLING_SCALAR;
const SamplingKernels SAMPLING_SCALAR = make_sampling_kernels<SimdScalar>();

}  // namespace crush
