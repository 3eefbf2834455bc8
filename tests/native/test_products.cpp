// Products of few rows on every instruction set of this machine, against sums in double precision of what is packed:
// for the sanitizers, so arrays are no longer than they must be.
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"
#include "kernels/half.hpp"
#include "kernels/kernels.hpp"
#include "kernels/product.hpp"

using namespace crush;

namespace {

const ParallelFor in_order = [](size_t n, const std::function<void(size_t)>& task) {
    for (size_t i = 0; i < n; ++i) task(i);
};

struct Random {
    std::mt19937 engine{11};
    size_t below(size_t n) { return engine() % n; }
    float normal() { return std::normal_distribution<float>()(engine); }
};

struct Weights {
    std::vector<uint8_t> codes;
    std::vector<uint16_t> scales, zeros;
    CompressedWeights view;

    Weights(Random& random, int bits, size_t n, size_t k, size_t group)
        : codes(n * k * static_cast<size_t>(bits) / 8), scales(n * k / group), zeros(n * k / group) {
        for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(256));
        for (uint16_t& scale : scales) scale = half_of_float(0.01f + 0.001f * random.normal(), Rounding::nearest);
        for (uint16_t& zero : zeros) zero = half_of_float(static_cast<float>(random.below(16)), Rounding::nearest);
        view = {bits, codes.data(), scales.data(), zeros.data(), n, k, group};
    }
    double at(size_t n, size_t k) const {
        const size_t g = n * (view.num_inputs / view.group) + k / view.group, i = n * view.num_inputs + k;
        const int code = view.bits == 8 ? codes[i] : codes[i / 2] >> (i % 2 ? 4 : 0) & 15;
        return (code - static_cast<double>(float_of_half(zeros[g]))) * static_cast<double>(float_of_half(scales[g]));
    }
};

// Whole numbers that are their own codes.
std::unique_ptr<float[]> rows_of(Random& random, size_t rows, size_t k) {
    std::unique_ptr<float[]> x(new float[rows * k]);
    for (size_t i = 0; i < rows * k; ++i)
        x[i] = i % 16 ? static_cast<float>(static_cast<int>(random.below(255)) - 127) : 127;
    return x;
}

}  // namespace

int main() {
    Random random;
    for (const std::string& isa : available_isas()) {
        const ProductKernels& kernels = product_kernels(isa);
        for (const int bits : {8, 4}) {
            for (const size_t group : {size_t{16}, size_t{32}, size_t{64}, size_t{192}}) {
                const size_t n = 48, k = 192, rows = 1 + random.below(6);
                const Weights weights(random, bits, n, k, group);
                const auto x = rows_of(random, rows, k);
                const std::unique_ptr<float[]> out(new float[rows * n]);
                make_linear(weights.view, in_order)->run(kernels, x.get(), rows, out.get(), in_order);
                for (size_t r = 0; r < rows; ++r) {
                    for (size_t i = 0; i < n; ++i) {
                        double sum = 0, size = 0;
                        for (size_t j = 0; j < k; ++j) {
                            const double term = static_cast<double>(x[r * k + j]) * weights.at(i, j);
                            sum += term;
                            size += std::fabs(term);
                        }
                        CHECK(std::fabs(sum - static_cast<double>(out[r * n + i])) <= 1e-5 * size);
                    }
                }
            }
        }
        const Weights gate(random, 4, 64, 96, 32), up(random, 8, 64, 96, 96), down(random, 8, 32, 64, 16);
        for (const Activation activation : {Activation::silu, Activation::gelu_tanh}) {
            const auto mlp = make_mlp(gate.view, up.view, down.view, activation, in_order);
            const auto x = rows_of(random, 5, 96);
            const std::unique_ptr<float[]> out(new float[5 * 32]), one(new float[32]);
            mlp->run(kernels, x.get(), 5, out.get(), in_order);
            mlp->run(kernels, x.get() + 4 * 96, 1, one.get(), in_order);
            for (size_t i = 0; i < 32; ++i) CHECK(std::isfinite(one[i]) && one[i] == out[4 * 32 + i]);
        }
        std::printf("%s: products are right\n", isa.c_str());
    }
    return 0;
}
