#include "kernels/product_avx512.hpp"

namespace crush {

extern const ProductKernels PRODUCT_AVX512VNNI;
const ProductKernels PRODUCT_AVX512VNNI = make_product_kernels<ByDwords<ProductAvx512Vnni>>();

}  // namespace crush
