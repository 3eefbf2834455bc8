#include "kernels/kernels_impl.hpp"
#include "kernels/simd_avx2.hpp"

namespace crush {

extern const Kernels KERNELS_AVX2;
const Kernels KERNELS_AVX2 = make_kernels<SimdAvx2>();

}  // namespace crush
