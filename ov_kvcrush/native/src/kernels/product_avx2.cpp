#include "kernels/product_avx2.hpp"

namespace crush {

extern const ProductKernels PRODUCT_AVX2;
const ProductKernels PRODUCT_AVX2 = make_product_kernels<ByWords<ProductAvx2>>();

}  // namespace crush
