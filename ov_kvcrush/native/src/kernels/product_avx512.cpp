#include "kernels/product_avx512.hpp"

namespace crush {

extern const ProductKernels PRODUCT_AVX512;
const ProductKernels PRODUCT_AVX512 = make_product_kernels<ByWords<ProductAvx512>>();

}  // namespace crush
