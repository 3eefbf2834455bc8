// Laws of sampling, on every instruction set of this machine, against plain double precision. No framework: returns
// whether a law failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.hpp"
#include "kernels/sampling.hpp"

using namespace crush;

namespace {

// The token by sorting everything: largest logits first, equal ones by their ids.
size_t sorted_draw(const float* x, size_t n, const DrawParams& p) {
    std::vector<size_t> order(n);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
    if (p.top_k > 0 && p.top_k < n) order.resize(p.top_k);
    std::vector<double> weights;
    for (const size_t token : order)
        weights.push_back(std::exp(static_cast<double>(x[token] - x[order[0]]) / p.temperature));
    const double total = std::accumulate(weights.begin(), weights.end(), 0.);
    double before = 0, first = HUGE_VAL;
    size_t drawn = order[0];
    for (size_t i = 0; i < order.size(); ++i) {
        if ((i > 0 && before >= p.top_p * total) || weights[i] < p.min_p) break;
        before += weights[i];
        const auto bits = static_cast<double>(noise_bits(p.key, order[i]) >> 11);
        const double time = -std::log((bits + 0.5) * 0x1p-53) / weights[i];
        if (time < first) first = time, drawn = order[i];
    }
    return drawn;
}

}  // namespace

int main() {
    int failures = 0;
    for (const std::string& isa : available_isas()) {
        const SamplingKernels& kernels = sampling_kernels(isa);
        std::mt19937 random(7);
        const auto pick = [&](std::vector<double> values) { return values[random() % values.size()]; };
        for (unsigned i = 0; i < 300; ++i) {
            const auto n = static_cast<size_t>(pick({1, 3, 63, 64, 65, 200, 3000}));
            std::normal_distribution<float> normal(0, static_cast<float>(pick({0.1, 1, 5})));
            const std::unique_ptr<float[]> x(new float[n]);  // no longer than it is: reads beyond it are seen
            for (size_t t = 0; t < n; ++t) x[t] = normal(random);
            const DrawParams p{pick({0.01, 0.7, 1, 4}),
                               static_cast<size_t>(pick({0, 0, 1, 40})),
                               pick({0.05, 0.5, 0.93, 1}),
                               pick({0, 0, 0.01, 0.3}),
                               random(),
                               5};
            const Drawn drawn = draw(x.get(), n, p, kernels);
            bool holds = drawn.token == static_cast<int64_t>(sorted_draw(x.get(), n, p));
            holds &= drawn.top.size() == std::min<size_t>(n, 5);
            holds &= drawn.top[0].first == std::max_element(x.get(), x.get() + n) - x.get();
            if (!holds) std::printf("%s: case %u of %zu logits\n", isa.c_str(), i, n);
            failures += !holds;
        }
        std::printf("%s: 300 cases, %d failures so far\n", isa.c_str(), failures);
    }
    return failures ? 1 : 0;
}
