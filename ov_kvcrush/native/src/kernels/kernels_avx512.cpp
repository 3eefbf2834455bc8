#include "kernels/kernels_impl.hpp"
#include "kernels/simd_avx512.hpp"

namespace crush {

extern const Kernels KERNELS_AVX512;
const Kernels KERNELS_AVX512 = make_kernels<SimdAvx512>();

}  // namespace crush
