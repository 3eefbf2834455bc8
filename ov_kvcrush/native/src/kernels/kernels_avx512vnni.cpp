#include "kernels/attend_pairs.hpp"
#include "kernels/forward.hpp"
#include "kernels/pairs_avx512.hpp"

namespace crush {

extern const Kernels KERNELS_AVX512, KERNELS_AVX512VNNI;
const Kernels KERNELS_AVX512VNNI =
    forward<KERNELS_AVX512>("avx512vnni", &attend_pairs<PairsAvx512Vnni, &Forward<KERNELS_AVX512>::attend>);

}  // namespace crush
