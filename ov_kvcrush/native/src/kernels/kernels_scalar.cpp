#include "kernels/kernels_impl.hpp"
#include "kernels/simd_scalar.hpp"

namespace crush {

extern const Kernels KERNELS_SCALAR;
const Kernels KERNELS_SCALAR = make_kernels<SimdScalar>();

}  // namespace crush
