#include "kernels/attend_pairs.hpp"
#include "kernels/kernels_impl.hpp"
#include "kernels/pairs_avx512.hpp"

namespace crush {

extern const Kernels KERNELS_AVX512;
const Kernels KERNELS_AVX512 = make_kernels<SimdAvx512>(&attend_pairs<PairsAvx512, &AttendImpl<SimdAvx512>::attend>);

}  // namespace crush
