#include "kernels/attend_pairs.hpp"
#include "kernels/forward.hpp"
#include "kernels/pairs_avx2.hpp"

namespace crush {

extern const Kernels KERNELS_AVX2, KERNELS_AVXVNNI;
const Kernels KERNELS_AVXVNNI =
    forward<KERNELS_AVX2>("avxvnni", &attend_pairs<PairsAvxVnni, &Forward<KERNELS_AVX2>::attend>);

}  // namespace crush
