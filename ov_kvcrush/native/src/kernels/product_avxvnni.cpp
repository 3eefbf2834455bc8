#include "kernels/product_avx2.hpp"

namespace crush {

extern const ProductKernels PRODUCT_AVXVNNI;
const ProductKernels PRODUCT_AVXVNNI = make_product_kernels<ByDwords<ProductAvxVnni>>();

}  // namespace crush
