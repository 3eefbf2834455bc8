#include "kernels/attend_pairs.hpp"
#include "kernels/kernels_impl.hpp"
#include "kernels/pairs_avx2.hpp"

namespace crush {

extern const Kernels KERNELS_AVX2;
const Kernels KERNELS_AVX2 = make_kernels<SimdAvx2>(&attend_pairs<PairsAvx2, &AttendImpl<SimdAvx2>::attend>);

}  // namespace crush
