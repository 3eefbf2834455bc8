#include "kernels/product_impl.hpp"
#include "kernels/simd_scalar.hpp"

namespace crush {
namespace {

struct ProductScalar {
    using I = SimdScalar;
    static constexpr int ROWS = 1;

    struct W {
        int32_t x[PRODUCT_COLUMNS];
    };

    template <int BITS, int A, int M>
    static void dots(const uint8_t* p, const int8_t* const* x, W* sums) {
        static_assert(M == ROWS, "");
        W& sum = sums[0];
        sum = W{};
        for (int k = 0; k < A; k += 32 / BITS, p += 64) {
            for (int n = 0; n < PRODUCT_COLUMNS; ++n) {
                for (int i = 0; i < 4; ++i) {
                    const int byte = p[4 * n + i];
                    if (BITS == 8) {
                        sum.x[n] += byte * x[0][k + i];
                    } else {
                        sum.x[n] += (byte & 15) * x[0][k + i] + (byte >> 4) * x[0][k + 4 + i];
                    }
                }
            }
        }
    }
    static I::V to_float(const W& a) {
        return I::lanes([&](int i) { return static_cast<float>(a.x[i]); });
    }
    static void prefetch_ahead(const uint8_t*) {}
};

}  // namespace

extern const ProductKernels PRODUCT_SCALAR;
const ProductKernels PRODUCT_SCALAR = make_product_kernels<ProductScalar>();

}  // namespace crush
