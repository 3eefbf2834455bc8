#include "simd_scalar.hpp"

#include "kernels_impl.hpp"

namespace crush {

extern const Kernels KERNELS_SCALAR;
const Kernels KERNELS_SCALAR = make_kernels<SimdScalar>();

}  // namespace crush
